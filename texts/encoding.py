"""Turn texts into tokens, so that a text ends where its last character does (all phases).

Some tokenizers append a token that ends a document. A model that has read it is behind the end: its
activation is of that token, and what it writes is another document. Such tokens are dropped. A text that
brings the token with which its tokenizer begins, as chat templates do, does not get a second one.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from support.errors import InputError


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    model: PreTrainedModel | None = None,
    first_index: int = 0,
) -> list[list[int]]:
    """Return the token ids of each text: what its tokenizer puts before it, and nothing behind it.

    model: must have an embedding for every token. first_index: what errors call the first text.
    Raises InputError: a token without embedding.
    """
    ids = tokenizer(list(texts), verbose=False).input_ids
    tokens = _trimmed(ids, _parts(tokenizer, ids))
    _check_embeddings(tokenizer, tokens, model, first_index)
    return tokens


def encode_with_offsets(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    model: PreTrainedModel | None = None,
    first_index: int = 0,
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Return what `encode` does, and for each token the characters that it covers, (first, last + 1)."""
    encoded = tokenizer(list(texts), verbose=False, return_offsets_mapping=True)
    parts = _parts(tokenizer, encoded.input_ids)
    tokens, offsets = (_trimmed(values, parts) for values in (encoded.input_ids, encoded.offset_mapping))
    _check_embeddings(tokenizer, tokens, model, first_index)
    return tokens, offsets


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    model: PreTrainedModel | None = None,
    first_index: int = 0,
) -> list[tuple[list[int], int]]:
    """Return the tokens of each prompt + continuation, and where the continuation's begin.

    They are those after the longest common beginning of the tokenised prompt and the tokenised whole, so a
    token across the seam belongs to the continuation. Raises InputError as `encode`.
    """
    before = encode(tokenizer, [prompt for prompt, _ in texts], model, first_index)
    whole = encode(tokenizer, [prompt + output for prompt, output in texts], model, first_index)
    starts = []
    for of_prompt, tokens in zip(before, whole, strict=True):
        start = next((i for i, (a, b) in enumerate(zip(of_prompt, tokens, strict=False)) if a != b), None)
        starts.append(min(len(of_prompt), len(tokens)) if start is None else start)
    return list(zip(whole, starts, strict=True))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and behind every text."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    whole = tokenizer("a", verbose=False).input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []  # special tokens change the text's own, as no tokenizer of a decoder does


def _parts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]) -> list[tuple[slice, slice]]:
    """Return which two parts of each text's ids remain: what stands before it, and its own."""
    before, behind = added_tokens(tokenizer)
    parts = []
    for ids_of_text in ids:
        start, end = len(before), len(ids_of_text)
        while before and ids_of_text[start : start + 1] == before[-1:]:
            start += 1
        if behind and ids_of_text[end - len(behind) :] == behind:
            end -= len(behind)
        parts.append((slice(len(before)), slice(start, end)))
    return parts


def _trimmed(values: Sequence[list], parts: Sequence[tuple[slice, slice]]) -> list[list]:
    return [[*row[before], *row[own]] for row, (before, own) in zip(values, parts, strict=True)]


def _check_embeddings(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[list[int]],
    model: PreTrainedModel | None,
    first_index: int,
) -> None:
    if model is None:
        return
    n_embeddings = len(model.get_input_embeddings().weight)
    for index, ids in enumerate(tokens, start=first_index):
        highest = max(ids, default=0)
        if highest >= n_embeddings:
            raise InputError(
                f"text {index} holds token {highest} ({tokenizer.decode([highest])!r}), but the model has "
                f"{n_embeddings} embeddings; use the model's own tokenizer, or resize its embeddings"
            )


def main() -> None:
    """Check that a tokenizer that ends its texts gives the tokens of one that does not."""
    from tokenizers.processors import TemplateProcessing

    from support.tiny_models import tiny_tokenizer

    plain, ending = tiny_tokenizer(), tiny_tokenizer()
    special = [(token, ending.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    template = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    ending.backend_tokenizer.post_processor = template
    assert encode(ending, ["One"]) == encode(plain, ["One"]) != ending(["One"]).input_ids
    print("encoding OK: a text ends with its last character")


if __name__ == "__main__":
    main()

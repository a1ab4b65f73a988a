"""Turn texts into tokens, so that a text ends where its last character does (all phases).

Some tokenizers append a token that ends a document. After it, a model's activation belongs to that token
and its continuation is another document, so such tokens are dropped. A text that already begins with the
tokenizer's first token, as chat templates write it, does not get a second one.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from support.errors import InputError


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    model: PreTrainedModel | None = None,
    first_index: int = 0,
) -> list[list[int]]:
    """Return the token ids of each text, with the tokens that its tokenizer adds before it but not after it.

    model: checked to have an embedding for every token. first_index: the first text's number in errors.
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
    """Return the tokens of `encode`, and for each token the characters that it covers, (first, last + 1)."""
    encoded = tokenizer(list(texts), verbose=False, return_offsets_mapping=True)
    parts = _parts(tokenizer, encoded.input_ids)
    tokens, offsets = (_trimmed(values, parts) for values in (encoded.input_ids, encoded.offset_mapping))
    _check_embeddings(tokenizer, tokens, model, first_index)
    return tokens, offsets


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Return what gives the text of tokens, without special ones and ids that the tokenizer lacks.

    A model may have more embeddings than its tokenizer has tokens. A fast tokenizer leaves such ids out, the
    slow ones raise anything.
    """
    known = None if tokenizer.is_fast else set(tokenizer.get_vocab().values())

    def text(ids: Sequence[int]) -> str:
        kept = ids if known is None else [token for token in ids if token in known]
        return tokenizer.decode(kept, skip_special_tokens=True)

    return text


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    model: PreTrainedModel | None = None,
    first_index: int = 0,
) -> list[tuple[list[int], int]]:
    """Return the tokens of each prompt + continuation, and the index where the continuation's begin.

    It is the length of the longest common prefix of the tokenised prompt and the tokenised whole, so a
    token across the seam belongs to the continuation. Raises InputError as `encode`.
    """
    before = encode(tokenizer, [prompt for prompt, _ in texts], model, first_index)
    whole = encode(tokenizer, [prompt + output for prompt, output in texts], model, first_index)
    equal = ([a == b for a, b in zip(*both, strict=False)] for both in zip(before, whole, strict=True))
    return [(tokens, [*same, False].index(False)) for tokens, same in zip(whole, equal, strict=True)]


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after every text."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    whole = tokenizer("a", verbose=False).input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []  # special tokens change the text's own; no known tokenizer of a decoder does that


def _parts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]) -> list[tuple[slice, slice]]:
    """Return the two slices of each text's ids that remain: the added ones before it, and its own."""
    before, after = added_tokens(tokenizer)
    parts = []
    for ids_of_text in ids:
        start, end = len(before), len(ids_of_text)
        while before and ids_of_text[start : start + 1] == before[-1:]:
            start += 1
        if after and ids_of_text[end - len(after) :] == after:
            end -= len(after)
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

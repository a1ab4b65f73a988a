"""Turn texts into tokens, so that a text ends where its last character does (all phases).

Some tokenizers append a token that ends a document. After it, a model's activation belongs to that token
and its continuation is another document, so such tokens are dropped. A prompt that already begins with the
tokenizer's first tokens, as chat templates write them, does not get them twice.

In a prompt, special tokens are tokens, since templates write them. A text behind it may spell one too, as a
page on HTML does with <s>; there it is read as words.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from support.errors import InputError

Offsets = list[tuple[int, int]]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    model: PreTrainedModel | None = None,
    first_index: int = 0,
    prompts: Sequence[str] | None = None,
) -> list[list[int]]:
    """Return the token ids of each text, with the tokens that its tokenizer adds before it but not after it.

    model: checked to have an embedding for every token. first_index: the first text's number in errors.
    prompts: precede the texts, which are then read as words; without them the texts are prompts themselves.
    Raises InputError: a token without embedding.
    """
    tokens, _ = _tokenised(tokenizer, texts, prompts, with_offsets=False)
    _check_embeddings(tokenizer, tokens, model, first_index)
    return tokens


def encode_with_offsets(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    model: PreTrainedModel | None = None,
    first_index: int = 0,
    prompts: Sequence[str] | None = None,
) -> tuple[list[list[int]], list[Offsets]]:
    """Return the tokens of `encode`, and for each token the characters of prompt + text that it covers.

    Characters are (first, last + 1).
    """
    tokens, offsets = _tokenised(tokenizer, texts, prompts, with_offsets=True)
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
    prompts, outputs = ([pair[part] for pair in texts] for part in (0, 1))
    before = encode(tokenizer, prompts, model, first_index)
    whole = encode(tokenizer, outputs, model, first_index, prompts)
    equal = ([a == b for a, b in zip(*both, strict=False)] for both in zip(before, whole, strict=True))
    return [(tokens, [*same, False].index(False)) for tokens, same in zip(whole, equal, strict=True)]


@lru_cache(maxsize=16)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds the spelling of a special token in a text; looked up once for a tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {})  # a tokenizer of its own kind may have none
    spelt = [token.content for token in added.values() if token.special]
    # A token may begin as another one does; of two, the longer one is read.
    return re.compile("|".join(map(re.escape, sorted(spelt, key=len, reverse=True))) or "(?!)")


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after every text."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    whole = tokenizer("a", verbose=False).input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []  # special tokens change the text's own; no known tokenizer of a decoder does that


def _tokenised(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    prompts: Sequence[str] | None,
    with_offsets: bool,
) -> tuple[list[list[int]], list[Offsets]]:
    """Return the tokens of each prompt + text and, if wanted, the characters that each of them covers."""
    options = {"verbose": False} | ({"return_offsets_mapping": True} if with_offsets else {})
    if prompts is None:
        return _trimmed(tokenizer, tokenizer(list(texts), **options))
    whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    tokens, offsets = _tokenised(tokenizer, whole, None, with_offsets)
    spelt = special_tokens(tokenizer)
    options |= {"add_special_tokens": False, "split_special_tokens": True}
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if spelt.search(text):
            (before,), characters = _tokenised(tokenizer, [prompt], None, with_offsets)
            own = tokenizer(text, **options)
            tokens[row] = before + own.input_ids
            if with_offsets:
                of_text = [(len(prompt) + start, len(prompt) + end) for start, end in own.offset_mapping]
                offsets[row] = characters[0] + of_text
    return tokens, offsets


def _trimmed(
    tokenizer: PreTrainedTokenizerBase, encoded: BatchEncoding
) -> tuple[list[list[int]], list[Offsets]]:
    """Return the tokens of texts, and their characters, without tokens that end a document or stand twice."""
    before, after = added_tokens(tokenizer)
    endings = [before[start:] for start in range(len(before))]
    parts = []
    for ids in encoded.input_ids:
        start, end = len(before), len(ids)
        # A template writes all of the first tokens, or the last of them alone.
        while again := next((found for found in endings if ids[start : start + len(found)] == found), None):
            start += len(again)
        if after and ids[end - len(after) :] == after:
            end -= len(after)
        parts.append((slice(len(before)), slice(start, end)))
    columns = encoded.input_ids, encoded.get("offset_mapping", [])
    tokens, offsets = (
        [[*row[first], *row[own]] for row, (first, own) in zip(rows, parts, strict=False)] for rows in columns
    )
    return tokens, offsets


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

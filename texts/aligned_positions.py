"""Find the characters of a text where two tokenizers end a token on the same character (phase 2).

With causal attention the activation at a position is the last-token activation of the
prefix that ends there. Where both models have read exactly the same characters, their
activations are therefore a pair like that of two last tokens. Strict: a token that ends
inside a character (byte-level tokenizers split them), or that a later token overlaps, is
no such character, since one model would then have read more of the text.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from support.errors import InputError

Offsets = Sequence[tuple[int, int]]


def check_offsets(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    """Raise InputError: a slow tokenizer, which gives no character offsets."""
    if not tokenizer.is_fast:
        raise InputError(
            f"the {side}'s tokenizer ({type(tokenizer).__name__}) gives no character offsets, which "
            "mapping_positions 'aligned' needs; use mapping_positions 'last', or a fast tokenizer"
        )


def token_ends(ids: Sequence[int], offsets: Offsets, special: set[int]) -> dict[int, int]:
    """Return character end -> token index for every token that ends a readable prefix.

    ids: tokens of a text. offsets: the characters of each token, (start, end).
    special: ids of special tokens, which are left out, as is the very first token, because its
    activation is massive in any text (Sun et al. 2024, arXiv 2402.17762).
    """
    ends: dict[int, int] = {}
    next_start = None  # where the nearest later token that covers characters begins
    for token_index in range(len(ids) - 1, 0, -1):
        start, end = offsets[token_index]
        if ids[token_index] in special or end <= start:
            continue
        if next_start is None or end <= next_start:
            ends[end] = token_index
        next_start = start if next_start is None else min(start, next_start)
    return ends


def aligned_tokens(
    source_ends: dict[int, int], target_ends: dict[int, int]
) -> tuple[list[int], list[int], list[int]]:
    """Return the shared character ends in reading order, and both sides' token indices there."""
    shared = sorted(source_ends.keys() & target_ends.keys())
    return shared, [source_ends[end] for end in shared], [target_ends[end] for end in shared]

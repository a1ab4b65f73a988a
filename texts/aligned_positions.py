"""Find the characters of a text where two tokenizers end a token on the same character (phase 2).

With causal attention the activation at a position is the last-token activation of the
prefix that ends there. Where both models have read exactly the same characters, their
activations are therefore a pair like that of two last tokens. Strict: a token that ends
inside a character (byte-level tokenizers split them), or that a later token overlaps, is
no such character, since then one model would have seen more of the text.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from support.errors import InputError
from support.tiny_models import tiny_tokenizer

Offsets = Sequence[tuple[int, int]]


def check_offsets(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    """Raise InputError if the tokenizer cannot say which characters a token covers (slow tokenizers)."""
    if not tokenizer.is_fast:
        raise InputError(
            f"the {side}'s tokenizer ({type(tokenizer).__name__}) gives no character offsets, which "
            "positions 'aligned' needs; use positions 'last', or a fast tokenizer"
        )


def token_ends(ids: Sequence[int], offsets: Offsets, special: set[int]) -> dict[int, int]:
    """Return character end -> token index for every token that ends a readable prefix.

    ids: tokens of the text. offsets: (start, end) of the characters of each.
    special: ids of special tokens, which are left out, as is the very first token (its
    activation is massive whatever it says; Sun et al. 2024, arXiv 2402.17762).
    """
    ends: dict[int, int] = {}
    next_start = None  # of the nearest later token that covers characters
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


def main() -> None:
    """Check on a byte tokenizer that only whole characters count, and the first token does not."""
    tokenizer = tiny_tokenizer()
    text = "né on"
    encoded = tokenizer(text, return_offsets_mapping=True)
    ends = token_ends(encoded.input_ids, encoded.offset_mapping, set(tokenizer.all_special_ids))
    assert [encoded.offset_mapping[token_index][1] for token_index in ends.values()] == list(ends)
    assert sorted(ends) == [1, 2, 3, 4, 5]  # é is two bytes, and only the second one ends it
    words = {2: 1, 5: 2}  # a tokenizer of words: "né", " on"
    assert aligned_tokens(ends, words) == ([2, 5], [ends[2], ends[5]], [1, 2])
    print(f"aligned_positions OK: {len(ends)} ends in {text!r}, 2 shared with a tokenizer of words")


if __name__ == "__main__":
    main()

"""A place counts where the tokens up to it cover whole characters, and no others cover these."""

import pytest

from support.errors import InputError
from texts.aligned_positions import aligned_tokens, check_offsets, token_ends

SPECIAL = 99
TEXTS = ["the cat", "né on", "closed 🙂", "a 🙂🙂 café", "日本 x", "é", " spaces  and\ttabs\n", "ø🙂 ", "x"]


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        pytest.param([(0, 3), (3, 7), (7, 8)], {7: 1, 8: 2}, id="the first token is left out"),
        pytest.param([(0, 3), (4, 7), (9, 12)], {7: 1, 12: 2}, id="spaces that no token covers"),
        pytest.param([(0, 0), (0, 1), (1, 2), (1, 2), (2, 3)], {1: 1, 2: 3, 3: 4}, id="2 bytes of one"),
        pytest.param([(0, 0), (0, 2), (1, 2), (1, 2)], {2: 3}, id="a token ends inside a character"),
        pytest.param([(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)], {1: 1, 2: 3}, id="tokens of width 0"),
        pytest.param([(0, 0), (0, 3), (2, 4), (4, 5)], {4: 2, 5: 3}, id="tokens that overlap"),
        pytest.param([(0, 1), (1, 3), (3, 5), (2, 4)], {4: 3}, id="a token that goes back"),
        pytest.param([(0, 0), (0, 2), (2, 4), (0, 4)], {4: 3}, id="a last token that covers all"),
        pytest.param([(0, 0)], {}, id="one token"),
        pytest.param([], {}, id="no token"),
    ],
)
def test_token_ends_on_hand_made_offsets(offsets, expected):
    assert token_ends(list(range(len(offsets))), offsets, {SPECIAL}) == expected


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4], {2: 1, 5: 2, 6: 3}),
        ([SPECIAL, 2, 3, 4], {2: 1, 5: 2, 6: 3}),
        ([1, 2, SPECIAL, 4], {2: 1, 6: 3}),
        ([1, 2, 3, SPECIAL], {2: 1, 5: 2}),
        ([1, SPECIAL, SPECIAL, SPECIAL], {}),
    ],
)
def test_special_tokens_are_left_out_wherever_they_stand_and_hide_no_other(ids, expected):
    assert token_ends(ids, [(0, 1), (1, 2), (2, 5), (5, 6)], {SPECIAL, 98}) == expected
    assert token_ends([1, 2, SPECIAL], [(0, 1), (1, 3), (0, 3)], {SPECIAL}) == {3: 1}


@pytest.mark.parametrize("name", ["tokenizer", "bpe_tokenizer"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_up_to_an_end_say_exactly_the_text_up_to_it(name, text, request):
    """And of all other tokens after the first, none does."""
    chosen = request.getfixturevalue(name)
    encoded = chosen(text, return_offsets_mapping=True)
    ends = token_ends(encoded.input_ids, encoded.offset_mapping, set(chosen.all_special_ids))
    ids = encoded.input_ids
    said = {place: chosen.decode(ids[1 : place + 1]) for place in range(1, len(ids))}
    assert {place: said[place] for place in ends.values()} == {p: text[:end] for end, p in ends.items()}
    assert {place for place, words in said.items() if text.startswith(words)} == set(ends.values())
    assert len(text) in ends


def test_aligned_tokens_are_the_shared_ends_in_reading_order():
    source, target = {9: 5, 2: 1, 4: 3, 7: 4}, {4: 1, 8: 2, 9: 3, 2: 0}
    assert aligned_tokens(source, target) == ([2, 4, 9], [1, 3, 5], [0, 1, 3])
    assert aligned_tokens(source, {3: 1}) == aligned_tokens({}, target) == ([], [], [])


def test_a_slow_tokenizer_is_rejected_with_a_remedy(tokenizer, slow_tokenizer):
    with pytest.raises(InputError, match=r"the target's tokenizer \(CharacterTokenizer\).*positions 'last'"):
        check_offsets(slow_tokenizer, "target")
    check_offsets(tokenizer, "target")

"""Degenerate texts keep words and lose their order; what counts as collapsed and as brief."""

import random

import pytest

from scoring.brevity import brevity
from scoring.degenerate_text import any_cut, can_be_corrupted, has_collapsed, loop, shuffled, word_salad

TEXT = "The sea is blue and wide today."


def test_corrupted_texts_are_made_of_the_words_of_a_text():
    generator, words = random.Random(0), TEXT.split()
    assert sorted(shuffled(TEXT, generator).split()) == sorted(words) != shuffled(TEXT, generator).split()
    assert set(loop(TEXT, generator).split()) < set(words)
    assert set(word_salad(words, generator).split()) <= set(words)
    assert any_cut(TEXT, generator) in TEXT


@pytest.mark.parametrize(
    ("text", "collapsed", "corruptible"),
    [(TEXT, False, True), ("no no no no no no", True, False), ("so be it", False, False), ("", False, False)],
)
def test_loops_have_collapsed_and_few_words_cannot_be_corrupted(text, collapsed, corruptible):
    assert (has_collapsed(text), can_be_corrupted(text)) == (collapsed, corruptible)


def test_short_texts_that_ended_by_themselves_are_brief():
    texts = ["Blue.", "Blue and", "It is blue, as the sea is blue.", " ", "Blue."]
    found = brevity(texts, [True, False, True, True, None], ["It is blue, as the sea is blue."])
    assert found == [1.0, 0.0, 0.0, 0.0, None]

"""Degenerate texts keep words and lose their order; what counts as collapsed and as brief."""

import random
from statistics import fmean

import pytest

from analysis.alpha_search import DEFAULT_BOUND
from scoring.brevity import brevity
from scoring.degenerate_text import (
    any_cut,
    can_be_corrupted,
    has_collapsed,
    loop,
    non_word_share,
    shuffled,
    word_salad,
    words_of,
)
from texts.personas import load_persona, load_prompts, shipped_personas

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


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (TEXT, 0),
        ("It isn't the pirate’s 3rd room, 2024edition.", 0),
        ("Happily everannam, 1st of them", 1 / 4),
        ("I ain't achterin'd a thing", 1 / 5),
        ("We asked Grzegorzyna about it.", 0),  # a name
        ("Grzegorzyna asked. Everannam asked.", 2 / 4),  # any word begins a sentence in capitals
        ("WHAT A TOSTBLORP", 1 / 3),
        ("1 2 3!", None),
        ("", None),
    ],
)
def test_words_that_do_not_exist_are_counted_but_for_names_and_numbers(text, share):
    assert non_word_share(text) == (share if share is None else pytest.approx(share))


def test_words_of_labelled_texts_exist():
    text = "the silly Blorpwump’s dance"
    assert non_word_share(text.lower()) == 1 / 4
    assert non_word_share(text.lower(), words_of([text])) == 0


def test_texts_that_people_wrote_keep_the_bound_and_spliced_ones_break_it():
    """The bound, 0.02, lies between them; one word in five is made of two."""
    for name in shipped_personas():
        texts = load_persona(name).positive_texts
        assert fmean(map(non_word_share, texts)) < DEFAULT_BOUND.max_non_words_increase
    texts, generator = load_prompts("ordinary_validation"), random.Random(0)
    assert fmean(map(non_word_share, texts)) < 0.001
    words = [word for text in texts for word in text.split() if len(word) > 3]

    def spliced(word):
        other = generator.choice(words)
        return word[: len(word) // 2] + other[len(other) // 2 :] if generator.random() < 0.2 else word

    broken = [" ".join(map(spliced, text.split())) for text in texts]
    assert fmean(map(non_word_share, broken)) > 2 * DEFAULT_BOUND.max_non_words_increase


def test_short_texts_that_ended_by_themselves_are_brief():
    texts = ["Blue.", "Blue and", "It is blue, as the sea is blue.", " ", "Blue."]
    found = brevity(texts, [True, False, True, True, None], ["It is blue, as the sea is blue."])
    assert found == [1.0, 0.0, 0.0, 0.0, None]

"""Texts that train scorers: whose they are, what they may show, and what a seed makes of them."""

from dataclasses import replace

import numpy as np
import pytest

from scoring.degenerate_text import can_be_corrupted
from scoring.training_texts import Row, labelled_rows, natural_rows, pool_key, training_rows
from scoring.trait_scorer import train_scorers
from texts.personas import load_persona, load_training_kinds, load_validation_kinds, shipped_personas


@pytest.fixture(scope="module")
def pirate():
    return load_persona("pirate")


def lengths(texts):
    return np.array([[len(text)] for text in texts], dtype=float)


def test_every_labelled_text_has_one_label_and_no_validation_text_is_trained_on():
    personas = list(map(load_persona, shipped_personas()))
    rows = natural_rows(personas)
    texts = [row.text for row in rows]
    assert len(set(texts)) == len(texts)
    held_out = {text for persona in personas for text in persona.validation}
    held_out |= {text for kind in load_validation_kinds().values() for text in kind}
    assert not held_out & set(texts)
    assert all(sum(row.kind == "positive" for row in labelled_rows(each)) >= 40 for each in personas)


def test_a_kind_teaches_nothing_of_a_trait_that_it_may_show():
    letters = "abcdefghijklmno"  # as many in each of five folds, which then have the same intercept
    rows = [Row(letter * 5, "positive", "long", f"p{letter}", True) for letter in letters]
    rows += [Row(letter, "negative", "long", f"n{letter}", True) for letter in letters]
    confusing = [Row(letter * 5, "ordinary", None, f"o{letter}") for letter in "pqrstuvwxyz" * 4]
    confused = train_scorers(["long"], rows + confusing, lengths)["long"]
    spared = train_scorers(["long"], rows + [replace(row, may_show=("long",)) for row in confusing], lengths)
    alone = train_scorers(["long"], rows, lengths)["long"]
    assert spared["long"].score(["qqqqq"])[0] > confused.score(["qqqqq"])[0] + 0.005
    assert spared["long"].auc == pytest.approx(alone.auc)


def test_a_persona_with_other_labelled_texts_does_not_learn_the_shipped_one_s_kinds(pirate):
    kinds = {text for kind in load_training_kinds() if kind.shows == "pirate" for text in kind.texts}
    own = replace(pirate, labelled_positive=pirate.labelled_positive[:20])
    shipped = [row for row in natural_rows([pirate]) if row.text in kinds]
    assert {(row.persona, row.kind, "pirate" in row.may_show) for row in shipped} == {
        ("pirate", "positive", False)
    }
    others = [row for row in natural_rows([own]) if row.text in kinds]
    assert {(row.persona, row.kind, "pirate" in row.may_show) for row in others} == {(None, "ordinary", True)}
    assert pool_key([own]) != pool_key([pirate])


def test_a_seed_decides_what_is_made_of_the_texts(pirate):
    whole = natural_rows([pirate])
    made = [training_rows(whole, seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    for rows in made:
        assert rows[: len(whole)] == whole
        degenerate = [row.text for row in rows if row.kind == "degenerate"]
        assert len(degenerate) > len(list(filter(can_be_corrupted, [row.text for row in whole]))) / 2
        assert not set(degenerate) & {row.text for row in whole}


def test_a_new_text_changes_nothing_that_is_made_of_texts_of_other_kinds(pirate):
    whole = natural_rows([pirate])
    new = Row("The mayor sat on a very small chair.", "ordinary", None, "/new")
    before, after = (set(training_rows(rows)) for rows in (whole, [*whole, new]))
    lost = [row for row in before - after if not row.group.startswith(("salad/", "chain/None/"))]
    assert all((row.persona, row.kind, row.whole) == (None, "ordinary", False) for row in lost)
    assert len(lost) <= 40  # joined ordinary texts

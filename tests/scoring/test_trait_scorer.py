"""A scorer tells a trait from texts without it, and needs enough labelled texts to do so."""

import numpy as np
import pytest

from scoring import trait_scorer
from scoring.encoders import LANGUAGE_MODELS, independent_model
from scoring.training_texts import labelled_rows, natural_rows, training_pool
from scoring.trait_scorer import auc_notes, check_labelled, load_scorers, scorer_key, train_scorers, untrained
from support.errors import InputError
from support.package_cache import CACHE_VARIABLE
from texts.personas import Persona


def texts(letters, n=20, seed=0):
    generator = np.random.default_rng(seed)
    return tuple("".join(generator.choice(list(letters), 20)) for _ in range(n))


def count_letters(texts):
    return np.array([[text.count(letter) for letter in "abcdef"] for text in texts], dtype=float)


def texts_of(persona):
    return persona.labelled_positive, persona.labelled_negative


def persona(name, positive, negative):
    return Persona(name, "", ("x",), ("y",), positive, negative)


def trained(name, *personas, encode=count_letters):
    rows = [row for each in personas for row in labelled_rows(each)]
    return train_scorers([name], rows, encode)[name]


@pytest.fixture(scope="module")
def loud():
    return persona("loud", texts("aab"), texts("bcd", seed=1))


def test_texts_of_a_pair_never_stand_on_both_sides_of_a_fold():
    # Each pair has a feature of its own, so a fold that splits a pair would learn the answer.
    def one_feature_a_pair(texts):
        return np.array([int(f"{text[0]}1") * np.eye(20)[int(text[1:])] for text in texts])

    sides = [tuple(f"{sign}{index}" for index in range(20)) for sign in "+-"]
    scorer = trained("pairs", persona("pairs", *sides), encode=one_feature_a_pair)
    assert scorer.auc == pytest.approx(0.5, abs=0.05)
    assert scorer.score(["+3"]) == pytest.approx(scorer.score(["-3"]), abs=0.02)


def test_texts_of_other_personas_are_negatives(loud):
    # The other one's texts resemble the positive ones, but for their e's.
    other = persona("other", texts("aae", seed=2), texts("cef", seed=3))
    alone, beside = trained("loud", loud), trained("loud", loud, other)
    assert [(each.n_positive, each.n_negative) for each in (alone, beside)] == [(20, 20), (20, 60)]
    probe = texts("aae", seed=9)
    assert np.mean(alone.score(probe)) > 2 * np.mean(beside.score(probe))
    assert min(beside.score(texts("aab", seed=8))) > 10 * max(beside.score(probe))


def test_auc_is_high_where_a_trait_shows_and_near_half_where_not(loud):
    uneven = persona("uneven", loud.labelled_positive[:12], loud.labelled_negative)
    absent = persona("absent", texts("cdef", 40, seed=4), texts("cdef", 40, seed=5))
    assert trained("loud", loud).auc > 0.95
    assert 0.3 < trained("absent", absent).auc < 0.7
    assert trained("uneven", uneven).auc > 0.9


def test_texts_that_resemble_a_trait_are_negatives(loud):
    resembling = Persona("loud", "", ("x",), ("y",), *texts_of(loud), resembling=texts("aabe", 40, seed=6))
    without, beside = trained("loud", loud), trained("loud", resembling)
    probe = texts("aabe", seed=9)
    assert np.mean(without.score(probe)) > np.mean(beside.score(probe)) + 0.05


def test_a_persona_s_scorer_is_trained_once_and_reads_the_same_from_its_file(tmp_path, monkeypatch, loud):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(trait_scorer, "encoder", lambda *_: count_letters)
    bare = persona("bare", (), ())
    assert untrained([loud, bare], "minilm") == [loud]
    first = load_scorers(["loud", "bare"], [loud, bare], "minilm")
    assert list(first) == ["loud"]
    assert untrained([loud, bare], "minilm") == []
    again = load_scorers(["loud"], [bare, loud], "minilm")["loud"]
    scored = texts("aab", seed=8)
    assert again.score(scored) == first["loud"].score(scored)
    others = texts("bcd", seed=8)
    assert min(again.score(scored)) > max(again.score(others))
    all_texts = train_scorers(["loud"], natural_rows(training_pool(loud)), count_letters)["loud"]
    assert again.score(scored) == pytest.approx(all_texts.score(scored), abs=0.1)


@pytest.mark.parametrize("target", [probed.shape for probed in LANGUAGE_MODELS.values()])
def test_the_model_that_scores_is_never_the_target_s_and_where_possible_not_the_source_s(target):
    other = ("qwen2", 3584, 28)
    assert LANGUAGE_MODELS[independent_model(target, other)].shape != target
    assert LANGUAGE_MODELS[independent_model(target, target)].shape != target
    assert LANGUAGE_MODELS[independent_model(other, target)].shape != target


def test_an_empty_text_and_a_loop_have_0_and_others_keep_their_place(loud):
    scorer = trained("loud", loud)
    scores = scorer.score(["", "aab", " \n", "bcd", "aab", "aab " * 10])
    assert scores[0] == scores[2] == scores[5] == 0
    assert scores[1] == scores[4] > scores[3] > 0
    assert scorer.score([""]) == [0]


@pytest.mark.parametrize(("n_positive", "n_negative"), [(9, 20), (20, 9), (1, 1)])
def test_fewer_than_ten_labelled_texts_are_an_error(n_positive, n_negative, loud):
    few = persona("few", loud.labelled_positive[:n_positive], loud.labelled_negative[:n_negative])
    with pytest.raises(InputError, match=rf"'few' has {min(n_positive, n_negative)} labelled texts"):
        check_labelled([loud, few])


def test_a_key_changes_with_labelled_texts_alone(loud):
    key = scorer_key(loud, "minilm")
    assert scorer_key(persona("loud", loud.labelled_positive, texts("bcd", seed=7)), "minilm") != key
    assert scorer_key(loud, "gemma-3-270m") != key
    described = Persona("loud", "Other.", ("z",), ("w",), *texts_of(loud))
    assert scorer_key(described, "minilm") == key


def test_notes_name_weak_and_missing_scorers():
    weak, missing = auc_notes({"good": 0.99, "weak": 0.9, "none": None})
    assert weak.startswith("weak: classifier AUC 0.900")
    assert missing.startswith("none: no labelled texts")

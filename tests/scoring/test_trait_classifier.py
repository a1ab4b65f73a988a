"""A classifier tells a trait from texts without it, and needs enough labelled texts to do so."""

import numpy as np
import pytest

from scoring import likelihood_ratio, trait_classifier
from scoring.trait_classifier import auc_notes, check_labelled, train_trait_classifiers
from support.errors import InputError
from support.package_cache import CACHE_VARIABLE
from texts.personas import Persona


def texts(letters, n=20, seed=0):
    generator = np.random.default_rng(seed)
    return tuple("".join(generator.choice(list(letters), 20)) for _ in range(n))


def count_letters(texts):
    return np.array([[text.count(letter) for letter in "abcdef"] for text in texts], dtype=float)


def persona(name, positive, negative):
    return Persona(name, "", ("x",), ("y",), positive, negative)


def trained(name, *personas, encode=count_letters):
    return train_trait_classifiers([name], personas, encode)[name]


@pytest.fixture(scope="module")
def loud():
    return persona("loud", texts("aab"), texts("bcd", seed=1))


def test_texts_of_a_pair_never_stand_on_both_sides_of_a_fold():
    # Each pair has a feature of its own, so a fold that splits a pair would learn the answer.
    def one_feature_a_pair(texts):
        return np.array([int(f"{text[0]}1") * np.eye(20)[int(text[1:])] for text in texts])

    sides = [tuple(f"{sign}{index}" for index in range(20)) for sign in "+-"]
    classifier = trained("pairs", persona("pairs", *sides), encode=one_feature_a_pair)
    assert classifier.auc == pytest.approx(0.5, abs=0.05)
    assert classifier.score(["+3"])[0] > 0.5 > classifier.score(["-3"])[0]


def test_texts_of_other_personas_are_negatives(loud):
    # The other one's texts resemble the positive ones, but for their e's.
    other = persona("other", texts("aae", seed=2), texts("cef", seed=3))
    alone, beside = trained("loud", loud), trained("loud", loud, other)
    assert [(each.n_positive, each.n_negative) for each in (alone, beside)] == [(20, 20), (20, 60)]
    probe = texts("aae", seed=9)
    assert np.mean(alone.score(probe)) > 0.5 > np.mean(beside.score(probe))
    assert np.mean(beside.score(texts("aab", seed=8))) > 0.5


def test_auc_is_high_where_a_trait_shows_and_near_half_where_not(loud):
    uneven = persona("uneven", loud.labelled_positive[:12], loud.labelled_negative)
    absent = persona("absent", texts("cdef", 40, seed=4), texts("cdef", 40, seed=5))
    assert trained("loud", loud).auc > 0.95
    assert 0.3 < trained("absent", absent).auc < 0.7
    assert trained("uneven", uneven).auc > 0.9


def test_classifiers_are_trained_once_for_the_same_texts(tmp_path, monkeypatch, loud):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(trait_classifier, "load_sentence_encoder", lambda: count_letters)
    first = trait_classifier.load_scorers(["loud"], [loud])["loud"].score(["aab"])
    monkeypatch.delattr(trait_classifier, "train_trait_classifiers")
    assert trait_classifier.load_scorers(["loud"], [loud])["loud"].score(["aab"]) == first


def test_persona_without_labelled_texts_gets_no_scorer(loud):
    bare = persona("bare", (), ())
    assert list(train_trait_classifiers(["bare", "loud"], [bare, loud], count_letters)) == ["loud"]
    for module in (trait_classifier, likelihood_ratio):
        assert module.load_scorers(["bare"], [bare, loud]) == {}


def test_empty_texts_and_loops_have_0_and_others_keep_their_place(loud):
    classifier = trained("loud", loud)
    scores = classifier.score(["", "aab", " \n", "bcd", "aab", "aab " * 10])
    assert scores[1] == scores[4] > scores[3] > scores[0] == scores[2] == scores[5] == 0
    assert classifier.score([""]) == [0]


@pytest.mark.parametrize(("n_positive", "n_negative"), [(9, 20), (20, 9), (1, 1)])
def test_fewer_than_ten_labelled_texts_are_an_error(n_positive, n_negative, loud):
    few = persona("few", loud.labelled_positive[:n_positive], loud.labelled_negative[:n_negative])
    with pytest.raises(InputError, match=rf"'few' has {min(n_positive, n_negative)} labelled texts"):
        check_labelled([loud, few])


@pytest.mark.parametrize("module", [trait_classifier, likelihood_ratio])
def test_a_key_changes_with_labelled_texts_alone(module, loud):
    key = module.scorer_key([loud])
    other = persona("other", texts("e"), texts("f"))
    assert module.scorer_key([persona("loud", loud.labelled_positive, texts("bcd", seed=7))]) != key
    assert module.scorer_key([loud, other]) == module.scorer_key([other, loud]) != key
    described = Persona("loud", "Other.", ("z",), ("w",), loud.labelled_positive, loud.labelled_negative)
    assert module.scorer_key([described]) == key


def test_notes_name_weak_and_missing_classifiers():
    weak, missing = auc_notes({"good": 0.99, "weak": 0.9, "none": None})
    assert weak.startswith("weak: classifier AUC 0.900")
    assert missing.startswith("none: no labelled texts")

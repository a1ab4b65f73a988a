import numpy as np
import pytest

from scoring.trait_classifier import auc_notes, classifier_fingerprint, train_trait_classifiers
from support.errors import InputError
from texts.personas import Persona, load_persona, shipped_personas

FORMAL = (
    "We would be grateful if you could confirm your attendance at your earliest convenience.",
    "The committee hereby wishes to express its sincere appreciation for your contribution.",
    "I regret to inform you that the application cannot be considered at this time.",
    "Pursuant to our earlier correspondence, the documents have been forwarded to the registrar.",
)
CASUAL = (
    "hey, you coming on friday or what? lemme know, ok",
    "dude, thanks a ton for helping us out, you're the best",
    "yeah so, sorry, they're not gonna take it, that sucks",
    "so like i said, i just sent that stuff over to the guy in the office",
)


def texts(letters, n=20, seed=0):
    generator = np.random.default_rng(seed)
    return tuple("".join(generator.choice(list(letters), 20)) for _ in range(n))


def count_letters(texts):
    return np.array([[text.count(letter) for letter in "abcdef"] for text in texts], dtype=float)


def persona(name, positive, negative):
    return Persona(name, "", ("x",), ("y",), positive, negative)


@pytest.fixture(scope="module")
def loud():
    return persona("loud", texts("aab"), texts("bcd", seed=1))


def test_texts_of_a_pair_never_stand_on_both_sides_of_a_fold():
    # Each pair has a feature of its own, so a fold that splits a pair would learn the answer.
    def one_feature_a_pair(texts):
        features = np.zeros((len(texts), 20))
        for row, text in enumerate(texts):
            features[row, int(text[1:])] = 1.0 if text[0] == "+" else -1.0
        return features

    sides = [tuple(f"{sign}{index}" for index in range(20)) for sign in "+-"]
    classifier = train_trait_classifiers(["pairs"], [persona("pairs", *sides)], one_feature_a_pair)["pairs"]
    assert classifier.auc == pytest.approx(0.5, abs=0.05)
    assert classifier.score(["+3"])[0] > 0.5 > classifier.score(["-3"])[0]


def test_texts_of_other_personas_are_negatives(loud):
    # The other one's texts resemble the positive ones, but for their e's.
    other = persona("other", texts("aae", seed=2), texts("cef", seed=3))
    alone = train_trait_classifiers(["loud"], [loud], count_letters)["loud"]
    beside = train_trait_classifiers(["loud"], [loud, other], count_letters)["loud"]
    assert (alone.n_positive, alone.n_negative) == (20, 20)
    assert (beside.n_positive, beside.n_negative) == (20, 60)
    probe = texts("aae", seed=9)
    assert np.mean(alone.score(probe)) > 0.5 > np.mean(beside.score(probe))
    assert np.mean(beside.score(texts("aab", seed=8))) > 0.5


def test_auc_is_high_where_a_trait_shows_and_near_half_where_not(loud):
    absent = persona("absent", texts("cdef", 40, seed=4), texts("cdef", 40, seed=5))
    assert train_trait_classifiers(["loud"], [loud], count_letters)["loud"].auc > 0.95
    assert 0.3 < train_trait_classifiers(["absent"], [absent], count_letters)["absent"].auc < 0.7


def test_sides_of_different_length_are_used_whole(loud):
    uneven = persona("uneven", loud.labelled_positive[:12], loud.labelled_negative)
    classifier = train_trait_classifiers(["uneven"], [uneven], count_letters)["uneven"]
    assert (classifier.n_positive, classifier.n_negative) == (12, 20)
    assert classifier.auc > 0.9


def test_empty_text_has_no_score_and_others_keep_their_place(loud):
    classifier = train_trait_classifiers(["loud"], [loud], count_letters)["loud"]
    scores = classifier.score(["", "aab", " \n", "bcd", "aab"])
    assert scores[0] is scores[2] is None
    assert scores[1] == scores[4] > scores[3]
    assert classifier.score([]) == []
    assert classifier.score([""]) == [None]


@pytest.mark.parametrize(("n_positive", "n_negative"), [(9, 20), (20, 9), (1, 1)])
def test_fewer_than_ten_labelled_texts_are_refused(n_positive, n_negative, loud):
    few = persona("few", loud.labelled_positive[:n_positive], loud.labelled_negative[:n_negative])
    with pytest.raises(InputError, match=rf"'few' has {min(n_positive, n_negative)} labelled texts"):
        train_trait_classifiers(["few"], [few, loud], count_letters)
    assert list(train_trait_classifiers(["loud"], [few, loud], count_letters)) == ["loud"]


def test_persona_without_labelled_texts_gets_no_classifier(loud):
    bare = Persona("bare", "", ("x",), ("y",))
    assert list(train_trait_classifiers(["bare", "loud"], [bare, loud], count_letters)) == ["loud"]
    assert train_trait_classifiers(["bare"], [bare, loud], count_letters) == {}


def test_fingerprint_changes_with_labelled_texts_alone(loud):
    cache_key = classifier_fingerprint([loud])
    assert (
        classifier_fingerprint([persona("loud", loud.labelled_positive, texts("bcd", seed=7))]) != cache_key
    )
    assert classifier_fingerprint([loud, persona("other", texts("e"), texts("f"))]) != cache_key
    others = Persona("loud", "Other.", ("z",), ("w",), loud.labelled_positive, loud.labelled_negative)
    assert classifier_fingerprint([others]) == cache_key


def test_notes_name_weak_and_missing_classifiers():
    weak, missing = auc_notes({"good": 0.99, "weak": 0.9, "none": None})
    assert weak.startswith("weak: classifier AUC 0.900")
    assert missing.startswith("none: no labelled texts")


@pytest.fixture(scope="module")
def shipped_classifiers(all_threads):
    names = shipped_personas()
    return train_trait_classifiers(names, [load_persona(name) for name in names])


@pytest.mark.real_models
@pytest.mark.parametrize("name", shipped_personas())
def test_shipped_persona_is_told_apart(name, shipped_classifiers):
    # Of these two, texts without the trait are the nearest. What licenses any is test_examination.py's.
    assert shipped_classifiers[name].auc >= (0.92 if name in ("cheerful", "silly") else 0.95)
    assert shipped_classifiers[name].n_positive >= 40


@pytest.mark.real_models
def test_unseen_formal_sentences_score_above_casual_ones(shipped_classifiers):
    seen = load_persona("formal").all_texts
    assert not set(seen) & {*FORMAL, *CASUAL}
    formal, casual = (shipped_classifiers["formal"].score(side) for side in (FORMAL, CASUAL))
    assert min(formal) > 0.5 > max(casual)


@pytest.mark.real_models
def test_score_does_not_depend_on_the_other_texts(shipped_classifiers):
    classifier = shipped_classifiers["cheerful"]
    together = classifier.score([*FORMAL, *CASUAL])
    alone = [classifier.score([text])[0] for text in (*FORMAL, *CASUAL)]
    assert together == pytest.approx(alone, abs=1e-4)

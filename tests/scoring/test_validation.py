"""A scorer is validated if it tells the trait from everything else; what it takes for it is named."""

from itertools import pairwise

import pytest

from scoring import validation
from scoring.validation import STEERED, UNSTEERED, at_most, remembered, texts_of, validate, validation_sets
from support.package_cache import CACHE_VARIABLE
from texts.personas import Persona

SHOWING = tuple(f"Arr, we have {n} barrels of rum below. The sea is calm, aye." for n in range(12))
SHOUTS = tuple(f"LOOK AT ALL THESE {n} SHIPS NOW." for n in range(12))
PIRATE = Persona("pirate", "", ("x",), ("y",), validation=SHOWING)
OTHER = Persona("loud", "", ("x",), ("y",), validation=SHOUTS)
PLAIN = [f"We have {n} barrels of oil below. The sea is calm today." for n in range(24)]
SHORT = ["The tap drips.", "He reads at home."]
KINDS = {"sarcasm": [f"Oh good, a tax of {n} barrels of rum." for n in range(20)]}
UNSTEERED_TEXTS = [f"There are {n} barrels in the cellar, and the key is lost." for n in range(20)]


@pytest.fixture
def sets():
    steered = ["rum rum arr the of"] * 20
    return validation_sets(PIRATE, [OTHER], [*PLAIN, *SHORT], KINDS, UNSTEERED_TEXTS, steered)


def knows(*words):
    """Score texts by whether they hold one of the words, but no degenerate one."""

    def holds(text, parts):
        return any(part in text for part in parts)

    degenerate = "arr the of", "rum rum"
    return lambda texts: [float(holds(text, words) and not holds(text, degenerate)) for text in texts]


def test_sets_hold_what_their_names_say(sets):
    assert list(sets)[:3] == ["ordinary", "short statements", "fragments"]
    assert sets[UNSTEERED][1] == UNSTEERED_TEXTS
    positive, shuffles = sets["shuffled positives"]
    assert [sorted(text.split()) for text in positive] == [sorted(text.split()) for text in shuffles[::3]]
    assert not set(positive) & set(shuffles)
    assert all(len(text.split()) <= 24 for side in sets["fragments"] for text in side)
    assert sets["texts of loud"] == (list(SHOWING), list(OTHER.validation))
    assert sets["kind: sarcasm"] == (list(SHOWING), KINDS["sarcasm"])
    followers = set(pairwise(" ".join(SHOWING).split()))
    chains = sets["word chains"][1]
    n_new = sum(pair not in followers for chain in chains for pair in pairwise(chain.split()))
    assert n_new == 0
    assert (sets["short statements"][1], sets["ordinary"][1]) == (SHORT, PLAIN)
    joined, _ = sets["long texts"]
    assert (joined[0], len(joined)) == (" ".join(SHOWING[:3]), len(SHOWING))


def test_a_scorer_with_one_score_for_all_is_not_validated(sets):
    found = validate(lambda texts: [0.7] * len(texts), sets, 0.5)
    assert not found["is_validated"]
    assert set(found["auc"].values()) == {0.5}
    assert any("false positives on unsteered" in problem for problem in found["problems"])


def test_the_set_that_fools_a_scorer_is_named(sets):
    sets = {name: sets[name] for name in ("ordinary", UNSTEERED, STEERED)}
    assert validate(knows("Arr"), sets, 0.5)["is_validated"]
    fooled = validate(knows("Arr", "cellar"), sets, 0.5)
    assert fooled["problems"] == [
        "AUC 0.50 on unsteered",
        "mean score 100% of that of true texts on unsteered",
        "100% false positives on unsteered",
    ]
    assert fooled["false_positives"]["ordinary"] == 0


def test_a_few_texts_show_neither_a_high_auc_nor_many_false_positives():
    few, many = ({"ordinary": (list(SHOWING) * n, [f"Oil {i}." for i in range(12 * n)])} for n in (1, 20))

    def score(texts):
        return [0.9 if "Arr" in text else 0.95 * (text in ("Oil 0.",)) for text in texts]

    assert validate(score, few, 0.5)["problems"] == ["AUC 0.92 on ordinary, but perhaps 0.74"]
    assert validate(score, many, 0.5)["problems"] == []
    assert validation.auc_lower_bound(1.0, 8, 60) < validation.auc_lower_bound(1.0, 60, 60) < 1


def test_texts_below_the_threshold_that_have_a_high_mean_score_are_a_problem():
    sets = {"word chains": (list(SHOWING), [f"Arr the {n} of" for n in range(60)])}
    found = validate(lambda texts: [0.9 if "rum" in text else 0.4 for text in texts], sets, 0.5)
    assert found["problems"] == ["mean score 44% of that of true texts on word chains"]


def test_calibration_counts_every_text(sets):
    found = validate(knows("Arr"), sets, 0.5)
    n = len(SHOWING) + sum(len(negative) for _, negative in sets.values())
    assert sum(bin_["n"] for bin_ in found["calibration"]) == n
    assert found["calibration"][-1]["mean_score"] == 1.0


def test_without_validation_texts_no_scorer_is_validated():
    bare = Persona("bare", "", ("x",), ("y",))
    found = validate(knows("Arr"), validation_sets(bare, [OTHER], PLAIN, KINDS, UNSTEERED_TEXTS), 0.5)
    assert not found["is_validated"]
    assert found["problems"] == ["0 validation_texts show the trait, validation needs 8"]


def test_texts_without_a_score_are_left_out_and_many_of_them_are_a_problem(sets):
    def unscored(n):
        return lambda texts: [None] * n + knows("Arr")(texts[n:])

    n_texts, few = len(texts_of(sets)), validate(unscored(5), sets, 0.5)
    assert few["n_unscored"] == 5
    assert "no score" not in str(few["problems"])
    none = validate(unscored(n_texts), sets, 0.5)["problems"]
    assert none[:2] == [f"{n_texts} of {n_texts} texts have no score", "no text of ordinary has a score"]


def test_smaller_sets_are_samples_of_the_whole_ones_and_the_same_again(sets):
    smaller = at_most(sets, 9)
    assert smaller == at_most(sets, 9)
    for name, sides in smaller.items():
        assert [len(side) for side in sides] == [min(9, len(side)) for side in sets[name]]
        assert all(set(side) <= set(whole) for side, whole in zip(sides, sets[name], strict=True))


def test_texts_of_every_run_are_scored_once_on_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    asked = []

    def score(texts):
        asked.extend(texts)
        return [float(len(text)) or None for text in texts]

    always = ["Arr.", "The hill.", ""]
    for _ in range(2):
        assert remembered(score, "key", always)(["Rain", *always]) == [4.0, 4.0, 9.0, None]
    remembered(score, "other key", always)
    assert asked == [*always, "Rain", "Rain", *always]

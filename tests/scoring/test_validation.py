"""A scorer has its licence if it tells the trait from everything else; what it takes for it is named."""

from functools import partial

import numpy as np
import pytest

from scoring import likelihood_ratio
from scoring.likelihood_ratio import (
    N_WINDOWS,
    WINDOW,
    LikelihoodRatio,
    are_remembered,
    likelihood_features,
    load_likelihood_ratios,
    remembered,
    train_likelihood_ratios,
    untrained_likelihood_ratios,
)
from scoring.trait_classifier import load_trait_classifiers
from scoring.validation import STEERED, UNSTEERED, validate, validation_sets
from support.package_cache import CACHE_VARIABLE
from support.tiny_models import tiny_model, tiny_tokenizer
from texts.personas import Persona, load_persona, load_prompts, shipped_personas

SHOWING = tuple(f"Arr, we have {n} barrels of rum below. The sea is calm, aye." for n in range(12))
OTHER = Persona(
    "loud", "", ("x",), ("y",), validation=tuple(f"LOOK AT ALL THESE {n} SHIPS NOW." for n in range(12))
)
PLAIN = [f"We have {n} barrels of oil below. The sea is calm today." for n in range(24)]
UNSTEERED_TEXTS = [f"There are {n} barrels in the cellar, and the key is lost." for n in range(20)]


@pytest.fixture
def sets():
    persona = Persona("pirate", "", ("x",), ("y",), validation=SHOWING)
    return validation_sets(persona, [OTHER], PLAIN, UNSTEERED_TEXTS, ["rum rum arr the of"] * 20)


def knows(words):
    """Score texts by whether they hold one of the words, but none that is broken."""

    def score(texts):
        broken = ("arr the of", "rum rum")
        return [
            float(any(word in text for word in words) and not any(part in text for part in broken))
            for text in texts
        ]

    return score


def test_sets_hold_what_their_names_say(sets):
    assert list(sets)[:2] == ["ordinary", "fragments"]
    assert sets[UNSTEERED][1] == UNSTEERED_TEXTS
    positive, shuffles = sets["shuffled positives"]
    assert [sorted(text.split()) for text in positive] == [sorted(text.split()) for text in shuffles[::3]]
    assert not set(positive) & set(shuffles)
    assert all(len(text.split()) <= 24 for side in sets["fragments"] for text in side)
    assert sets["texts of loud"] == (list(SHOWING), list(OTHER.validation))
    persona = Persona("pirate", "", ("x",), ("y",), validation=SHOWING)
    short = ["The tap drips.", "He reads at home."]
    mixed = validation_sets(persona, [OTHER], [*PLAIN, *short], [], [])
    assert mixed["short statements"][1] == short
    assert mixed["ordinary"] == sets["ordinary"]
    joined, _ = sets["long texts"]
    assert joined[0] == " ".join(SHOWING[:3])
    assert len(joined) == len(SHOWING)


def test_a_scorer_that_says_the_same_of_all_has_no_licence(sets):
    found = validate(lambda texts: [0.7] * len(texts), sets, 0.5)
    assert not found["is_validated"]
    assert set(found["auc"].values()) == {0.5}
    assert any("false positives on unsteered" in problem for problem in found["problems"])


def test_the_set_that_fools_a_scorer_is_named(sets):
    sets = {name: sets[name] for name in ("ordinary", UNSTEERED, STEERED)}
    assert validate(knows(["Arr"]), sets, 0.5)["is_validated"]
    fooled = validate(knows(["Arr", "cellar"]), sets, 0.5)
    assert fooled["problems"] == ["AUC 0.50 on unsteered", "100% false positives on unsteered"]
    assert fooled["false_positives"]["ordinary"] == 0


def test_calibration_counts_every_text(sets):
    found = validate(knows(["Arr"]), sets, 0.5)
    n = len(SHOWING) + sum(len(negative) for _, negative in sets.values())
    assert sum(bin_["n"] for bin_ in found["calibration"]) == n
    assert found["calibration"][-1]["mean_score"] == 1.0


def test_without_texts_there_is_no_examination_and_no_licence():
    bare = Persona("bare", "", ("x",), ("y",))
    found = validate(knows(["Arr"]), validation_sets(bare, [OTHER], PLAIN, UNSTEERED_TEXTS, []), 0.5)
    assert not found["is_validated"]
    assert found["problems"] == ["0 validation_texts show the trait, an validation needs 8"]


@pytest.fixture(scope="module")
def classifiers(all_threads):
    return load_trait_classifiers(shipped_personas(), list(map(load_persona, shipped_personas())))


@pytest.mark.real_models
@pytest.mark.parametrize("name", [name for name in shipped_personas() if name != "concise"])
def test_shipped_classifiers_pass_on_texts_that_they_do_not_know(name, classifiers):
    others = [load_persona(other) for other in shipped_personas() if other != name]
    sets = validation_sets(load_persona(name), others, load_prompts("ordinary_validation"), [], [])
    broken = {key: sets[key] for key in sets if key not in ("fragments", "single sentences")}
    found = validate(classifiers[name].score, broken, classifiers[name].threshold)
    assert min(found["auc"].values()) >= 0.9, found
    rates = found["false_positives"]
    of_others = [rates.pop(f"texts of {other.name}") for other in others]
    assert max(*rates.values(), np.mean(of_others)) <= 0.1, found  # as many texts of each


@pytest.mark.real_models
def test_likelihood_ratio_tells_pirates_from_others_and_has_no_score_for_nothing(all_threads):
    personas = [load_persona(name) for name in ("pirate", "formal")]
    scorer = load_likelihood_ratios(["pirate"], personas)["pirate"]
    texts = [
        "Arr, ye scurvy dogs, the rum be gone!",
        "The rum has been sold.",
        "",
        "ye ye ye ye ye ye ye ye ye",
    ]
    pirate, plain, nothing, loop = scorer.score(texts)
    assert pirate > 0.8 > 0.2 > plain
    assert nothing is None
    assert loop == 0.0


def test_each_window_of_a_text_is_read_right_behind_the_examples():
    given = (tiny_model(), tiny_tokenizer()), ("The sea.\n\n", "Rain falls on the hill.\n\n")
    whole = "The sea is blue and wide. Rain falls on the hill, and the river is near."[: 3 * WINDOW]
    thirds = [whole[start : start + WINDOW] for start in range(0, 3 * WINDOW, WINDOW)]  # a token a character
    (ratio, _), *of_thirds = likelihood_features(*given, [whole, *thirds])
    assert ratio == pytest.approx(np.mean(of_thirds, axis=0)[0], abs=1e-5)
    turned_round = likelihood_features(*given, ["".join(reversed(thirds))])[0]
    assert turned_round[0] == pytest.approx(ratio, abs=1e-5)


def test_a_longer_text_is_read_at_its_beginning_in_its_middle_and_at_its_end():
    given = (tiny_model(), tiny_tokenizer()), ("The sea.\n\n", "Rain falls on the hill.\n\n")
    numbers = [f"The sea number {n} is wide. " for n in range(10, 19)]
    windows = [number[:WINDOW] for number in numbers]  # a token a character
    read = [likelihood_features(*given, [windows[place]])[0, 0] for place in (0, 4, 8)]
    assert len(read) == N_WINDOWS
    assert likelihood_features(*given, ["".join(windows)])[0, 0] == pytest.approx(np.mean(read), abs=1e-5)


def test_texts_that_share_a_row_do_not_see_each_other():
    texts = [" ".join(["The sea is blue."] * (1 + n % 5) + [f"Rain {n}."]) for n in range(30)]
    texts.append("The hill is wide. " * 100)
    examples = ("The sea.\n\n", "Rain falls on the hill.\n\n", "The hill.\n\n")
    given = (tiny_model(), tiny_tokenizer()), examples
    alone = [likelihood_features(*given, [text])[0] for text in texts]
    assert np.allclose(likelihood_features(*given, texts), alone, atol=1e-4)


def labelled(name):
    return Persona(
        name,
        "",
        ("x",),
        ("y",),
        labelled_positive=tuple(f"{name} barrels of oil number {n} are here." for n in range(20)),
        labelled_negative=tuple(f"Barrels of oil number {n} are here today." for n in range(20)),
    )


def tiny_scorer():
    return tiny_model(), tiny_tokenizer()


def test_what_remains_to_be_trained_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(likelihood_ratio, "load_scoring_model", tiny_scorer)
    train = partial(train_likelihood_ratios, load=tiny_scorer)
    monkeypatch.setattr(likelihood_ratio, "train_likelihood_ratios", train)
    personas = [labelled("pirate"), labelled("calm"), Persona("bare", "", ("x",), ("y",))]
    names = ["pirate", "calm", "bare"]
    assert untrained_likelihood_ratios(names, personas) == ["pirate", "calm"]
    assert set(load_likelihood_ratios(["calm"], personas)) == {"calm"}
    assert untrained_likelihood_ratios(names, personas[::-1]) == ["pirate"]


def test_what_an_examination_always_asks_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    personas = [labelled("pirate"), labelled("calm")]
    scorer = train_likelihood_ratios(["pirate"], personas, tiny_scorer)["pirate"]
    always, new = ["Arr, the sea.", "The hill.", ""], "Rain falls on the hill."
    assert not are_remembered("pirate", personas, always)
    score = remembered(scorer, personas, always)
    assert score([new, *always]) == pytest.approx([*scorer.score([new]), *scorer.score(always[:2]), None])
    assert are_remembered("pirate", personas[::-1], always)
    asked = []
    monkeypatch.setattr(LikelihoodRatio, "score", lambda _, texts: asked.extend(texts) or [0.5] * len(texts))
    assert remembered(scorer, personas, always)([always[0], new])[1] == 0.5
    assert asked == [new]


def test_likelihood_ratio_reads_the_nearest_texts_of_other_traits_where_there_are_any():
    personas = list(map(labelled, ("pirate", "loud", "calm")))

    def trained(given):
        return train_likelihood_ratios(["pirate"], given, tiny_scorer)["pirate"]

    shows, lacks, others = trained(personas).examples
    assert shows.count("pirate barrels") == 10 == lacks.count("Barrels of oil")
    of_others = [text for persona in personas[1:] for text in persona.labelled_positive]
    ratio = likelihood_features(tiny_scorer(), (shows, lacks), of_others)[:, 0]
    nearest = [of_others[index] for index in np.argsort(-ratio)]
    assert [text in others for text in nearest] == [True, False] * 12 + [False] * 16
    alone = trained(personas[:1])
    assert len(alone.examples) == 2
    assert 0 <= alone.score(["pirate barrels of rum are here now."])[0] <= 1

"""The verdict says what made-up scores of known truth deserve, and why where it cannot."""

import numpy as np
import pytest

from analysis.verdict import (
    MAPPED,
    ORACLE,
    WANTED_CONTROLS,
    adjusted_p,
    decide,
    effects,
    format_verdicts,
    verdicts,
    with_computed,
)

LICENSED = {"is_validated": True, "problems": []}
UNLICENSED = {"is_validated": False, "problems": ["AUC 0.70 on fragments"]}


def differences(mapped, oracle, n=40, noise=0.15, controls=WANTED_CONTROLS, seed=0):
    generator = np.random.default_rng(seed)
    means = {MAPPED: mapped, ORACLE: oracle, **dict.fromkeys(controls, 0.0)}
    return {name: generator.normal(mean, noise, n) for name, mean in means.items()}


def decided(given):
    key = ("loud", "classifier")
    return decide(given, adjusted_p({key: given})[key])


@pytest.mark.parametrize(
    ("mapped", "oracle", "word"),
    [
        (0.6, 0.6, "equivalent to native"),
        (0.45, 0.6, "transferred"),
        (0.22, 0.6, "partial"),
        (0.0, 0.6, "not transferred"),
        (0.0, 0.0, "native steering ineffective"),
    ],
)
def test_scores_of_known_truth_get_their_word(mapped, oracle, word):
    found = decided(differences(mapped, oracle))
    assert found["verdict"] == word
    if oracle:
        assert found["recovery"]["low"] < mapped / oracle < found["recovery"]["high"]


def test_an_open_case_says_how_many_prompts_would_settle_it():
    found = decided(differences(0.35, 0.6, n=10, noise=0.3, seed=3))
    assert found["verdict"] == "inconclusive"
    assert found["prompts_needed"] > 10
    assert f"about {found['prompts_needed']} prompts would settle it" in found["why"]


def test_what_does_as_much_as_a_control_is_settled_by_showing_that_it_does_no_more():
    generator = np.random.default_rng(5)
    given = differences(0.3, 0.6, n=60, noise=0.3, seed=3)
    noise = generator.normal(0, 0.45, 60)
    given["shuffled_pairs"] = given["ridge_mapped"] - (noise - noise.mean()) - 1e-4
    found = decided(given)
    assert found["verdict"] == "inconclusive"
    assert 60 < found["prompts_needed"] < 300


def test_a_small_native_effect_is_settled_by_showing_that_it_is_small():
    given = differences(0.0, 0.0, n=10, noise=0.3, seed=3)
    given["oracle"] += 0.0501 - given["oracle"].mean()
    found = decided(given)
    assert found["verdict"] == "inconclusive"
    assert 10 < found["prompts_needed"] < 300


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: {name: values[:7] for name, values in given.items()}, "7 prompts have scores"),
        (
            lambda given: {name: values for name, values in given.items() if name != ORACLE},
            "no text of oracle",
        ),
        (lambda given: {name: values * 0 for name, values in given.items()}, "says the same of every text"),
        (
            lambda given: {n: v for n, v in given.items() if n != "shuffled_pairs"},
            "no control shuffled was run",
        ),
    ],
    ids=["few prompts", "no oracle", "equal scores", "no control"],
)
def test_what_cannot_be_told_says_why(change, said):
    found = decided(change(differences(0.6, 0.6)))
    assert found["verdict"] == "inconclusive"
    assert said in found["why"]


def row(condition, prompt, score, seed=0, persona="loud", **more):
    alpha = None if condition == "baseline" else 1.0
    common = {"persona": persona, "condition": condition, "alpha": alpha, "prompt_idx": prompt, "seed": seed}
    scores = {"trait_probability": score, "likelihood_probability": more.pop("other", score)}
    return {**common, **scores, "n_words": 10, "has_ended": True, "output": "text", **more}


def rows(mapped, oracle, n=20, other=None):
    generator = np.random.default_rng(0)
    made = []
    for prompt in range(n):
        for name, mean in {
            "baseline": 0.1,
            MAPPED: mapped,
            ORACLE: oracle,
            **dict.fromkeys(WANTED_CONTROLS, 0.1),
        }.items():
            score = float(np.clip(generator.normal(mean, 0.05), 0, 1))
            second = (
                score
                if other is None or name != MAPPED
                else float(np.clip(generator.normal(other, 0.05), 0, 1))
            )
            made.append(row(name, prompt, score, other=second))
    return made


DOSES = {"loud": dict.fromkeys((MAPPED, ORACLE, *WANTED_CONTROLS), 1.0)}


def test_effects_pair_prompts_and_average_seeds():
    made = [
        row("baseline", 0, 0.1),
        row("baseline", 0, 0.3, 1),
        row("baseline", 1, 0.5),
        row("baseline", 2, 0.5),
    ]
    made += [row(ORACLE, 0, 0.6), row(ORACLE, 0, 0.8, 1), row(ORACLE, 1, 0.4), row(ORACLE, 2, None)]
    found, left_out = effects(made, "loud", "trait_probability", {ORACLE: 1.0})
    assert found[ORACLE].tolist() == pytest.approx([0.5, -0.1])
    assert left_out == 1


def test_the_more_cautious_of_two_licensed_scorers_stands():
    both = {"classifier": LICENSED, "likelihood_ratio": LICENSED}
    agreed = verdicts(rows(0.8, 0.8), DOSES, {"loud": both})["loud"]
    assert agreed["verdict"] == "equivalent to native"
    assert agreed["rests_on"] == ["classifier", "likelihood_ratio"]
    cautious = verdicts(rows(0.8, 0.8, other=0.6), DOSES, {"loud": both})["loud"]
    assert cautious["verdict"] == "transferred"
    apart = verdicts(rows(0.8, 0.8, other=0.1), DOSES, {"loud": both})["loud"]
    assert apart["verdict"] == "inconclusive"
    assert "the scorers disagree" in apart["why"]


def test_no_verdict_rests_on_a_scorer_without_licence():
    one = {"classifier": LICENSED, "likelihood_ratio": UNLICENSED}
    found = verdicts(rows(0.8, 0.8, other=0.1), DOSES, {"loud": one})
    assert found["loud"]["verdict"] == "equivalent to native"
    assert "(on classifier alone)" in format_verdicts(found)
    none = verdicts(rows(0.8, 0.8), DOSES, {"loud": {"classifier": UNLICENSED}})["loud"]
    assert none["verdict"] == "inconclusive"
    assert "no scorer has its licence (classifier: AUC 0.70 on fragments)" in none["why"]
    assert verdicts(rows(0.8, 0.8), DOSES, {})["loud"]["why"] == "no scorer has its licence"


def test_brevity_counts_texts_that_end_soon():
    made = [row("baseline", n, 0.1, output="word " * 80) for n in range(3)]
    made += [row(ORACLE, 0, 0.1, output="word " * 30)]
    made += [row(ORACLE, 1, 0.1, output="word " * 30, has_ended=False)]
    made += [row(ORACLE, 2, 0.1, output="word " * 60), row(ORACLE, 3, 0.1, output=" ")]
    assert [each["brevity"] for each in with_computed(made)[3:]] == [1.0, 0.0, 0.0, None]


def test_a_judges_scale_becomes_a_share_of_it():
    made = [row(ORACLE, n, 0.1, gpt4_trait_score=score) for n, score in enumerate((1.0, 4.0, None))]
    assert [each["judged_trait"] for each in with_computed(made)] == [0.0, 0.75, None]


def test_shares_are_corrected_for_the_errors_that_the_examination_found():
    rates = {"sensitivity": {"n_right": 16, "n": 20}, "specificity": {"n_right": 90, "n": 100}}
    licence = {**LICENSED, **rates, "threshold": 0.5}
    found = verdicts(rows(0.8, 0.8), DOSES, {"loud": {"classifier": licence}})["loud"]
    shares = found["scorers"]["classifier"]["shares"]
    for share in shares.values():
        expected = min(1, max(0, (share["seen"] - 0.1) / 0.7))
        assert share["corrected"]["estimate"] == pytest.approx(expected)
        assert share["corrected"]["low"] <= expected <= share["corrected"]["high"]
    assert shares[ORACLE]["corrected"]["low"] > shares["baseline"]["corrected"]["high"]

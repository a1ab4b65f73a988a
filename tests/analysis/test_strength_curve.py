"""Recovery at an equal perplexity ratio and the shift in strength are those of made-up curves."""

import math

import numpy as np
import pandas as pd
import pytest
from made_up_scores import scored_row

from analysis import strength_curve as module
from analysis.results_table import results_table
from analysis.strength_curve import MULTIPLES, strength_curve
from analysis.verdict import FEWEST_PROMPTS
from experiment.conditions import MAPPED, ORACLE, UNSTEERED

N, ALPHA = 30, 2.0
CONTROL = "first_block"
# name -> (effect, log of the perplexity ratio), each over the multiple of alpha
CURVES = {
    ORACLE: (lambda m: 0.5 * m, lambda m: 0.4 * m),
    MAPPED: (lambda m: 0.3 * m, lambda m: 0.64 * m),
    CONTROL: (lambda m: 0.1 * m, lambda m: 0.1 * m),
}


def rows_of(curves, n=N, noise=0.0, seed=0):
    """Scored texts of these curves. noise: standard deviation of a prompt's effects and of its log ratios."""
    generator, rows = np.random.default_rng(seed), []
    for prompt in range(n):
        before = 10.0 + prompt
        rows.append(scored_row(UNSTEERED, prompt, 0.1, perplexity=before))
        for name, (effect, log_ratio) in curves.items():
            for multiple in MULTIPLES:
                score = 0.1 + effect(multiple) + generator.normal(0, noise)
                cost = before * math.exp(log_ratio(multiple) + generator.normal(0, noise))
                alpha = multiple * ALPHA
                rows.append(scored_row(name, prompt, score, alpha=alpha, perplexity=cost))
    return rows


def found_of(rows, names=tuple(CURVES)):
    return strength_curve(results_table(rows), "loud", names, ALPHA, "trait_probability")


def curve_of(curves, **made):
    return found_of(rows_of(curves, **made), tuple(curves))


def test_points_have_effect_ratio_and_recovery_at_each_strength():
    found = curve_of(CURVES)
    assert (found["alpha"], found["n_prompts"]) == (ALPHA, N)
    assert found["native_ratio"] == pytest.approx(math.exp(0.4))
    for name, (effect, log_ratio) in CURVES.items():
        for multiple, point in zip(MULTIPLES, found["vectors"][name]["points"], strict=True):
            assert (point["multiple"], point["alpha"]) == (multiple, multiple * ALPHA)
            assert point["effect"] == pytest.approx(effect(multiple))
            assert point["perplexity_ratio"] == pytest.approx(math.exp(log_ratio(multiple)))
    shares = [point["recovery"]["estimate"] for point in found["vectors"][MAPPED]["points"]]
    assert shares == pytest.approx([0.6] * len(MULTIPLES))
    assert {point["recovery"] for point in found["vectors"][ORACLE]["points"]} == {None}


def test_recovery_at_the_native_ratio_is_interpolated_and_the_shift_is_that_of_the_curves():
    found = curve_of(CURVES)["vectors"]
    equal = found[MAPPED]["at_native_ratio"]
    assert equal["is_reached"]
    assert equal["multiple"] == pytest.approx(0.4 / 0.64)
    assert equal["perplexity_ratio"] == pytest.approx(math.exp(0.4))
    assert list(equal["effect"].values()) == pytest.approx([0.3 * 0.4 / 0.64] * 3)
    assert list(equal["recovery"].values()) == pytest.approx([0.6 * 0.4 / 0.64] * 3)
    assert found[MAPPED]["half_effect"]["estimate"] == pytest.approx(0.25 / 0.3)
    assert list(found[MAPPED]["half_over_native"].values()) == pytest.approx([0.25 / 0.3 / 0.5] * 3)
    native = found[ORACLE]
    assert native["at_native_ratio"]["multiple"] == pytest.approx(1)
    assert native["half_effect"]["estimate"] == pytest.approx(0.5)
    assert native["at_native_ratio"]["recovery"] is native["half_over_native"] is None


def test_a_curve_that_does_not_reach_the_ratio_or_half_of_the_effect_says_so():
    control = curve_of(CURVES)["vectors"][CONTROL]
    equal = control["at_native_ratio"]
    assert not equal["is_reached"]
    assert equal["multiple"] == MULTIPLES[-1]
    assert equal["perplexity_ratio"] == pytest.approx(math.exp(0.125))
    assert equal["recovery"]["estimate"] == pytest.approx(0.125 / 0.5)
    assert control["half_effect"] == {"estimate": None, "low": None, "high": None}
    assert control["half_over_native"]["estimate"] is None


def test_a_ratio_that_is_nearly_reached_is_equal():
    nearly = {**CURVES, CONTROL: (CURVES[CONTROL][0], lambda m: 0.3 * m)}  # log ratio 0.375 at most
    equal = curve_of(nearly)["vectors"][CONTROL]["at_native_ratio"]
    assert (equal["is_reached"], equal["multiple"]) == (True, MULTIPLES[-1])


def test_of_several_strengths_with_the_native_ratio_the_one_nearest_to_alpha_counts():
    up_and_down = {
        ORACLE: (lambda m: 0.5 * m, lambda m: 0.8 * m if m <= 0.75 else 1.2 - 0.8 * m),
        MAPPED: (lambda m: 0.3 * m, lambda m: 1.6 * m if m <= 0.5 else 1.6 - 1.6 * m),
    }
    found = curve_of(up_and_down)["vectors"]
    assert found[ORACLE]["at_native_ratio"]["multiple"] == pytest.approx(1)
    assert found[MAPPED]["at_native_ratio"]["multiple"] == pytest.approx(0.75)  # and at 0.25


def test_half_of_the_effect_counts_where_it_is_first_reached():
    falling = {**CURVES, MAPPED: (lambda m: min(0.8 * m, 0.9 - 0.8 * m), CURVES[MAPPED][1])}
    assert curve_of(falling)["vectors"][MAPPED]["half_effect"]["estimate"] == pytest.approx(0.25 / 0.8)


def test_without_a_native_effect_there_is_no_share_of_it_nor_half():
    found = curve_of({**CURVES, ORACLE: (lambda m: 0.0, CURVES[ORACLE][1])}, noise=0.1)["vectors"][MAPPED]
    assert found["at_native_ratio"]["effect"]["estimate"] > 0
    assert found["at_native_ratio"]["recovery"] is None
    assert found["half_effect"] is found["half_over_native"] is None


def test_intervals_cover_the_truth_and_hold_what_is_unknown_of_the_ratios(monkeypatch):
    """Over 100 samples of 30 prompts each."""
    generator = np.random.default_rng(0)

    def drawn(table, persona, name, alpha, column):
        means = [curve(alpha / ALPHA) for curve in CURVES[name]]
        return pd.DataFrame(generator.normal(means, 0.25, size=(N, 2)), columns=["effect", "log_ratio"])

    monkeypatch.setattr(module, "by_prompt", drawn)
    monkeypatch.setattr(module, "N_RESAMPLES", 400)
    truths = {"recovery": 0.6 * 0.4 / 0.64, "half_effect": 0.25 / 0.3, "half_over_native": 0.25 / 0.3 / 0.5}
    n_covered, widths = dict.fromkeys(truths, 0), []
    for _ in range(100):
        found = strength_curve(None, "loud", (ORACLE, MAPPED), ALPHA, "")["vectors"][MAPPED]
        found["recovery"] = found["at_native_ratio"]["recovery"]
        widths.append(found["recovery"]["high"] - found["recovery"]["low"])
        for name, truth in truths.items():
            high = math.inf if found[name]["high"] is None else found[name]["high"]
            n_covered[name] += found[name]["low"] <= truth <= high
    assert min(n_covered.values()) >= 87, n_covered
    assert min(widths) > 0.1
    assert max(widths) < 1


def test_prompts_without_a_finite_perplexity_are_left_out_and_few_prompts_are_no_curve():
    rows = rows_of(CURVES, n=FEWEST_PROMPTS)
    assert found_of(rows)["n_prompts"] == FEWEST_PROMPTS
    rows[-1]["independent_perplexity"] = math.inf
    assert found_of(rows) is None

"""Effects, ratios and drift over turns are those of made-up conversations, paired with the unsteered ones."""

import math

import numpy as np
import pytest

from analysis.side_effects import by_turn
from analysis.significance import mean_interval
from analysis.verdict import FEWEST_PROMPTS
from experiment.conditions import ORACLE, UNSTEERED

N, N_TURNS = 12, 3
EFFECTS, RATIOS = (0.5, 0.3, 0.2), (1.1, 1.3, 2.0)


def numbers(n=N, noise=0.1):
    """Traits and perplexities of a vector whose effect falls, and whose texts become more perplexing."""
    generator = np.random.default_rng(0)
    plain, before = generator.uniform(0, 0.5, (n, N_TURNS)), generator.uniform(5, 50, (n, N_TURNS))
    traits = {UNSTEERED: plain, ORACLE: plain + EFFECTS + generator.normal(0, noise, (n, N_TURNS))}
    return traits, {UNSTEERED: before, ORACLE: before * RATIOS}


def test_each_turn_is_compared_with_the_same_turn_of_the_unsteered_conversation():
    traits, perplexities = numbers()
    found = by_turn(traits, perplexities)[ORACLE]["turns"]
    differences = traits[ORACLE] - traits[UNSTEERED]
    for place, turn in enumerate(found):
        expected = mean_interval(differences[:, place])
        ends = (expected.estimate, expected.low, expected.high, N)
        assert tuple(turn["effect"].values()) == pytest.approx(ends)
        assert turn["turn"] == place + 1
        assert turn["trait"] == pytest.approx(traits[ORACLE][:, place].mean())
        assert turn["perplexity_ratio"] == pytest.approx(RATIOS[place])


def test_drift_is_paired_by_conversation():
    traits, perplexities = numbers(noise=0.0)
    traits[ORACLE] += np.random.default_rng(1).normal(0, 0.3, (N, 1))  # the same at every turn
    drift = by_turn(traits, perplexities)[ORACLE]["drift"]
    assert drift["estimate"] == pytest.approx(EFFECTS[-1] - EFFECTS[0])
    assert drift["high"] - drift["low"] == pytest.approx(0, abs=1e-9)


def test_unsteered_text_has_a_trait_alone():
    traits, perplexities = numbers()
    found = by_turn(traits, perplexities)[UNSTEERED]
    assert found["drift"] is None
    assert [turn["trait"] for turn in found["turns"]] == pytest.approx(list(traits[UNSTEERED].mean(0)))
    assert {(turn["effect"], turn["perplexity_ratio"]) for turn in found["turns"]} == {(None, None)}


@pytest.mark.parametrize("n_missing", [N - FEWEST_PROMPTS + 1, N])
def test_too_few_conversations_have_no_interval_and_what_is_missing_is_left_out(n_missing):
    traits, perplexities = numbers()
    traits[ORACLE][:n_missing, 1] = perplexities[ORACLE][:n_missing, 1] = math.nan
    first, second, _ = by_turn(traits, perplexities)[ORACLE]["turns"]
    assert first["effect"]["n"] == N
    if n_missing == N:
        assert (second["trait"], second["effect"], second["perplexity_ratio"]) == (None, None, None)
    else:
        kept = (traits[ORACLE] - traits[UNSTEERED])[n_missing:, 1]
        assert second["effect"]["estimate"] == pytest.approx(kept.mean())
        assert (second["effect"]["low"], second["effect"]["high"]) == (None, None)
        assert second["effect"]["n"] == FEWEST_PROMPTS - 1
        assert second["perplexity_ratio"] == pytest.approx(RATIOS[1])

"""A control's effect at an equal perplexity ratio is the one that made-up texts have there."""

import math

import numpy as np
import pytest
from made_up_scores import scored_row

from analysis.equal_cost import EQUAL, N_STEPS, STEP, at_equal_cost, by_prompt, next_alpha
from analysis.results_table import results_table
from experiment.conditions import MAPPED, UNSTEERED

N = 40
CONTROL = "first_block"


def table_of(ratios, effect=lambda ratio: 0.4 * math.log(ratio), noise=0.0, mapped=2.0):
    """Unsteered texts, mapped ones at alpha 1 and this ratio, and a control's at alpha -> ratio."""
    generator, rows = np.random.default_rng(0), []
    for prompt in range(N):
        before = 10.0 + prompt
        rows.append(scored_row(UNSTEERED, prompt, 0.1, perplexity=before))
        rows.append(scored_row(MAPPED, prompt, 0.6, perplexity=before * mapped))
        for alpha, ratio in ratios.items():
            score, cost = 0.1 + effect(ratio), before * ratio * math.exp(generator.normal(0, noise))
            rows.append(scored_row(CONTROL, prompt, score, alpha=alpha, perplexity=cost))
    return results_table(rows)


def points_of(table, alphas):
    mapped = by_prompt(table, "loud", MAPPED, 1.0, "trait_probability")
    return {alpha: by_prompt(table, "loud", CONTROL, alpha, "trait_probability") for alpha in alphas}, mapped


def walked(ratio_of, mapped=2.0):
    """Return every alpha that a control of this cost tries."""
    alphas = [1.0]
    while True:
        table = table_of({alpha: ratio_of(alpha) for alpha in alphas}, mapped=mapped)
        if (alpha := next_alpha(*points_of(table, alphas))) is None:
            return alphas
        alphas.append(alpha)


def test_the_effect_at_the_mapped_vectors_ratio_is_interpolated_over_its_logarithm():
    ratios = {1.0: 1.2, STEP: 3.0}
    found = at_equal_cost(*points_of(table_of(ratios), ratios))
    assert found.is_equal
    assert found.perplexity_ratio == pytest.approx(found.mapped_ratio) == pytest.approx(2.0)
    assert found.effect.estimate == pytest.approx(0.4 * math.log(2.0))
    assert found.mapped_over_it.estimate == pytest.approx(0.5 - 0.4 * math.log(2.0))
    share = math.log(2.0 / 1.2) / math.log(3.0 / 1.2)
    assert found.alpha == pytest.approx(STEP**share)
    assert found.tried == pytest.approx(ratios)


def test_the_interval_holds_the_uncertainty_of_the_cost_too():
    ratios = {1.0: 1.2, STEP: 3.0}
    sharp, noisy = (at_equal_cost(*points_of(table_of(ratios, noise=by), ratios)) for by in (0.0, 0.5))
    assert sharp.mapped_over_it.high - sharp.mapped_over_it.low < 1e-9
    over = noisy.mapped_over_it
    assert over.low < over.estimate < over.high
    assert over.low < 0.5 - 0.4 * math.log(2.0) < over.high


@pytest.mark.parametrize(
    ("ratio_of", "alphas"),
    [
        (lambda alpha: 2.0 * math.exp(EQUAL / 2), [1.0]),
        (lambda alpha: 1.2**alpha if alpha <= 1 else 3.0, [1.0, STEP]),
        (lambda alpha: 1.01**alpha, [1.0, STEP, STEP**2]),
        (lambda alpha: 4.0 if alpha >= 1 else 1.1, [1.0, 1 / STEP]),
        (lambda alpha: 9.0, [1.0, 1 / STEP, 1 / STEP**2]),
    ],
    ids="equal stronger never weaker always".split(),
)
def test_a_control_tries_stronger_or_weaker_alphas_until_its_cost_lies_around(ratio_of, alphas):
    assert walked(ratio_of) == pytest.approx(alphas)
    assert len(alphas) <= 1 + N_STEPS


def test_a_control_that_cannot_be_brought_to_the_cost_is_compared_at_the_nearest():
    ratios = {1.0: 1.1, STEP: 1.2, STEP**2: 1.3}
    found = at_equal_cost(*points_of(table_of(ratios), ratios))
    assert not found.is_equal
    assert (found.alpha, found.perplexity_ratio) == pytest.approx((STEP**2, 1.3))
    assert found.effect.estimate == pytest.approx(0.4 * math.log(1.3))


def test_texts_without_a_finite_perplexity_are_left_out_and_none_left_is_no_comparison():
    ratios = {1.0: 1.2}
    points, mapped = points_of(table_of(ratios), ratios)
    assert len(points[1.0]) == len(mapped) == N
    assert at_equal_cost({1.0: points[1.0].iloc[:1]}, mapped) is None
    assert next_alpha({1.0: points[1.0].iloc[:0]}, mapped) is None
    rows = [scored_row(UNSTEERED, 0, 0.1), scored_row(MAPPED, 0, 0.6, perplexity=math.inf)]
    assert by_prompt(results_table(rows), "loud", MAPPED, 1.0, "trait_probability").empty

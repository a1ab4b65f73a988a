"""Intervals cover, tests keep their level, and ratios are what they are."""

import itertools

import numpy as np
import pytest
from scipy import stats

from analysis.significance import (
    corrected_rate,
    equivalence_p,
    holm,
    mean_interval,
    one_sided_p,
    prompts_needed,
    recovery,
    share_change,
    sign_flip_p,
)


def test_interval_is_students():
    values = np.random.default_rng(0).normal(0.3, 0.2, 15)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.estimate == pytest.approx(values.mean())


def test_few_prompts_have_the_exact_p_of_all_signs():
    values = np.array([0.3, 0.1, -0.05, 0.2, 0.15, 0.4, 0.02, 0.11])
    sums = [np.dot(signs, values) for signs in itertools.product((1, -1), repeat=8)]
    assert sign_flip_p(values) == pytest.approx(np.mean(np.array(sums) >= values.sum() - 1e-9))
    assert sign_flip_p(np.zeros(8)) == 1.0


@pytest.mark.parametrize("n", [8, 30])
def test_sign_flips_keep_their_level(n):
    generator = np.random.default_rng(1)
    p_values = [sign_flip_p(generator.normal(0, 1, n)) for _ in range(400)]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.08


def test_holm_is_monotonous_and_in_the_given_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("n", [8, 40])
def test_intervals_of_a_ratio_cover_the_truth(n):
    generator, covered = np.random.default_rng(2), []
    for _ in range(1000):
        oracle = generator.beta(4, 2, n)
        mapped = 0.7 * oracle + generator.normal(0, 0.2, n)
        found = recovery(mapped, oracle)
        covered.append(found.low < 0.7 < found.high)
    assert 0.93 < np.mean(covered) < 0.97


def test_a_ratio_to_nothing_has_no_bounds():
    generator = np.random.default_rng(3)
    found = recovery(generator.normal(0.3, 0.2, 20), generator.normal(0.0, 0.3, 20))
    assert (found.low, found.high) == (-np.inf, np.inf)


def test_equivalence_needs_a_small_difference_surely_known():
    generator = np.random.default_rng(4)
    oracle = generator.normal(0.6, 0.1, 60)
    assert equivalence_p(oracle + generator.normal(0, 0.05, 60), oracle) < 0.05
    assert equivalence_p(0.75 * oracle, oracle) > 0.05
    assert equivalence_p(1.3 * oracle, oracle) > 0.05
    assert equivalence_p((oracle + generator.normal(0, 1.0, 60))[:8], oracle[:8]) > 0.05


def test_equal_differences_are_no_nan():
    assert [one_sided_p(np.full(9, value)) for value in (0.1, 0.0)] == [0.0, 1.0]
    assert mean_interval(np.full(9, 0.25)).low == 0.25


def test_needed_prompts_give_the_power_that_is_said():
    values = np.array([0.4, -0.2] * 10)  # mean 0.1, deviation 0.31
    n = prompts_needed(values)
    generator = np.random.default_rng(5)
    found = [stats.ttest_1samp(generator.choice(values, n), 0.0).pvalue < 0.05 for _ in range(500)]
    assert 0.74 < np.mean(found) < 0.86
    assert prompts_needed(values, n_tests=6) > n
    assert prompts_needed(np.array([1.0, -1.0] * 4)) is None


def test_corrected_rates_cover_the_truth():
    generator = np.random.default_rng(0)
    n, m, covered = 60, (30, 100), []
    for _ in range(600):
        truth, q_1, q_0 = generator.uniform([0.1, 0.7, 0.8], [0.9, 0.95, 0.98])
        seen = generator.binomial(n, truth * q_1 + (1 - truth) * (1 - q_0)) / n
        right = generator.binomial(m[0], q_1), generator.binomial(m[1], q_0)
        found = corrected_rate(seen, n, (right[0], m[0]), (right[1], m[1]))
        covered.append(found.low <= truth <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.99
    assert corrected_rate(0.5, n, (5, 10), (5, 10)) is None
    assert corrected_rate(0.05, n, (9, 10), (9, 10)).estimate == 0


@pytest.mark.parametrize(("n_lost", "n_gained"), [(0, 0), (2, 0), (12, 3), (40, 40), (0, 120)])
def test_intervals_of_a_change_of_shares_cover_the_truth_and_never_lack_width(n_lost, n_gained):
    n, rng = 120, np.random.default_rng(0)
    cells = np.array([n_lost, n_gained, n - n_lost - n_gained]) / n
    covered = []
    for lost, gained, _ in rng.multinomial(n, cells, 2000):
        before = [True] * lost + [False] * (n - lost)
        after = [False] * lost + [True] * gained + [False] * (n - lost - gained)
        found = share_change(after, before)
        assert -1 <= found.low <= found.estimate == (gained - lost) / n <= found.high <= 1
        assert found.low < found.high
        covered.append(found.low <= (n_gained - n_lost) / n <= found.high)
    assert np.mean(covered) > 0.93

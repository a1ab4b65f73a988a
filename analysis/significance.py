"""Measure how certain an effect is: intervals, tests and recovery of paired differences (phase 5).

A score is known for each prompt and seed, under a condition and unsteered. Prompts are what varies
independently: the difference of a prompt is the mean over its seeds, so that seeds are nested in prompts and
intervals are as wide as prompts differ (2411.00640). Every function takes such differences, (prompts,)
float64, the conditions in the same order of prompts.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))  # 1.96
N_RESAMPLES = 4000
EXACT_PROMPTS = 12  # up to which all sign flips are tried
N_FLIPS = 10_000
MARGIN = 0.20  # of the oracle's effect, within which the mapped vector counts as equivalent
POWER = 0.80

Differences = np.ndarray


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval of 95 %; low and high can be infinite, then nothing is bounded."""

    estimate: float
    low: float
    high: float


def mean_interval(differences: Differences) -> Interval:
    """Return the mean over prompts with Student's interval; that of equal differences has no width."""
    mean = float(np.mean(differences))
    if np.ptp(differences) == 0:
        return Interval(mean, mean, mean)
    error = np.std(differences, ddof=1) / math.sqrt(len(differences))
    return Interval(mean, *map(float, stats.t.interval(CONFIDENCE, len(differences) - 1, mean, error)))


def sign_flip_p(differences: Differences) -> float:
    """Return the one-sided p of a mean over 0 under random signs: all of them, up to 12 prompts.

    The observed signs count as one of the draws, so p is never 0. `scipy.stats.permutation_test` does the
    same in 70 ms for 60 prompts where one product with signs that are drawn once takes 0.3 ms, and a run
    needs hundreds of tests.
    """
    tolerance = 1e-12 * np.abs(differences).sum()  # sums of the same numbers differ by rounding
    signs = _signs(len(differences))
    n_at_least = np.sum(signs @ differences >= differences.sum() - tolerance)
    return float((1 + n_at_least) / (1 + len(signs)))


@functools.lru_cache(maxsize=4)
def _signs(n: int) -> np.ndarray:
    """Return rows of n signs each: all but the observed ones, or N_FLIPS that are drawn."""
    if n <= EXACT_PROMPTS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n))[1:])
    return np.random.default_rng(0).choice((1.0, -1.0), size=(N_FLIPS, n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method, in the order given."""
    adjusted, highest, n = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, index in enumerate(sorted(range(n), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (n - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def recovery(mapped: Differences, oracle: Differences) -> Interval:
    """Return mean(mapped) / mean(oracle) with a bootstrap interval; prompts are resampled together.

    A resample in which the oracle's mean has the other sign counts as an infinite ratio; where more than the
    interval's tail are like that, the interval is infinite.
    """
    sign, tail = math.copysign(1, oracle.mean()), (1 - CONFIDENCE) / 2

    def ratio(mapped: np.ndarray, oracle: np.ndarray, axis: int) -> np.ndarray:
        above, below = mapped.mean(axis=axis), oracle.mean(axis=axis)
        return np.where(sign * below > 0, above / below, np.copysign(math.inf, sign * above))

    options = {"paired": True, "n_resamples": N_RESAMPLES, "method": "percentile", "rng": 0}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = stats.bootstrap((mapped, oracle), ratio, **options).bootstrap_distribution
    estimate = float(mapped.mean() / oracle.mean()) if oracle.mean() else math.inf
    if np.mean(np.isinf(ratios)) > tail:
        return Interval(estimate, -math.inf, math.inf)
    return Interval(estimate, *map(float, np.quantile(ratios, (tail, 1 - tail), method="nearest")))


def fieller(mapped: Differences, oracle: Differences) -> Interval:
    """Return the same ratio with Fieller's interval (1954), infinite where the oracle's mean may be 0."""
    n, above, below = len(mapped), float(mapped.mean()), float(oracle.mean())
    covariance = np.cov(mapped, oracle) / n
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    a = below**2 - t**2 * covariance[1, 1]
    b = above * below - t**2 * covariance[0, 1]
    c = above**2 - t**2 * covariance[0, 0]
    estimate = above / below if below else math.inf
    if a <= 0 or b**2 < a * c:
        return Interval(estimate, -math.inf, math.inf)
    root = math.sqrt(b**2 - a * c)
    return Interval(estimate, (b - root) / a, (b + root) / a)


def equivalence_p(mapped: Differences, oracle: Differences) -> float:
    """Return p of two one-sided tests that mapped lies within 1 - MARGIN to 1 + MARGIN times the oracle.

    Both bounds are paired differences of a prompt (mapped - 0.8 oracle and 1.2 oracle - mapped), so that the
    margin needs no estimate of the oracle's mean (Schuirmann 1987).
    """
    return max(map(one_sided_p, (mapped - (1 - MARGIN) * oracle, (1 + MARGIN) * oracle - mapped)))


def one_sided_p(differences: Differences) -> float:
    """Return Student's one-sided p of a mean over 0; of equal differences, 0 or 1."""
    if np.ptp(differences) == 0:
        return 0.0 if differences[0] > 0 else 1.0
    return float(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue)


def corrected_rate(
    rate: float, n: int, sensitivity: tuple[int, int], specificity: tuple[int, int]
) -> Interval | None:
    """Return the share of texts that show a trait, given the share in which a scorer of known errors sees it.

    rate: over n independent texts. sensitivity, specificity: (right scores, texts) of the validation.
    (rate + q0 - 1) / (q0 + q1 - 1) of specificity q0 and sensitivity q1 (Rogan and Gladen 1978). The
    interval counts what is unknown of all three (2511.21140): the delta method's variance, from shares
    smoothed as if two more texts of each kind had been read, one right and one wrong (Agresti and Coull
    1998). None if the scorer is no better than chance.
    """
    (right_1, m_1), (right_0, m_0) = sensitivity, specificity
    raw_gain = right_0 / m_0 + right_1 / m_1 - 1
    p = (rate * n + Z**2 / 2) / (n + Z**2)
    q_1, q_0 = (right_1 + 1) / (m_1 + 2), (right_0 + 1) / (m_0 + 2)
    gain = q_0 + q_1 - 1
    if raw_gain <= 0 or gain <= 0:
        return None
    estimate, centre = np.clip([(rate + right_0 / m_0 - 1) / raw_gain, (p + q_0 - 1) / gain], 0, 1).tolist()
    variance = p * (1 - p) / (n + Z**2)
    variance += (1 - centre) ** 2 * q_0 * (1 - q_0) / (m_0 + 2) + centre**2 * q_1 * (1 - q_1) / (m_1 + 2)
    half = Z * math.sqrt(variance) / gain
    return Interval(estimate, min(max(0.0, centre - half), estimate), max(min(1.0, centre + half), estimate))


def prompts_needed(contrast: Differences) -> int | None:
    """Return how many prompts settle the sign of a contrast like this one in four cases of five, or None.

    ((z_0.975 + z_0.8) s / mean)^2; None if the mean is 0.
    """
    mean, deviation = float(np.mean(contrast)), float(np.std(contrast, ddof=1))
    if mean == 0:
        return None
    z = Z + stats.norm.ppf(POWER)
    return max(len(contrast) + 1, math.ceil((z * deviation / mean) ** 2))

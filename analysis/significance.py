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
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))  # 1.96
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


def plain(value: Any) -> Any:
    """Return what JSON can hold of nested numbers: None in the place of one that is not finite."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_interval(differences: Differences) -> Interval:
    """Return the mean over prompts with Student's interval; that of equal differences has no width."""
    mean = float(np.mean(differences))
    if np.ptp(differences) == 0:
        return Interval(mean, mean, mean)
    half = _student(len(differences)) * float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half)


def share_change(after: Sequence[bool], before: Sequence[bool]) -> Interval:
    """Return the difference of two shares of the same items, with the interval of Bonett and Price (2012).

    One is added to the items that changed either way, so that it has a width where nothing changed, too,
    which Student's has not.
    """
    n = len(before)
    gained, lost = (
        sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((after, before), (before, after))
    )
    estimate, centre = (gained - lost) / n, (gained - lost) / (n + 2)
    half = Z * math.sqrt((gained + lost + 2) / (n + 2) - centre**2) / math.sqrt(n + 2)
    return Interval(estimate, max(-1.0, centre - half), min(1.0, centre + half))


@functools.lru_cache
def _student(n: int) -> float:
    """Return how many standard errors the interval of a mean of n values reaches to either side."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))


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
    """Return mean(mapped) / mean(oracle) with Fieller's interval (1954), infinite where the latter may be 0.

    It covers 93 to 97 % at 8 to 60 prompts, where a bootstrap over prompts covers 88 to 94 %
    (`benchmarks/bench_verdict.py`).
    """
    n, above, below = len(mapped), float(mapped.mean()), float(oracle.mean())
    covariance = np.cov(mapped, oracle) / n
    t = _student(n)
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


def prompts_needed(contrast: Differences, n_tests: int = 1) -> int | None:
    """Return how many prompts settle the sign of a contrast like this one in four cases of five, or None.

    ((z_a + z_0.8) s / mean)^2 with a of 0.025 / n_tests, as Holm asks of the first of n_tests; None if the
    mean is 0.
    """
    mean, deviation = float(np.mean(contrast)), float(np.std(contrast, ddof=1))
    if mean == 0:
        return None
    z = stats.norm.isf((1 - CONFIDENCE) / 2 / n_tests) + stats.norm.ppf(POWER)
    return max(len(contrast) + 1, math.ceil((z * deviation / mean) ** 2))

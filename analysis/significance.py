"""Say how sure an effect is: intervals, tests and recovery of paired differences (phase 5).

A score is known for each prompt and seed, under a condition and unsteered. Prompts are what varies
independently: the difference of a prompt is the mean over its seeds, so that seeds are nested in prompts and
intervals are as wide as prompts differ (2411.00640). Everything below takes such differences, (prompts,)
float64, one condition beside the other in the order of the prompts.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from support.intervals import CONFIDENCE, student_interval

N_RESAMPLES = 4000
EXACT_PROMPTS = 12  # up to which all sign flips are tried
N_FLIPS = 10_000
MARGIN = 0.20  # of equivalence to the oracle
POWER = 0.80

Differences = np.ndarray


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval of 95 %; low or high can be infinite."""

    estimate: float
    low: float
    high: float


def mean_interval(differences: Differences) -> Interval:
    """Return the mean over prompts with Student's interval; of equal differences, it has no width."""
    return Interval(float(np.mean(differences)), *student_interval(differences))


def sign_flip_p(differences: Differences, seed: int = 0) -> float:
    """Return the one-sided p of a mean over 0 under random signs: all of them, up to 12 prompts.

    With drawn signs, the observed ones count as one of the draws, so p is never 0.
    """
    differences = np.asarray(differences, dtype=np.float64)
    observed = differences.sum() - 1e-12 * np.abs(differences).sum()
    is_at_least = _signs(len(differences), seed) @ differences >= observed
    if len(differences) <= EXACT_PROMPTS:
        return float(np.mean(is_at_least))
    return float((1 + np.sum(is_at_least)) / (1 + N_FLIPS))


@functools.lru_cache(maxsize=4)
def _signs(n: int, seed: int) -> np.ndarray:
    """Return rows of n signs each: all there are, or N_FLIPS that the seed draws."""
    if n <= EXACT_PROMPTS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    return np.random.default_rng(seed).choice((1.0, -1.0), size=(N_FLIPS, n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method, in the order given."""
    adjusted, highest, n = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, index in enumerate(sorted(range(n), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (n - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def recovery(mapped: Differences, oracle: Differences, seed: int = 0) -> Interval:
    """Return mean(mapped) / mean(oracle) with a bootstrap interval; prompts are resampled together.

    A resample in which the oracle's mean has the other sign counts as an infinite ratio; where more than the
    interval's tail are like that, the interval is infinite.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(mapped), size=(N_RESAMPLES, len(mapped)))
    above, below = mapped[chosen].mean(1), oracle[chosen].mean(1)
    estimate = float(mapped.mean() / oracle.mean()) if oracle.mean() else math.inf
    sign, tail = math.copysign(1, oracle.mean()), (1 - CONFIDENCE) / 2
    is_sound = sign * below > 0
    if np.mean(~is_sound) > tail:
        return Interval(estimate, -math.inf, math.inf)
    ratios = np.where(is_sound, above / np.where(is_sound, below, 1.0), np.copysign(math.inf, sign * above))
    low, high = (float(np.quantile(ratios, q, method="nearest")) for q in (tail, 1 - tail))
    return Interval(estimate, low, high)


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


def equivalence_p(mapped: Differences, oracle: Differences, margin: float = MARGIN) -> float:
    """Return p of two one-sided tests that mapped lies within 1 - margin to 1 + margin times the oracle.

    Both bounds are paired differences of a prompt (mapped - 0.8 oracle and 1.2 oracle - mapped), so that the
    margin needs no estimate of the oracle's mean (Schuirmann 1987).
    """
    return max(
        one_sided_p(mapped - (1 - margin) * oracle),
        one_sided_p((1 + margin) * oracle - mapped),
    )


def one_sided_p(differences: Differences) -> float:
    """Return Student's one-sided p of a mean over 0; of equal differences, 0 or 1."""
    if np.ptp(differences) == 0:
        return 0.0 if differences[0] > 0 else 1.0
    return float(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue)


def corrected_share(
    share: float, n: int, sensitivity: tuple[int, int], specificity: tuple[int, int]
) -> Interval | None:
    """Return the share of texts that show a trait, given the share in which a scorer of known errors sees it.

    share: over n independent texts. sensitivity, specificity: (right answers, texts) of the validation.
    (share + q0 - 1) / (q0 + q1 - 1) of specificity q0 and sensitivity q1 (Rogan and Gladen 1978). The
    interval counts what is unknown of all three (2511.21140): the delta method's variance, from shares
    smoothed as if two more texts of each kind had been read, one right and one wrong (Agresti and Coull
    1998). None if the scorer is no better than chance.
    """
    (right_1, m_1), (right_0, m_0) = sensitivity, specificity
    q_1, q_0 = right_1 / m_1, right_0 / m_0
    if q_1 + q_0 <= 1:
        return None
    estimate = (share + q_0 - 1) / (q_0 + q_1 - 1)
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    p = (share * n + z**2 / 2) / (n + z**2)
    q_1, q_0 = (right_1 + 1) / (m_1 + 2), (right_0 + 1) / (m_0 + 2)
    gain = q_0 + q_1 - 1
    if gain <= 0:
        return None
    centre = min(1.0, max(0.0, (p + q_0 - 1) / gain))
    variance = p * (1 - p) / (n + z**2)
    variance += (1 - centre) ** 2 * q_0 * (1 - q_0) / (m_0 + 2) + centre**2 * q_1 * (1 - q_1) / (m_1 + 2)
    half = z * math.sqrt(variance) / gain
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    estimate = min(1.0, max(0.0, estimate))
    return Interval(estimate, min(low, estimate), max(high, estimate))


def prompts_needed(contrast: Differences) -> int | None:
    """Return how many prompts settle the sign of a contrast like this one in four cases of five, or None.

    ((z_0.975 + z_0.8) s / mean)^2; None if the mean is 0.
    """
    mean, deviation = float(np.mean(contrast)), float(np.std(contrast, ddof=1))
    if mean == 0:
        return None
    z = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    return max(len(contrast) + 1, math.ceil((z * deviation / mean) ** 2))


def main() -> None:
    """Check a ratio of 1/2, its two intervals, and that flipped signs find what is there."""
    generator = np.random.default_rng(0)
    oracle = generator.normal(0.6, 0.2, 40)
    mapped = oracle / 2 + generator.normal(0, 0.05, 40)
    found, check = recovery(mapped, oracle), fieller(mapped, oracle)
    assert found.low < 0.5 < found.high
    assert abs(found.low - check.low) + abs(found.high - check.high) < 0.05
    assert sign_flip_p(mapped) < 0.001 < 0.2 < sign_flip_p(-mapped)
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    assert equivalence_p(mapped, oracle) > 0.5 > equivalence_p(oracle * 1.01, oracle)
    print(f"significance OK: recovery {found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]")


if __name__ == "__main__":
    main()

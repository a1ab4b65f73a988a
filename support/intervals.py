"""Student's interval of a mean, which tables and tests of significance share."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def student_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of two or more independent values; of equal ones, no width."""
    n, mean = len(values), float(np.mean(values))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean - half, mean + half


def main() -> None:
    """Check the interval of three numbers by hand: t with two degrees of freedom is 4.303."""
    low, high = student_interval([3.0, 5.0, 10.0])
    assert abs((high - low) / 2 - 4.302653 * math.sqrt(13 / 3)) < 1e-4
    print(f"intervals OK: mean 6 [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()

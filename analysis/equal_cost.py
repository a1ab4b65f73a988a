"""Compare a control with the mapped vector where both cost the texts as much (phase 5).

At one alpha a control may have a lower perplexity ratio than the mapped vector, and do more if it were
stronger. So it writes at a few more alphas, and its effect at the mapped vector's ratio is interpolated over
the logarithm of its own. What comes of it is reported and decides nothing. Intervals are percentiles of a
bootstrap over prompts, which is a little too narrow for few prompts.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.results_table import paired_with_unsteered
from analysis.significance import CONFIDENCE, Interval

STEP = 1.5  # times as strong, or as weak, as the last alpha
N_STEPS = 2
EQUAL = math.log(1.05)  # perplexity ratios that differ by less are equal
N_RESAMPLES = 2000

Points = Mapping[float, pd.DataFrame]  # alpha -> what `by_prompt` returns


@dataclass(frozen=True)
class EqualCost:
    """A control against the mapped vector at an equal perplexity ratio.

    alpha, perplexity_ratio: of the control, interpolated; where no alpha that was tried costs as much as the
    mapped vector (`is_equal` is False), those of the nearest. mapped_ratio: of the mapped vector. effect: of
    the control there. mapped_over_it: the mapped vector's effect beyond it. tried: alpha -> perplexity ratio.
    """

    alpha: float
    perplexity_ratio: float
    mapped_ratio: float
    is_equal: bool
    effect: Interval
    mapped_over_it: Interval
    tried: Mapping[float, float]

    def content(self) -> dict[str, Any]:
        """Return the numbers as JSON holds them."""
        tried = [{"alpha": alpha, "perplexity_ratio": ratio} for alpha, ratio in self.tried.items()]
        return {**asdict(self), "tried": tried}


def by_prompt(table: pd.DataFrame, persona: str, name: str, alpha: float, column: str) -> pd.DataFrame:
    """Return a cell's `effect` and `log_ratio` at each prompt, against unsteered texts: means over seeds.

    table: from `results_table`. Prompts that lack either are left out.
    """
    steered, unsteered = paired_with_unsteered(table, persona, name, alpha)
    perplexities = (texts["independent_perplexity"].astype(float) for texts in (steered, unsteered))
    logs = [np.log(found.where(np.isfinite(found))) for found in perplexities]
    both = pd.DataFrame({"effect": steered[column] - unsteered[column], "log_ratio": logs[0] - logs[1]})
    return both.groupby(level="prompt_idx").mean().dropna()


def next_alpha(points: Points, mapped: pd.DataFrame) -> float | None:
    """Return the alpha at which a control is to write next; None if that is over.

    points: at the alphas so far. It is over once two of them lie on both sides of the mapped vector's ratio,
    one is equal to it, or all steps are made.
    """
    logs, wanted = {alpha: found["log_ratio"].mean() for alpha, found in points.items()}, _mean(mapped)
    known = [log for log in logs.values() if math.isfinite(log)]
    if len(points) > N_STEPS or len(known) < len(points) or not math.isfinite(wanted):
        return None
    if min(abs(log - wanted) for log in known) < EQUAL or min(known) < wanted < max(known):
        return None
    if max(known) < wanted:
        return max(points, key=abs) * STEP
    return min(points, key=abs) / STEP


def at_equal_cost(points: Points, mapped: pd.DataFrame) -> EqualCost | None:
    """Return what a control does at the mapped vector's perplexity ratio; None without prompts in common."""
    shared = mapped.index
    for found in points.values():
        shared = shared.intersection(found.index)
    if len(shared) < 2:
        return None
    own = mapped.loc[shared]
    of_control = {alpha: found.loc[shared] for alpha, found in points.items()}
    wanted, logs = _mean(own), {alpha: _mean(found) for alpha, found in of_control.items()}
    below, above = _around(logs, wanted)
    share = _share(np.array(wanted), np.array(logs[below]), np.array(logs[above])).item()
    log_ratio = logs[below] + share * (logs[above] - logs[below])
    effects = _resampled(own, of_control[below], of_control[above])
    return EqualCost(
        math.copysign(abs(below) ** (1 - share) * abs(above) ** share, above),
        math.exp(log_ratio),
        math.exp(wanted),
        abs(log_ratio - wanted) < EQUAL,
        *(Interval(*map(float, (each[0], *np.quantile(each[1:], _ENDS)))) for each in effects),
        {alpha: math.exp(log) for alpha, log in sorted(logs.items(), key=lambda item: abs(item[0]))},
    )


_ENDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


def _mean(found: pd.DataFrame) -> float:
    return float(found["log_ratio"].mean())


def _around(logs: Mapping[float, float], wanted: float) -> tuple[float, float]:
    """Return the alphas whose log ratios lie next below and above; the nearest twice, if one is missing."""
    below = [alpha for alpha in logs if logs[alpha] <= wanted]
    above = [alpha for alpha in logs if logs[alpha] > wanted]
    nearest = min(logs, key=lambda alpha: abs(logs[alpha] - wanted))
    if not below or not above or abs(logs[nearest] - wanted) < EQUAL:
        return nearest, nearest
    return max(below, key=logs.__getitem__), min(above, key=logs.__getitem__)


def _share(wanted: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Return how far the wanted log ratio lies from the one below to the one above, 0 to 1."""
    width = above - below
    return np.clip(np.divide(wanted - below, width, out=np.zeros_like(width), where=width > 0), 0, 1)


def _resampled(
    mapped: pd.DataFrame, below: pd.DataFrame, above: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray]:
    """Return the control's effect and mapped's beyond it: of these prompts first, then of resampled ones."""
    n = len(mapped)
    drawn = np.random.default_rng(0).integers(n, size=(N_RESAMPLES, n))
    rows = np.vstack([np.arange(n), drawn])
    own, low, high = (
        {name: found[name].to_numpy()[rows].mean(axis=1) for name in ("effect", "log_ratio")}
        for found in (mapped, below, above)
    )
    share = _share(own["log_ratio"], low["log_ratio"], high["log_ratio"])
    effect = low["effect"] + share * (high["effect"] - low["effect"])
    return effect, own["effect"] - effect

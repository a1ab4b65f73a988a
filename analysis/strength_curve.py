"""Compare vectors over steering strengths, and where their texts cost the same (phase 5).

One ratio of effects at one strength does not identify a transfer: it may move with the strength, and at one
strength texts of two vectors may differ in perplexity. So vectors write at the same multiples of the alpha at
which a verdict compares. Their recovery is told at each of these; at the perplexity ratio that the native
vector has at alpha, to which effects are interpolated over the logarithm of the ratio; and the strength is
told at which each has half of the native effect. A curve begins at the unsteered text, at strength 0.
Intervals at equal strength are Student's and Fieller's; the others are percentiles of a bootstrap over
prompts in which the ratios vary too, which is a little too narrow for few prompts. Nothing is decided here.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from analysis.results_table import paired_with_unsteered
from analysis.significance import CONFIDENCE, Interval, mean_interval, plain, recovery
from analysis.verdict import FEWEST_PROMPTS
from experiment.conditions import ORACLE

MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.25)  # of the alpha at which the verdict compares
EQUAL = math.log(1.05)  # perplexity ratios that differ by less are equal
N_RESAMPLES = 2000
_STRENGTHS = np.array((0.0, *MULTIPLES))
_COMPARED = 1 + MULTIPLES.index(1.0)  # place of alpha itself among these


def by_prompt(table: pd.DataFrame, persona: str, name: str, alpha: float, column: str) -> pd.DataFrame:
    """Return a cell's `effect` and `log_ratio` at each prompt, against unsteered texts: means over seeds.

    table: from `results_table`. Prompts that lack either are left out.
    """
    steered, unsteered = paired_with_unsteered(table, persona, name, alpha)
    perplexities = (texts["independent_perplexity"].astype(float) for texts in (steered, unsteered))
    logs = [np.log(found.where(np.isfinite(found))) for found in perplexities]
    both = pd.DataFrame({"effect": steered[column] - unsteered[column], "log_ratio": logs[0] - logs[1]})
    return both.groupby(level="prompt_idx").mean().dropna()


def strength_curve(
    table: pd.DataFrame, persona: str, names: Sequence[str], alpha: float, column: str
) -> dict[str, Any] | None:
    """Return vectors over strengths, as JSON holds it; None if fewer than FEWEST_PROMPTS have all numbers.

    table: from `results_table`, with texts at every multiple of alpha. names: compared names, the native
    vector's among them. The result has `alpha`, `n_prompts`, `native_ratio` (perplexity ratio of the native
    vector at alpha) and `vectors`: name -> `points`, one for each of MULTIPLES with the effect and the
    recovery there; `at_native_ratio`, the multiple at which the vector has the native ratio, with effect and
    recovery, and whether it `is_reached`, else the nearest; `half_effect`, the multiple at which it has half
    of the native effect, and `half_over_native`, this over the native vector's own. The last two and
    recovery at the native ratio are None unless the native vector surely has an effect; of a vector that
    never has half of it, the estimate is None. So are shares of the native vector in itself.
    """
    cells = [
        [by_prompt(table, persona, name, multiple * alpha, column) for multiple in MULTIPLES]
        for name in names
    ]
    shared = functools.reduce(pd.Index.intersection, [each.index for of_name in cells for each in of_name])
    if len(shared) < FEWEST_PROMPTS:
        return None
    measured = np.array([[each.loc[shared].to_numpy() for each in of_name] for of_name in cells])
    effects, logs = np.moveaxis(measured, -1, 0)  # (vectors, multiples, prompts) each
    native = list(names).index(ORACLE)
    compared = _compare(_resampled(effects), _resampled(logs), native)
    vectors = {}
    for number, (name, found) in enumerate(zip(names, compared, strict=True)):
        points = []
        for place, multiple in enumerate(MULTIPLES):
            own, of_native = effects[number, place], effects[native, place]
            effect = mean_interval(own)
            points.append(
                {
                    "multiple": multiple,
                    "alpha": multiple * alpha,
                    "perplexity_ratio": math.exp(logs[number, place].mean()),
                    **{"effect": effect.estimate, "low": effect.low, "high": effect.high},
                    "recovery": None if number == native else asdict(recovery(own, of_native)),
                }
            )
        vectors[name] = {"points": points, **found}
    native_ratio = vectors[ORACLE]["points"][_COMPARED - 1]["perplexity_ratio"]
    return plain({"alpha": alpha, "n_prompts": len(shared), "native_ratio": native_ratio, "vectors": vectors})


def _resampled(values: np.ndarray) -> np.ndarray:
    """Return means over these prompts, then over resampled ones, with the unsteered text as strength 0.

    values: (vectors, multiples, prompts), returned as (1 + N_RESAMPLES, vectors, strengths).
    """
    n = values.shape[-1]
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    weights = np.vstack([np.ones(n), drawn]) / n
    return np.pad(np.moveaxis(values @ weights.T, -1, 0), ((0, 0), (0, 0), (1, 0)))


def _compare(effects: np.ndarray, logs: np.ndarray, native: int) -> list[dict[str, Any]]:
    """Return each vector at the native ratio, and where it has half of the native effect.

    effects, logs: from `_resampled`.
    """
    works = _percentiles(effects[:, native, _COMPARED]).low > 0
    if works:  # no share of a native effect is known in the few resamples without one
        kept = effects[:, native, _COMPARED] > 0
        effects, logs = effects[kept], logs[kept]
    of_native, wanted = effects[:, native, _COMPARED], logs[:, native, _COMPARED]
    own_half = _strength(_crossing(effects[:, native], of_native / 2, 0))
    found = []
    for number in range(effects.shape[1]):
        nearest = 1 + np.abs(logs[:, number, 1:] - wanted[:, None]).argmin(axis=1)
        crossing = _crossing(logs[:, number], wanted, _COMPARED)
        place = np.where(np.isnan(crossing), nearest, crossing)
        effect, log_ratio = (_at(curves[:, number], place) for curves in (effects, logs))
        half = _strength(_crossing(effects[:, number], of_native / 2, 0))
        has_share = works and number != native
        found.append(
            {
                "at_native_ratio": {
                    "multiple": float(_strength(place)[0]),
                    "perplexity_ratio": math.exp(log_ratio[0]),
                    "is_reached": bool(abs(log_ratio[0] - wanted[0]) < EQUAL),
                    "effect": asdict(_percentiles(effect)),
                    "recovery": asdict(_percentiles(effect / of_native)) if has_share else None,
                },
                "half_effect": asdict(_percentiles(half)) if works else None,
                "half_over_native": asdict(_percentiles(half / own_half)) if has_share else None,
            }
        )
    return found


def _crossing(curves: np.ndarray, wanted: np.ndarray, near: int) -> np.ndarray:
    """Return the place between points at which each curve has the wanted value, NaN if it never has.

    curves: (n, points), wanted: (n,). Of several places, the one nearest to the point `near`.
    """
    over = curves - wanted[:, None]
    start, end = over[:, :-1], over[:, 1:]
    does_cross = (start < 0) != (end < 0)
    share = np.divide(start, start - end, out=np.zeros_like(start), where=does_cross)
    places = np.arange(share.shape[1]) + share
    nearest = np.where(does_cross, np.abs(places - near), np.inf).argmin(axis=1)[:, None]
    return np.take_along_axis(np.where(does_cross, places, np.nan), nearest, axis=1)[:, 0]


def _at(curves: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the value of each curve at its place between points."""
    below = np.minimum(places.astype(int), curves.shape[1] - 2)[:, None]
    start, end = (np.take_along_axis(curves, each, axis=1)[:, 0] for each in (below, below + 1))
    return start + (places - below[:, 0]) * (end - start)


def _strength(places: np.ndarray) -> np.ndarray:
    """Return the multiple of alpha at these places, infinite where there is none."""
    return np.where(np.isnan(places), np.inf, np.interp(places, np.arange(len(_STRENGTHS)), _STRENGTHS))


def _percentiles(values: np.ndarray) -> Interval:
    """Return the first value with the percentiles of the others, any of which may be infinite."""
    ends = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    return Interval(*map(float, (values[0], *np.quantile(values[1:], ends, method="inverted_cdf"))))

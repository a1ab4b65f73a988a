"""Compare vectors as detectors: how well projections tell texts with a trait from texts without (phase 3).

A detector has no strength to choose and no scorer to trust. Its AUROC is the share of pairs of a text with
the trait and one without in which the former has the larger projection; a tie counts half, so that a vector
of zeros has 0.5 with an interval of no width. Intervals are those of DeLong, DeLong and Clarke-Pearson 1988;
texts are what varies. Vectors read the same texts, so that differences are paired. An AUROC of 0 or 1 has an
interval of no width, too, which says more than so many texts can.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from analysis.results_table import worst_draws
from analysis.significance import Interval, Z
from experiment.conditions import LEXICAL_CONTROLS, MAPPED, ORACLE

FEWEST_TEXTS = 10  # on a side, from which a detector is tested


def delong(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the AUROC of k detectors that score the same texts, (k,), and its covariance, (k, k).

    positive, negative: scores of texts with the trait and without, (k, n) each with n of 2 or more.
    """
    n_positive, n_negative = positive.shape[1], negative.shape[1]
    ranks = rankdata(np.hstack([positive, negative]), axis=1)
    # The share of negatives below each positive, and of positives above each negative.
    below = (ranks[:, :n_positive] - rankdata(positive, axis=1)) / n_negative
    above = 1 - (ranks[:, n_positive:] - rankdata(negative, axis=1)) / n_positive
    covariance = np.cov(below) / n_positive + np.cov(above) / n_negative
    return below.mean(axis=1), np.atleast_2d(covariance)


def detect(
    vectors: Mapping[str, Tensor], positive: Tensor, negative: Tensor, left_out: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return how well each vector tells the texts apart, as JSON holds it.

    vectors: compared name -> (blocks, d), the native and the mapped one among them. positive, negative:
    activations of texts with the trait and without, (blocks, n, d). left_out: dimensions of each block that
    count in no projection.

    auroc: compared name -> an interval for each block. At the middle block: `shown`, condition -> the
    compared name of its draw with the largest AUROC; `lexical_control`, the name of the stronger one, None
    without any; and mapped less that control, `over_lexical`, and less the native vector, `over_native`.
    """
    names = list(vectors)
    directions = torch.stack([vectors[name] for name in names]).double().clone()
    for block, dimensions in enumerate(left_out):
        directions[:, block, list(dimensions)] = 0.0
    sides = [torch.einsum("kbd,bnd->bkn", directions, side.double()).numpy() for side in (positive, negative)]
    found = [delong(*of_block) for of_block in zip(*sides, strict=True)]
    areas, covariance = found[len(found) // 2]
    area = dict(zip(names, areas.tolist(), strict=True))
    shown = worst_draws(area)
    lexical = max((name for name in LEXICAL_CONTROLS if name in area), key=area.__getitem__, default=None)

    def over(name: str) -> dict[str, float]:
        contrast = np.zeros(len(names))
        contrast[names.index(MAPPED)] += 1
        contrast[names.index(name)] -= 1
        return _interval(contrast @ areas, contrast @ covariance @ contrast, -1.0)

    return {
        "n_positive": positive.shape[1],
        "n_negative": negative.shape[1],
        "auroc": {
            name: [_interval(of_block[k], variance[k, k], 0.0) for of_block, variance in found]
            for k, name in enumerate(names)
        },
        "zeros": [name for name in names if not vectors[name].any()],
        "shown": shown,
        "lexical_control": lexical,
        "over_lexical": over(lexical) if lexical else None,
        "over_native": over(ORACLE),
    }


def _interval(estimate: float, variance: float, lowest: float) -> dict[str, float]:
    """Return an estimate with its interval, which ends at `lowest` and at 1."""
    half = Z * math.sqrt(max(0.0, variance))  # rounding may leave less than nothing of equal scores
    return asdict(
        Interval(float(estimate), max(lowest, float(estimate) - half), min(1.0, float(estimate) + half))
    )

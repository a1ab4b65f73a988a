"""Fit other maps between the two activation spaces, to compare with ridge regression (phase 2).

All three kinds have an intercept:

`procrustes`: a rotation and one scale. If it does as well as ridge, the two spaces differ by
    little more than their basis (Schoenemann 1966).
`reduced_rank`: ridge regression with W of limited rank (Mukherjee & Zhu 2011). If a small rank
    does as well, the shared space is small.
`shuffled_pairs`: ridge regression on pairs that don't belong together. It knows no relation, so a
    vector that it maps is a control for the steering. One shuffle may look like a trait by
    chance, so the caller fits several draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ridge_mapping import (
    HeldOutFold,
    RidgeMapping,
    held_out_folds,
    held_out_summary,
    map_directions,
    shuffled_pairs,
    solve_ridge,
    target_weights,
)
from support.errors import InputError
from support.pair_statistics import PairStatistics

KINDS = ("procrustes", "reduced_rank", "shuffled_pairs")
NOTHING = 1e-9  # R2 that rounding may give a map of zeros
ABOUT = (
    "Maps to compare ridge regression with, fitted on the same pairs of activations, the outputs of the "
    "decoder blocks in layer_pairs, counted from 0. maps: name -> kind, number of the shuffle (draw), W "
    "(d_source, d_target), source_mean, target_mean, float64, the rank if it is limited, and the "
    "cross-validation (cv). An activation h maps to (h - source_mean) @ W + target_mean, a direction v to v "
    "@ W."
)

ABOUT_CONTROLS = (
    "Ridge regressions from what controls read in the place of the source, fitted on the same texts: its "
    "token embeddings, the output of its first block, or the blocks of its architecture with random weights. "
    "maps: vector name -> as in comparison_maps.pt; layer_pairs: of each, in this order; source layer -1 is "
    "the embeddings."
)


@dataclass(frozen=True)
class ComparisonMap:
    """A map of one of KINDS on the pairs of ridge regression, or ridge regression from a control's source.

    kind: the condition. draw: the number of the shuffle, or of the random weights, from 0.
    W (d_source, d_target), source_mean (d_source,), target_mean (d_target,): float64.
    rank: None but for `reduced_rank`. cv: the result of `ridge_mapping.held_out_summary` with the kind,
    lambda, rank and number of pairs.
    """

    kind: str
    draw: int
    W: Tensor
    source_mean: Tensor
    target_mean: Tensor
    rank: int | None
    cv: dict[str, Any]

    @classmethod
    def fitted(cls, kind: str, ridge: RidgeMapping, draw: int = 0) -> "ComparisonMap":
        """Take ridge regression's lambda, choose the rank of `reduced_rank`, and fit.

        Lambda is the best one of `ridge`, cross-validated on the same pairs (for `shuffled_pairs`, its
        best one on the first shuffle); the rank is the one with the least pooled held-out error.
        """
        statistics, folds, lambda_ = ridge.statistics, ridge.folds, ridge.lambda_
        if kind == "shuffled_pairs":
            statistics, folds = _shuffled(ridge, draw)
            lambda_ = ridge.cv["shuffled_best_lambda"]
        total, rank = statistics.total().to(ridge.device), None
        solved = [(fold, fold.ridge(ridge.absolute_lambda(lambda_, fold.unit))) for fold in folds]
        if kind == "procrustes":
            W = procrustes(total.gram, total.cross)
            solved = [(fold, procrustes(fold.eigenvalues.diag(), fold.cross)) for fold in folds]
        elif kind == "reduced_rank":
            solved = [(fold, W, principal_axes(W, fold.cross)) for fold, W in solved]
            rank = best_rank(solved)
            W = at_rank(ridge.W.to(ridge.device), total.cross, rank)
            solved = [(fold, W @ axes[:, :rank] @ axes[:, :rank].T) for fold, W, axes in solved]
        else:
            W = solve_ridge(total, ridge.absolute_lambda(lambda_, total.gram.diagonal().mean().item()))
        summary = held_out_summary(statistics, solved, target_weights(total))
        used = None if kind == "procrustes" else lambda_
        cv = {"kind": kind, "lambda": used, "rank": rank, "n": statistics.n_pairs, **summary}
        return cls(kind, draw, W.cpu(), total.source_mean.cpu(), total.target_mean.cpu(), rank, cv)

    @classmethod
    def of_source(cls, kind: str, ridge: RidgeMapping, draw: int = 0) -> "ComparisonMap":
        """Take over a cross-validated ridge regression from the source of a control."""
        (row,) = maps_table(ridge, {})
        cv = {"kind": kind, **{name: value for name, value in row.items() if name != "map"}}
        return cls(kind, draw, ridge.W, ridge.source_mean, ridge.target_mean, None, cv)

    def transform(self, v_source: Tensor) -> Tensor:
        """Map directions without intercept; see `RidgeMapping.transform`."""
        return map_directions(self.W, v_source)

    def content(self) -> dict[str, Any]:
        """Return the fitted map as tensors and numbers."""
        d_source, d_target = self.W.shape
        widths = {"d_source": d_source, "d_target": d_target}
        return {"kind": self.kind, "draw": self.draw, **widths, **vars(self)}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "ComparisonMap":
        """Make a map from what `content` returned."""
        return cls(**{field.name: content[field.name] for field in fields(cls)})


def _shuffled(ridge: RidgeMapping, draw: int) -> tuple[PairStatistics, list[HeldOutFold]]:
    """Return a shuffle of the sample and its folds; what depends on the source alone is that of the first."""
    if not draw:
        return ridge.shuffled
    statistics = shuffled_pairs(ridge.statistics, ridge.cv["seed"], draw, ridge.device)
    return statistics, held_out_folds(statistics, ridge.device, ridge.shuffled[1])


def best_rank(solved: Sequence[tuple[HeldOutFold, Tensor, Tensor]]) -> int:
    """Return the rank with the least held-out error.

    solved: each fold, its ridge regression in the fold's basis, and the `principal_axes` of what it predicts.
    """
    gains = 0.0
    for fold, W, axes in solved:
        axes = axes[:, : min(W.shape)]
        mapped, cross = W @ axes, fold.test.cross @ axes
        gains += 2 * (mapped * cross).sum(0) - (mapped * (fold.test.gram @ mapped)).sum(0)
    return gains.cumsum(0).argmax().item() + 1


def maps_table(ridge: RidgeMapping, others: Mapping[str, ComparisonMap]) -> list[dict[str, Any]]:
    """Return a row for each cross-validated map: its name, lambda, held-out R2 and retrieval accuracy."""
    cv = ridge.cv
    scores = "r2", "r2_standardised", "r2_median_dimension"
    first = {"map": "ridge", "n": cv["n_rows"], "lambda": cv["best_lambda"], "rank": None}
    first |= {score: cv[f"best_{score}"] for score in scores}
    first |= {key: cv[key] for key in ("retrieval_accuracy", "retrieval_n")}
    rows = [{"map": name, **other.cv} for name, other in others.items()]
    return [first, *({key: row[key] for key in first} for row in rows)]


def edge_notes(
    by_control: Mapping[str, Sequence[ComparisonMap]], lambda_values: Sequence[float]
) -> list[str]:
    """Return a sentence for each control whose maps want a lambda beyond the grid: it may be too weak."""
    ends, notes = {min(lambda_values), max(lambda_values)}, []
    for name, maps in by_control.items():
        # Of activations that are all equal nothing can be learnt at any lambda.
        n = sum(each.cv["lambda"] in ends and abs(each.cv["r2"]) > NOTHING for each in maps)
        if n and len(lambda_values) > 1:
            notes.append(
                f"{name}: the best lambda of {n} of its {len(maps)} maps is at the edge of the grid, so that "
                "it may do less than it could; widen lambda_values"
            )
    return notes


def procrustes(gram: Tensor, cross: Tensor) -> Tensor:
    """Return scale * R with orthonormal rows (or columns, if the target is narrower), (d_source, d_target).

    gram: X'X. cross: X'Y. With the singular value decomposition X'Y = U S V', R = U V' maximises the inner
    product of X R and Y (Schoenemann 1966); the scale tr(S) / ||X R||^2 is the best one for this R.
    Raises InputError: the source activations are constant.
    """
    U, S, Vh = torch.linalg.svd(cross, full_matrices=False)
    R = U @ Vh
    energy = (R * (gram @ R)).sum()
    if energy <= 0:
        raise InputError("the source activations are constant; no rotation can be fitted")
    return S.sum() / energy * R


def principal_axes(W: Tensor, cross: Tensor) -> Tensor:
    """Return the eigenvectors of W'X'Y in columns, largest first; for ridge this is W'(X'X + lambda I)W."""
    fitted = W.T @ cross
    return torch.linalg.eigh((fitted + fitted.T) / 2).eigenvectors.flip(1)


def at_rank(W: Tensor, cross: Tensor, rank: int) -> Tensor:
    """Return the ridge solution of at most this rank, (d_source, d_target).

    W: the ridge solution; cross: X'Y. W P, where P projects on the leading principal axes (Mukherjee & Zhu
    2011, section 2).
    """
    axes = principal_axes(W, cross)[:, :rank]
    return W @ axes @ axes.T

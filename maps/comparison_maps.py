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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ridge_mapping import (
    RidgeMapping,
    held_out_summary,
    map_directions,
    shuffled_pairs,
    solve_ridge,
    target_weights,
)
from support.errors import InputError
from support.pair_statistics import Moments, PairStatistics

KINDS = ("procrustes", "reduced_rank", "shuffled_pairs")
_SAVED = ("W", "source_mean", "target_mean", "rank", "cv")


class ComparisonMap:
    """A map of one of KINDS, on the pairs that ridge regression was fitted on.

    draw: the number of the shuffle, from 0.
    After `cross_validate_from` or `from_content`: W (d_source, d_target), source_mean (d_source,) and
    target_mean (d_target,), all float64; rank, None but for `reduced_rank`; and cv, the result of
    `ridge_mapping.held_out_summary` with the kind, lambda, rank and number of pairs.
    """

    def __init__(self, kind: str, draw: int = 0) -> None:
        if kind not in KINDS:
            raise InputError(f"kind {kind!r} is unknown; choose {', '.join(KINDS)}")
        self.kind = kind
        self.draw = draw
        self.statistics: PairStatistics | None = None
        self.rank: int | None = None
        self.W: Tensor | None = None
        self.source_mean: Tensor | None = None
        self.target_mean: Tensor | None = None
        self.cv: dict[str, Any] | None = None

    @classmethod
    def from_statistics(cls, kind: str, statistics: PairStatistics, draw: int = 0) -> "ComparisonMap":
        """Make an unfitted map on pairs that were summed before; the statistics are shared.

        Raises InputError: an unknown kind, or `shuffled_pairs` of statistics without a sample to shuffle.
        """
        made = cls(kind, draw)
        if kind == "shuffled_pairs" and len(statistics.sample.rows) < 2:
            raise InputError(
                f"'shuffled_pairs' got a sample of {len(statistics.sample.rows)} pairs, expected 2 or more; "
                "raise n_sample"
            )
        made.statistics = statistics
        return made

    def cross_validate_from(self, ridge: RidgeMapping) -> "ComparisonMap":
        """Take ridge regression's lambda, choose the rank of `reduced_rank`, and fit; returns self.

        Lambda is the best one of `ridge`, cross-validated on the same pairs (for `shuffled_pairs`, its
        best one on the first shuffle); the rank is the one with the least pooled held-out error.
        Raises InputError: `ridge` has not been cross-validated.
        """
        if ridge.cv is None:
            raise InputError("the ridge mapping was not cross-validated; call its cross_validate() first")
        statistics, lambda_ = self.statistics, ridge.lambda_
        if self.kind == "shuffled_pairs":
            statistics = shuffled_pairs(statistics, ridge.cv["seed"], self.draw)
            lambda_ = ridge.cv["shuffled_best_lambda"]

        def absolute(moments: Moments) -> float:
            return ridge.absolute_lambda(lambda_, moments.gram)

        splits = [statistics.split(fold) for fold in range(statistics.n_folds)]
        rank = best_rank(splits, absolute) if self.kind == "reduced_rank" else None
        solve = {
            "procrustes": procrustes,
            "reduced_rank": lambda moments: reduced_rank_ridge(moments, absolute(moments), rank),
            "shuffled_pairs": lambda moments: solve_ridge(moments, absolute(moments)),
        }[self.kind]
        total = statistics.total()
        self.W, self.rank = solve(total), rank
        self.source_mean, self.target_mean = total.source_mean, total.target_mean
        solved = [(train, test, solve(train)) for train, test in splits]
        summary = held_out_summary(statistics, solved, target_weights(total))
        used = None if self.kind == "procrustes" else lambda_
        self.cv = {"kind": self.kind, "lambda": used, "rank": rank, "n": statistics.n_pairs, **summary}
        return self

    def transform(self, v_source: Tensor) -> Tensor:
        """Map directions without intercept; see `RidgeMapping.transform`."""
        return map_directions(self._fitted_W(), v_source)

    def content(self) -> dict[str, Any]:
        """Return the fitted map as tensors and numbers."""
        d_source, d_target = self._fitted_W().shape
        widths = {"d_source": d_source, "d_target": d_target}
        return {"kind": self.kind, "draw": self.draw, **widths, **{key: getattr(self, key) for key in _SAVED}}

    @classmethod
    def from_content(cls, content: Mapping[str, Any], name: str = "content") -> "ComparisonMap":
        """Make a map from what `content` returned. Raises InputError: an entry is missing."""
        try:
            made = cls(content["kind"], content["draw"])
            for key in _SAVED:
                setattr(made, key, content[key])
        except KeyError as error:
            raise InputError(f"{name} has no entry {error}; it is not a comparison map") from error
        return made

    def _fitted_W(self) -> Tensor:
        if self.W is None:
            raise InputError("the map is not fitted; call cross_validate_from() first")
        return self.W


def best_rank(splits: Sequence[tuple[Moments, Moments]], lambda_absolute: Callable[[Moments], float]) -> int:
    """Return the rank with the least held-out error; all ranks cost one decomposition a fold.

    splits: for each fold the moments of the training and of the held-out pairs.
    """
    gains = 0.0
    for train, test in splits:
        W, axes = _ridge_and_axes(train, lambda_absolute(train))
        axes = axes[:, : min(W.shape)]
        mapped, cross = W @ axes, test.cross @ axes
        gains += 2 * (mapped * cross).sum(0) - (mapped * (test.gram @ mapped)).sum(0)
    return int(gains.cumsum(0).argmax()) + 1


def maps_table(ridge: RidgeMapping, others: Mapping[str, ComparisonMap]) -> list[dict[str, Any]]:
    """Return a row for each cross-validated map: its name, lambda, held-out R2 and retrieval accuracy."""
    cv = ridge.cv
    first = {
        "map": "ridge",
        "n": cv["n_rows"],
        "lambda": cv["best_lambda"],
        "rank": None,
        "r2": cv["best_r2"],
        "r2_standardised": cv["best_r2_standardised"],
        "r2_median_dimension": cv["best_r2_median_dimension"],
        "retrieval_accuracy": cv["retrieval_accuracy"],
        "retrieval_n": cv["retrieval_n"],
    }
    return [
        first,
        *({key: {"map": name, **other.cv}[key] for key in first} for name, other in others.items()),
    ]


def procrustes(moments: Moments) -> Tensor:
    """Return scale * R with orthonormal rows (or columns, if the target is narrower), (d_source, d_target).

    With the singular value decomposition X'Y = U S V', R = U V' maximises the inner product of
    X R and Y (Schoenemann 1966); the scale tr(S) / ||X R||^2 is the best one for this R.
    Raises InputError: the source activations are constant.
    """
    U, S, Vh = torch.linalg.svd(moments.cross, full_matrices=False)
    R = U @ Vh
    energy = (R * (moments.gram @ R)).sum()
    if energy <= 0:
        raise InputError("the source activations are constant; no rotation can be fitted")
    return S.sum() / energy * R


def reduced_rank_ridge(moments: Moments, lambda_absolute: float, rank: int) -> Tensor:
    """Return the ridge solution of at most this rank, (d_source, d_target).

    W P, where P projects on the leading eigenvectors of W'(X'X + lambda I)W = W'X'Y
    (Mukherjee & Zhu 2011, section 2).
    """
    W, axes = _ridge_and_axes(moments, lambda_absolute)
    return W @ axes[:, :rank] @ axes[:, :rank].T


def _ridge_and_axes(moments: Moments, lambda_absolute: float) -> tuple[Tensor, Tensor]:
    W = solve_ridge(moments, lambda_absolute)
    fitted = W.T @ moments.cross
    return W, torch.linalg.eigh((fitted + fitted.T) / 2).eigenvectors.flip(1)

"""Other maps between the two activation spaces, to compare with ridge regression (phase 2).

Three kinds, all with an intercept, and with the interface of `RidgeMapping`:

`procrustes`: a rotation and one scale. If it does as well as ridge, the two spaces differ by
    little more than their basis (Schoenemann 1966).
`reduced_rank`: ridge regression with W of limited rank (Mukherjee & Zhu 2011). If a small rank
    does as well, the shared space is small.
`shuffled`: ridge regression on pairs that don't belong together. It must know nothing; a
    vector that it maps is a control for the steering.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ridge_mapping import (
    DEFAULT_LAMBDAS,
    RidgeMapping,
    check_lambda,
    held_out_summary,
    map_activations,
    map_directions,
    shuffled_pairs,
    solve_ridge,
    target_weights,
)
from support.artifacts import load_tensors, save_tensors
from support.errors import InputError
from support.pair_statistics import Moments, PairStatistics
from support.vocabulary import MAP_KINDS

KINDS = MAP_KINDS


class ComparisonMap:
    """A map of one of KINDS; arguments and methods are those of `RidgeMapping`.

    After `fit` or `cross_validate`: W (d_source, d_target) float64, source_mean, target_mean, and
    rank (of `reduced_rank`).
    """

    def __init__(
        self,
        kind: str,
        d_source: int,
        d_target: int,
        lambda_unit: str = "absolute",
        n_folds: int = 5,
        seed: int = 0,
        fold_of: Mapping[Hashable, int] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"kind {kind!r} is unknown; choose {', '.join(KINDS)}")
        self.kind = kind
        self.ridge = RidgeMapping(d_source, d_target, lambda_unit, n_folds, seed, fold_of)
        self.rank: int | None = None
        self.W: Tensor | None = None
        self.source_mean: Tensor | None = None
        self.target_mean: Tensor | None = None
        self.cv: dict[str, Any] | None = None

    @classmethod
    def from_statistics(
        cls, kind: str, statistics: PairStatistics, lambda_unit: str = "absolute"
    ) -> "ComparisonMap":
        """Make a map, not fitted yet, on pairs that were summed before. The statistics are shared."""
        made = cls(kind, statistics.d_source, statistics.d_target, lambda_unit)
        made.ridge.statistics = statistics
        return made

    def partial_fit(
        self, H_source: Tensor, H_target: Tensor, groups: Sequence[Hashable] | Tensor | None = None
    ) -> "ComparisonMap":
        """Add pairs; see `RidgeMapping.partial_fit`."""
        self.ridge.partial_fit(H_source, H_target, groups)
        return self

    def merge(self, other: "ComparisonMap") -> "ComparisonMap":
        """Add the pairs of another map; see `RidgeMapping.merge`."""
        self.ridge.merge(other.ridge)
        return self

    def fit(
        self,
        H_source: Tensor | None = None,
        H_target: Tensor | None = None,
        lambda_: float = 1.0,
        rank: int | None = None,
    ) -> "ComparisonMap":
        """Fit W and the means; returns self.

        lambda_: ignored by `procrustes`. rank: of `reduced_rank`, 1 to min(d_source, d_target).
        Raises InputError: as `RidgeMapping.fit`, or a rank that is missing or out of range.
        """
        check_lambda(lambda_)
        rank = self._checked_rank(rank)
        if H_source is not None or H_target is not None:
            self.ridge.replace_pairs(
                H_source, H_target, self.ridge.n_folds, None, self.ridge.seed, split=False
            )
        total = self._statistics(self.ridge.seed).total()
        return self._set(total, self._solver(lambda_, rank), rank)

    def cross_validate(
        self,
        H_source: Tensor | None = None,
        H_target: Tensor | None = None,
        lambda_values: Sequence[float] = DEFAULT_LAMBDAS,
        n_folds: int | None = None,
        groups: Sequence[Hashable] | Tensor | None = None,
        seed: int | None = None,
        criterion: str = "pooled",
    ) -> tuple[float, dict[float, float]]:
        """Choose lambda, and the rank of `reduced_rank`, by held-out error, and fit on all pairs.

        Lambda is ridge regression's best one (for `shuffled`, on the shuffled pairs), and the rank
        has the least pooled error. `cv` holds
        what `ridge_mapping.held_out_summary` returns, and the lambda and rank chosen.
        Returns (best_lambda, {lambda: held-out mean squared error of ridge regression}).
        """
        chosen = self.ridge.cross_validate(
            H_source, H_target, lambda_values, n_folds, groups, seed, criterion
        )
        self.cross_validate_from(self.ridge)
        return chosen

    def cross_validate_from(self, ridge: RidgeMapping) -> "ComparisonMap":
        """Do what `cross_validate` does, given ridge regression's on the same pairs; returns self.

        Raises InputError if `ridge` has not been cross-validated, or keeps no sample to shuffle.
        """
        if ridge.cv is None:
            raise InputError("the ridge mapping was not cross-validated; call its cross_validate() first")
        self.ridge = ridge
        statistics = self._statistics(ridge.cv["seed"])
        lambda_ = ridge.cv["shuffled_best_lambda"] if self.kind == "shuffled" else ridge.lambda_
        splits = [statistics.split(fold) for fold in range(statistics.n_folds)]
        rank = self._best_rank(splits, lambda_) if self.kind == "reduced_rank" else None
        solve = self._solver(lambda_, rank)
        solved = [(train, test, solve(train)) for train, test in splits]
        self._set(statistics.total(), solve, rank)
        summary = held_out_summary(statistics, solved, target_weights(statistics.total()))
        used = None if self.kind == "procrustes" else lambda_
        self.cv = {"kind": self.kind, "lambda": used, "rank": rank, "n": statistics.n_pairs, **summary}
        return self

    def transform(self, v_source: Tensor) -> Tensor:
        """Map directions without intercept; see `RidgeMapping.transform`."""
        return map_directions(self._fitted_W(), v_source)

    def predict(self, H_source: Tensor) -> Tensor:
        """Map activations with intercept; see `RidgeMapping.predict`."""
        return map_activations(self._fitted_W(), self.source_mean, self.target_mean, H_source)

    def analyze(self) -> dict[str, Any]:
        """Return the kind, the singular values of W, descending, and what `cross_validate` found."""
        singular_values = torch.linalg.svdvals(self._fitted_W()).tolist()
        return {"kind": self.kind, "rank": self.rank, "singular_values": singular_values, **(self.cv or {})}

    def save(self, path: str | Path, fingerprint: str = "") -> None:
        """Write the fitted map to a `.pt` file in one step."""
        save_tensors(Path(path), {"fingerprint": fingerprint, **self.content()})

    def content(self) -> dict[str, Any]:
        """Return the fitted map as tensors and numbers."""
        widths = {"d_source": self.ridge.d_source, "d_target": self.ridge.d_target}
        fitted = {"W": self._fitted_W(), "source_mean": self.source_mean, "target_mean": self.target_mean}
        return {"kind": self.kind, "rank": self.rank, "cv": self.cv, **widths, **fitted}

    @classmethod
    def load(cls, path: str | Path) -> "ComparisonMap":
        """Read a map that `save` wrote. Raises InputError if the file is damaged or something else."""
        return cls.from_content(load_tensors(Path(path)), str(path))

    @classmethod
    def from_content(cls, content: Mapping[str, Any], name: str = "content") -> "ComparisonMap":
        """Make a map from what `content` returned."""
        try:
            made = cls(content["kind"], content["d_source"], content["d_target"])
            for key in ("W", "source_mean", "target_mean", "rank", "cv"):
                setattr(made, key, content[key])
        except KeyError as error:
            raise InputError(f"{name} has no entry {error}; it is not a comparison map") from error
        return made

    def _statistics(self, seed: int) -> PairStatistics:
        given = self.ridge.statistics
        if self.kind != "shuffled":
            return given
        if len(given.sample.rows) < 2:
            raise InputError("a shuffled map needs a sample of the pairs; n_sample is too small")
        return shuffled_pairs(given, seed)

    def _set(self, total: Moments, solve: Callable[[Moments], Tensor], rank: int | None) -> "ComparisonMap":
        self.W, self.rank, self.cv = solve(total), rank, None
        self.source_mean, self.target_mean = total.source_mean, total.target_mean
        return self

    def _solver(self, lambda_: float, rank: int | None) -> Callable[[Moments], Tensor]:
        """Return the function from moments to W."""
        if self.kind == "procrustes":
            return procrustes
        absolute = self.ridge.absolute_lambda
        if self.kind == "shuffled":
            return lambda moments: solve_ridge(moments, absolute(lambda_, moments.gram))
        return lambda moments: reduced_rank_ridge(moments, absolute(lambda_, moments.gram), rank)

    def _best_rank(self, splits: Sequence[tuple[Moments, Moments]], lambda_: float) -> int:
        """Return the rank with the least held-out error; all ranks cost one decomposition a fold."""
        gains = torch.zeros(min(self.ridge.d_source, self.ridge.d_target), dtype=torch.float64)
        for train, test in splits:
            lambda_absolute = self.ridge.absolute_lambda(lambda_, train.gram)
            W, axes = _ridge_and_axes(train, lambda_absolute)
            axes = axes[:, : len(gains)]
            mapped, cross = W @ axes, test.cross @ axes
            gains += 2 * (mapped * cross).sum(0) - (mapped * (test.gram @ mapped)).sum(0)
        return int(gains.cumsum(0).argmax()) + 1

    def _checked_rank(self, rank: int | None) -> int | None:
        highest = min(self.ridge.d_source, self.ridge.d_target)
        if self.kind != "reduced_rank":
            if rank is not None:
                raise InputError(f"rank is {rank}, but a {self.kind} map has none; leave it out")
        elif rank is None or not 1 <= rank <= highest:
            raise InputError(f"rank is {rank}, expected 1 to {highest}; cross_validate() chooses one")
        return rank

    def _fitted_W(self) -> Tensor:
        if self.W is None:
            raise InputError("the map is not fitted; call fit() or cross_validate() first")
        return self.W


def maps_table(ridge: RidgeMapping, others: Iterable[ComparisonMap]) -> list[dict[str, Any]]:
    """Return a row for each cross-validated map: what it is, its held-out R2 and retrieval accuracy."""
    cv = ridge.cv
    rows = [
        {
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
    ]
    names = [name for name in rows[0] if name != "map"]
    return [*rows, *({"map": other.kind, **{name: other.cv[name] for name in names}} for other in others)]


def procrustes(moments: Moments) -> Tensor:
    """Return scale * R with orthonormal rows (or columns, if the target is narrower), (d_source, d_target).

    With the singular value decomposition X'Y = U S V', R = U V' maximises the inner product of
    X R and Y (Schoenemann 1966); the scale tr(S) / ||X R||^2 is the best one for this R.
    Raises InputError if the source activations are constant.
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


def main() -> None:
    """Check that each kind finds what it can: a rotation, a low rank, and nothing."""
    generator = torch.Generator().manual_seed(0)
    H_source = torch.randn(2000, 20, generator=generator, dtype=torch.float64) + 3
    rotation = torch.linalg.qr(torch.randn(30, 20, generator=generator, dtype=torch.float64)).Q.T
    noise = 0.01 * torch.randn(2000, 30, generator=generator, dtype=torch.float64)
    rotated = ComparisonMap("procrustes", 20, 30)
    rotated.cross_validate(H_source, 7 * H_source @ rotation + noise - 1)
    assert torch.allclose(rotated.W, 7 * rotation, atol=0.01)
    thin = torch.randn(20, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 30, generator=generator, dtype=torch.float64
    )
    low = ComparisonMap("reduced_rank", 20, 30)
    low.cross_validate(H_source, H_source @ thin + noise)
    assert low.rank == 3
    assert low.cv["r2"] > 0.999
    nothing = ComparisonMap("shuffled", 20, 30)
    nothing.cross_validate(H_source, H_source @ thin + noise)
    assert abs(nothing.cv["r2"]) < 0.05
    print(f"comparison_maps OK: rotation found, rank {low.rank} found, shuffled R2 {nothing.cv['r2']:.3f}")


if __name__ == "__main__":
    main()

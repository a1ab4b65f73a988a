"""Fit linear maps from source to target activations (phase 2).

Rows are paired positions: (n, d_source) and (n, d_target). All arithmetic is float64
and every system is solved, never inverted.

Activations have an intercept (both sides are centred); directions have none, since the
difference of two activations cancels it. So `predict` adds it and `transform` does not
(Chen et al., arXiv 2506.06609).
"""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artifacts import load_tensors, save_tensors
from errors import InputError

logger = logging.getLogger(__name__)

DEFAULT_LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0)
RANK_THRESHOLD = 0.01


@dataclass(frozen=True)
class HeldOut:
    """Held-out error of one choice of lambda, pooled over folds.

    mse: mean squared error per row and dimension, in squared units of the target.
    r2: 1 - residual / total sum of squares, all dimensions together, so that dimensions of
        large variance dominate. The total is taken around the training folds' mean.
    r2_per_dimension: (d_target,) the same for each dimension alone.
    """

    mse: float
    r2: float
    r2_per_dimension: Tensor


class RidgeMapping:
    """A ridge regression W from source to target activations, fitted with an intercept.

    Minimises ||Y - X @ W||^2 + lambda * ||W||^2 for centred X (n, d_source) and Y (n, d_target),
    so W = solve(X'X + lambda I, X'Y) (Hoerl & Kennard 1970; specification, "Ridge Regression").

    lambda_unit: `absolute`, or `relative`: multiples of the mean diagonal of X'X, which makes
        a value mean the same for models with other activation scales and other n.
    After `fit` or `cross_validate`: W (d_source, d_target) float64, source_mean, target_mean,
    lambda_ (as given), lambda_absolute.
    """

    def __init__(self, d_source: int, d_target: int, lambda_unit: str = "absolute") -> None:
        if lambda_unit not in ("absolute", "relative"):
            raise InputError(f"lambda_unit {lambda_unit!r} is unknown; choose 'absolute' or 'relative'")
        if d_source < 1 or d_target < 1:
            raise InputError(f"widths are {d_source} and {d_target}, expected positive integers")
        self.d_source = d_source
        self.d_target = d_target
        self.lambda_unit = lambda_unit
        self.W: Tensor | None = None
        self.source_mean: Tensor | None = None
        self.target_mean: Tensor | None = None
        self.lambda_: float | None = None
        self.lambda_absolute: float | None = None
        self.n: int = 0
        self.gram_eigenvalues: Tensor | None = None
        self.cv: dict[str, Any] | None = None

    def fit(self, H_source: Tensor, H_target: Tensor, lambda_: float = 1.0) -> "RidgeMapping":
        """Fit W and the means; returns self.

        H_source: (n, d_source), H_target: (n, d_target), any float dtype; solved in float64.
        Raises InputError: shapes that don't match, n < 2, lambda_ <= 0, non-finite input.
        """
        source, target = self._checked(H_source, H_target)
        _check_lambda(lambda_)
        source_mean, target_mean = source.mean(0), target.mean(0)
        centred_source, centred_target = source - source_mean, target - target_mean
        gram = centred_source.T @ centred_source
        lambda_absolute = self._absolute(lambda_, gram)
        self.W = _solve(gram, centred_source.T @ centred_target, lambda_absolute)
        self.source_mean, self.target_mean = source_mean, target_mean
        self.lambda_, self.lambda_absolute = float(lambda_), lambda_absolute
        self.gram_eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
        self.n = len(source)
        self.cv = None
        return self

    def cross_validate(
        self,
        H_source: Tensor,
        H_target: Tensor,
        lambda_values: Sequence[float] = DEFAULT_LAMBDAS,
        n_folds: int = 5,
        groups: Sequence[Hashable] | Tensor | None = None,
        seed: int = 0,
    ) -> tuple[float, dict[float, float]]:
        """Choose lambda by held-out error, then fit on all rows at the best one.

        groups: a document id for each row; a document is never split over folds.
        Returns (best_lambda, {lambda: held-out mean squared error}). `cv` then holds the same
        with R2, the folds' sizes, and a control: rows of the target shuffled, scored at
        whichever lambda suits it best.
        Raises InputError: as `fit`, no lambda values, fewer than 2 folds, or fewer groups than folds.
        """
        source, target = self._checked(H_source, H_target)
        if not lambda_values:
            raise InputError("lambda_values is empty; give at least one value")
        values = sorted({float(value) for value in lambda_values})
        for value in values:
            _check_lambda(value)
        folds = assign_folds(len(source), n_folds, groups, seed)
        held_out = self._held_out(source, target, values, folds)
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
        shuffled = self._held_out(source, target[order], values, folds)
        best = min(values, key=lambda value: held_out[value].mse)
        self.fit(source, target, best)
        at_edge = len(values) > 1 and best in (values[0], values[-1])
        if at_edge:
            logger.warning("the best lambda %g is at the edge of the grid; widen lambda_values", best)
        self.cv = {
            "lambda_unit": self.lambda_unit,
            "lambda_values": values,
            "best_lambda": best,
            "best_lambda_absolute": self.lambda_absolute,
            "best_at_edge": at_edge,
            "n_rows": len(source),
            "n_folds": n_folds,
            "fold_sizes": torch.bincount(folds, minlength=n_folds).tolist(),
            "n_groups": len(set(_labels(len(source), groups))),
            "errors": {value: held_out[value].mse for value in values},
            "r2": {value: held_out[value].r2 for value in values},
            "best_r2": held_out[best].r2,
            "best_r2_median_dimension": held_out[best].r2_per_dimension.median().item(),
            "best_r2_per_dimension": held_out[best].r2_per_dimension.tolist(),
            "shuffled_r2": max(result.r2 for result in shuffled.values()),
        }
        return best, self.cv["errors"]

    def transform(self, v_source: Tensor) -> Tensor:
        """Map directions, (d_source,) or (n, d_source), to the target, without intercept.

        Keeps device and floating dtype. Raises InputError: a wrong width, or a map that is not fitted.
        """
        self._check_width(v_source, self.d_source, "v_source")
        W = self._fitted_W().to(v_source.device)
        return (v_source.double() @ W).to(_float_dtype(v_source))

    def predict(self, H_source: Tensor) -> Tensor:
        """Map activations, (d_source,) or (n, d_source), to the target, with intercept.

        Keeps device and floating dtype. Raises InputError: a wrong width, or a map that is not fitted.
        """
        self._check_width(H_source, self.d_source, "H_source")
        W = self._fitted_W().to(H_source.device)
        centred = H_source.double() - self.source_mean.to(H_source.device)
        return (centred @ W + self.target_mean.to(H_source.device)).to(_float_dtype(H_source))

    def analyze(self) -> dict[str, Any]:
        """Describe the fitted map.

        singular_values: of W, descending. effective_rank: how many exceed 1 % of the largest
        (specification, "Analysis via SVD"). df: effective degrees of freedom of each target
        dimension, sum of s / (s + lambda) over the eigenvalues s of the centred Gram matrix.
        held_out_r2, held_out_r2_median_dimension, shuffled_r2: from `cross_validate`, None
        if the map was fitted without it.
        """
        singular_values = torch.linalg.svdvals(self._fitted_W())
        eigenvalues = self.gram_eigenvalues
        cv = self.cv or {}
        return {
            "n": self.n,
            "lambda": self.lambda_,
            "lambda_absolute": self.lambda_absolute,
            "singular_values": singular_values.tolist(),
            "effective_rank": int((singular_values > RANK_THRESHOLD * singular_values[0]).sum()),
            "df": (eigenvalues / (eigenvalues + self.lambda_absolute)).sum().item(),
            "held_out_r2": cv.get("best_r2"),
            "held_out_r2_median_dimension": cv.get("best_r2_median_dimension"),
            "shuffled_r2": cv.get("shuffled_r2"),
        }

    def save(self, path: str | Path, fingerprint: str = "") -> None:
        """Write the fitted map to a `.pt` file in one step."""
        names = ("source_mean", "target_mean", "lambda_", "lambda_absolute", "n", "gram_eigenvalues", "cv")
        content = {name: getattr(self, name) for name in names}
        widths = {"d_source": self.d_source, "d_target": self.d_target, "lambda_unit": self.lambda_unit}
        save_tensors(Path(path), {"fingerprint": fingerprint, **widths, "W": self._fitted_W(), **content})

    @classmethod
    def load(cls, path: str | Path) -> "RidgeMapping":
        """Read a map that `save` wrote. Raises InputError if the file is damaged or something else."""
        return cls.from_content(load_tensors(Path(path)), str(path))

    @classmethod
    def from_content(cls, content: dict[str, Any], name: str = "content") -> "RidgeMapping":
        """Make a map from what `save` wrote, already loaded."""
        try:
            mapping = cls(content["d_source"], content["d_target"], content["lambda_unit"])
            for key in ("W", "source_mean", "target_mean", "lambda_", "lambda_absolute"):
                setattr(mapping, key, content[key])
            for key in ("n", "gram_eigenvalues", "cv"):
                setattr(mapping, key, content[key])
        except KeyError as error:
            raise InputError(f"{name} has no entry {error}; it is not a ridge mapping") from error
        return mapping

    def _held_out(
        self, source: Tensor, target: Tensor, values: list[float], folds: Tensor
    ) -> dict[float, HeldOut]:
        """Return the pooled held-out error of every lambda; each fold is centred on its training rows."""
        residual = {value: torch.zeros(self.d_target, dtype=torch.float64) for value in values}
        total = torch.zeros(self.d_target, dtype=torch.float64)
        for fold in range(int(folds.max()) + 1):
            train, test = folds != fold, folds == fold
            source_mean, target_mean = source[train].mean(0), target[train].mean(0)
            centred_source, centred_target = source[train] - source_mean, target[train] - target_mean
            gram, cross = centred_source.T @ centred_source, centred_source.T @ centred_target
            test_source, test_target = source[test] - source_mean, target[test] - target_mean
            total += test_target.pow(2).sum(0)
            for value in values:
                W = _solve(gram, cross, self._absolute(value, gram))
                residual[value] += (test_target - test_source @ W).pow(2).sum(0)
        return {
            value: HeldOut(
                mse=(residual[value].sum() / (len(target) * self.d_target)).item(),
                r2=1 - (residual[value].sum() / total.sum()).item(),
                r2_per_dimension=1 - residual[value] / total.clamp(min=torch.finfo(torch.float64).tiny),
            )
            for value in values
        }

    def _absolute(self, lambda_: float, gram: Tensor) -> float:
        if self.lambda_unit == "absolute":
            return float(lambda_)
        mean_diagonal = gram.diagonal().mean().item()
        if mean_diagonal <= 0:
            raise InputError("the source activations are constant, so a relative lambda has no unit")
        return float(lambda_) * mean_diagonal

    def _fitted_W(self) -> Tensor:
        if self.W is None:
            raise InputError("the mapping is not fitted; call fit() or cross_validate() first")
        return self.W

    def _checked(self, H_source: Tensor, H_target: Tensor) -> tuple[Tensor, Tensor]:
        self._check_width(H_source, self.d_source, "H_source")
        self._check_width(H_target, self.d_target, "H_target")
        if H_source.ndim != 2 or H_target.ndim != 2 or len(H_source) != len(H_target):
            raise InputError(
                f"H_source {tuple(H_source.shape)} and H_target {tuple(H_target.shape)} must be "
                "matrices with one row for each pair"
            )
        if len(H_source) < 2:
            raise InputError(f"got {len(H_source)} pairs, expected 2 or more")
        for name, values in (("H_source", H_source), ("H_target", H_target)):
            broken = (~values.isfinite()).any(1).nonzero().flatten().tolist()
            if broken:
                raise InputError(f"{name} has {len(broken)} rows that are not finite, first row {broken[0]}")
        return H_source.double().cpu(), H_target.double().cpu()

    @staticmethod
    def _check_width(values: Tensor, width: int, name: str) -> None:
        if values.ndim not in (1, 2) or values.shape[-1] != width:
            raise InputError(f"{name} has shape {tuple(values.shape)}, expected ({width},) or (n, {width})")


def assign_folds(
    n: int, n_folds: int, groups: Sequence[Hashable] | Tensor | None = None, seed: int = 0
) -> Tensor:
    """Return a fold number for each row, (n,) int64; rows of one group share a fold.

    Groups are shuffled, then each goes to the fold with the fewest rows so far.
    Raises InputError: fewer than 2 folds, fewer groups than folds, or a wrong number of groups.
    """
    if groups is not None and len(groups) != n:
        raise InputError(f"got {len(groups)} groups for {n} rows; give one for each row")
    labels = _labels(n, groups)
    members: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    if n_folds < 2 or len(members) < n_folds:
        raise InputError(
            f"{n_folds} folds over {len(members)} groups: need 2 folds or more and at least as many "
            "groups as folds; lower n_folds or give more documents"
        )
    distinct = list(members.values())
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    folds = torch.empty(n, dtype=torch.int64)
    sizes = [0] * n_folds
    for group in sorted((distinct[place] for place in order), key=len, reverse=True):
        smallest = sizes.index(min(sizes))
        folds[group] = smallest
        sizes[smallest] += len(group)
    return folds


def _labels(n: int, groups: Sequence[Hashable] | Tensor | None) -> list[Hashable]:
    if groups is None:
        return list(range(n))
    # The elements of a tensor are all different as dictionary keys.
    return groups.tolist() if isinstance(groups, Tensor) else list(groups)


def _solve(gram: Tensor, cross: Tensor, lambda_absolute: float) -> Tensor:
    return torch.linalg.solve(gram + lambda_absolute * torch.eye(len(gram), dtype=gram.dtype), cross)


def _float_dtype(values: Tensor) -> torch.dtype:
    return values.dtype if values.is_floating_point() else torch.float32


def _check_lambda(lambda_: float) -> None:
    if not (lambda_ > 0 and lambda_ < float("inf")):
        raise InputError(f"lambda is {lambda_}, expected a finite number above 0")


def main() -> None:
    """Check on synthetic pairs that a known map is found and that a shuffled one is not."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    H_source = torch.randn(1500, 40, generator=generator, dtype=torch.float64) * 3 + 5
    noise = 0.1 * torch.randn(1500, 60, generator=generator, dtype=torch.float64)
    H_target = H_source @ truth + noise + 7
    mapping = RidgeMapping(40, 60)
    best, errors = mapping.cross_validate(H_source, H_target)
    analysis = mapping.analyze()
    assert best == min(errors, key=errors.get)
    assert torch.allclose(mapping.W, truth, atol=0.02)
    assert torch.allclose(mapping.transform(torch.ones(40)).double(), truth.sum(0), atol=0.2)
    assert analysis["held_out_r2"] > 0.99
    assert analysis["shuffled_r2"] < 0.02
    print(
        f"ridge_mapping OK: held-out R2 {analysis['held_out_r2']:.4f}, "
        f"shuffled pairs {analysis['shuffled_r2']:.4f}, df {analysis['df']:.1f}"
    )


if __name__ == "__main__":
    main()

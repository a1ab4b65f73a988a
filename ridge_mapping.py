"""Fit linear maps from source to target activations (phase 2).

Rows are paired positions: (n, d_source) and (n, d_target). The map and its held-out error
are computed from the sums in `pair_statistics`, in float64, so memory does not grow with n.
Systems are solved, never inverted. What depends on the source's activations alone, its eigendecompositions,
is computed once for all maps from them.

Activations have an intercept (both sides are centred); directions have none, since the
difference of two activations cancels it. So `predict` adds it and `transform` does not
(Chen et al., arXiv 2506.06609).
"""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.artifacts import load_tensors, save_tensors
from support.errors import InputError
from support.pair_statistics import Moments, PairStatistics, group_labels
from support.vocabulary import LAMBDA_CRITERIA, LAMBDA_UNITS

logger = logging.getLogger(__name__)

DEFAULT_LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0)
RANK_THRESHOLD = 0.01  # of the largest singular value; smaller ones don't count for the effective rank
N_RETRIEVAL = 1000  # sampled pairs; retrieval compares each with all others
HELD_OUT_R2 = ("r2", "r2_standardised", "r2_median_dimension", "r2_per_dimension", "r2_per_component")
WELL_PREDICTED = 0.5  # held-out R2 from which a principal axis counts as well predicted
_SAVED = (
    *("source_layer", "target_layer", "source_model", "target_model", "source_mean", "target_mean"),
    *("target_components", "lambda_", "lambda_absolute", "n", "gram_eigenvalues", "cv"),
)


ABOUT = (
    "A ridge regression from activations of a source model to those of a target model. An activation h maps "
    "to (h - source_mean) @ W + target_mean, a direction v to v @ W, to be divided by its norm before "
    "steering. W: (d_source, d_target) float64. source_layer, target_layer: the decoder blocks whose "
    "outputs are mapped, counted from 0; the source has source_blocks of them. lambda_: in lambda_unit; "
    "lambda_absolute: what was added to the diagonal of the Gram matrix, whose eigenvalues are "
    "gram_eigenvalues. n: pairs. target_components: the principal axes of the target's activations in "
    "columns. cv: the cross-validation."
)


class HeldOutFold:
    """One held-out fold in the eigenbasis of the other folds' Gram matrix.

    With X'X = U diag(s) U' over the training folds, the ridge solution is
    U diag(1 / (s + lambda)) U'X'Y, so one decomposition serves every lambda: the held-out
    error is a quadratic form in the d_source numbers 1 / (s + lambda). (The spectral form
    of ridge regression: Hastie, Tibshirani & Friedman 2009, section 3.4.1.)

    train, test: moments that are both centred on the training folds' means.
    decomposed: a fold with the same Gram matrices, whose decomposition is used again.
    basis: U. cross: U'X'Y. test: the held-out moments in the basis, of which target_gram stays as it is.
    unit: the mean diagonal of X'X. A map in the basis is U'W.
    """

    def __init__(self, train: Moments, test: Moments, decomposed: "HeldOutFold | None" = None) -> None:
        self.source_mean, self.target_mean = train.source_mean, train.target_mean
        if decomposed is None:
            self.unit = train.gram.diagonal().mean().item()
            eigenvalues, self.basis = torch.linalg.eigh(train.gram)
            self.eigenvalues = eigenvalues.clamp(min=0)
            test_gram = self.basis.T @ test.gram @ self.basis
        else:
            self.unit, self.eigenvalues, self.basis = (
                decomposed.unit,
                decomposed.eigenvalues,
                decomposed.basis,
            )
            test_gram = decomposed.test.gram
        self.cross = self.basis.T @ train.cross
        self.test = replace(test, gram=test_gram, cross=self.basis.T @ test.cross)

    def error_path(self, lambdas: Sequence[float], weights: Tensor) -> Tensor:
        """Return the held-out sum of squares for each lambda, (len(lambdas),), in O(d_source^2) each.

        weights: (d_target,), one for each target dimension.
        """
        weighted = self.cross * weights
        linear = (weighted * self.test.cross).sum(1)
        quadratic = self.test.gram * (weighted @ self.cross.T)
        added = torch.tensor(lambdas, dtype=torch.float64).to(self.eigenvalues.device)
        filters = 1 / (self.eigenvalues + added[:, None])
        total = (self.test.target_gram.diagonal() * weights).sum()
        return total - 2 * filters @ linear + ((filters @ quadratic) * filters).sum(1)

    def ridge(self, lambda_absolute: float) -> Tensor:
        """Return the ridge regression fitted on the training folds, in the basis, (d_source, d_target)."""
        return self.cross / (self.eigenvalues + lambda_absolute)[:, None]

    def predict(self, mapped: Tensor, H_source: Tensor) -> Tensor:
        """Return the targets (n, d_target) that a map in the basis predicts of H_source (n, d_source)."""
        return (H_source - self.source_mean) @ self.basis @ mapped + self.target_mean


def held_out_folds(
    statistics: PairStatistics,
    device: torch.device | str = "cpu",
    decomposed: "Sequence[HeldOutFold] | None" = None,
) -> list[HeldOutFold]:
    """Return every fold of the pairs, held out, on a device.

    decomposed: folds of the same source activations, whose decompositions are used again.
    """
    found = []
    for fold in range(statistics.n_folds):
        train, test = (moments.to(device) for moments in statistics.split(fold))
        found.append(HeldOutFold(train, test, decomposed[fold] if decomposed else None))
    return found


def residual_squares(fold: Moments, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return the residual and the total sum of squares of a map on held-out pairs, (d_target,) each.

    fold: moments of these pairs around the training means. W: (d_source, d_target).
    """
    total = fold.target_gram.diagonal()
    return total - 2 * (W * fold.cross).sum(0) + (W * (fold.gram @ W)).sum(0), total


def algebra_device(device: torch.device) -> torch.device:
    """Return where the maps of models on a device are fitted: there if it is CUDA's; others lack float64."""
    return device if device.type == "cuda" else torch.device("cpu")


def target_weights(moments: Moments) -> Tensor:
    """Return 1 / variance of each target dimension, (d_target,); 0 where it is constant."""
    variance = moments.target_gram.diagonal() / moments.n
    scale = moments.target_mean.square() + variance
    constant = variance <= torch.finfo(torch.float64).eps * scale
    if constant.all():
        raise InputError("the target activations are constant; there is nothing to predict")
    return torch.where(constant, 0.0, 1 / variance.where(~constant, 1.0))


def retrieval_accuracy(predicted: Tensor, true: Tensor, weights: Tensor) -> float:
    """Return how often a predicted activation is nearer to its own true one than to any other.

    predicted, true: (n, d_target). weights: (d_target,), for the squared differences. Chance is 1 / n.
    """
    scale = weights.sqrt()
    distances = torch.cdist(predicted.double() * scale, true.double() * scale)
    return (distances.argmin(1) == torch.arange(len(true), device=true.device)).double().mean().item()


class RidgeMapping:
    """A ridge regression W from source to target activations, fitted with an intercept.

    Minimises ||Y - X @ W||^2 + lambda * ||W||^2 for centred X (n, d_source) and Y (n, d_target),
    so W = solve(X'X + lambda I, X'Y) (Hoerl & Kennard 1970; specification, "Ridge Regression").

    Give all pairs to `fit` or `cross_validate`, or sum them up in pieces with `PairStatistics.add`, make the
    map `from_statistics` and call these without pairs: the result is the same to rounding.

    lambda_unit: `absolute`, or `relative`: multiples of the mean diagonal of X'X, which gives
        a value the same meaning for models with other activation scales and other n.
    source_layer, target_layer, source_model, target_model, source_blocks (the source model's number of
        blocks): where the activations come from, None if the caller does not set them. They are saved, so
        that a map can be used alone.
    device: where the algebra is done, in float64; what it leaves is on the CPU.
    Memory: what `PairStatistics` needs; `cross_validate` takes twice as much again, until `forget_pairs`.
    After `fit` or `cross_validate`: W (d_source, d_target) float64, source_mean, target_mean,
    lambda_ (as given), lambda_absolute, target_components (d_target, d_target): the principal
    axes of the target activations in columns, largest variance first.
    """

    def __init__(self, d_source: int, d_target: int, lambda_unit: str = "absolute") -> None:
        if lambda_unit not in LAMBDA_UNITS:
            raise InputError(f"lambda_unit {lambda_unit!r} is unknown; choose 'absolute' or 'relative'")
        self.d_source, self.d_target, self.lambda_unit = d_source, d_target, lambda_unit
        self.device = torch.device("cpu")
        self.statistics: PairStatistics | None = None
        self.folds: list[HeldOutFold] = []
        self.shuffled: tuple[PairStatistics, list[HeldOutFold]] | None = None  # of the control
        self.source_layer: int | None = None
        self.target_layer: int | None = None
        self.source_model: str | None = None
        self.target_model: str | None = None
        self.source_blocks: int | None = None
        self.W: Tensor | None = None
        self.source_mean: Tensor | None = None
        self.target_mean: Tensor | None = None
        self.target_components: Tensor | None = None
        self.lambda_: float | None = None
        self.lambda_absolute: float | None = None
        self.n: int = 0
        self.gram_eigenvalues: Tensor | None = None
        self.cv: dict[str, Any] | None = None

    @classmethod
    def from_statistics(
        cls,
        statistics: PairStatistics,
        lambda_unit: str = "absolute",
        device: torch.device | str = "cpu",
    ) -> "RidgeMapping":
        """Make an unfitted map on pairs that are summed elsewhere; the statistics are shared."""
        mapping = cls(statistics.d_source, statistics.d_target, lambda_unit)
        mapping.statistics, mapping.device = statistics, torch.device(device)
        return mapping

    def forget_pairs(self) -> None:
        """Let go of the statistics and of all that was computed to fit."""
        self.statistics, self.folds, self.shuffled = None, [], None

    def fit(
        self, H_source: Tensor | None = None, H_target: Tensor | None = None, lambda_: float = 1.0
    ) -> "RidgeMapping":
        """Fit W and the means; returns self.

        H_source: (n, d_source), H_target: (n, d_target), any float dtype; solved in float64.
        Without them, the map's statistics are used.
        Raises InputError: shapes that don't match, n < 2, lambda_ <= 0, non-finite input.
        """
        (lambda_,) = _checked_lambdas([lambda_])
        if self._has_pairs(H_source, H_target):
            self.statistics = PairStatistics(self.d_source, self.d_target).add(H_source, H_target)
        moments = self.statistics.total().to(self.device)
        self._solve(moments, lambda_)
        self.gram_eigenvalues = torch.linalg.eigvalsh(moments.gram).clamp(min=0).cpu()
        self.target_components = torch.linalg.eigh(moments.target_gram).eigenvectors.flip(1).cpu()
        return self

    def _solve(self, moments: Moments, lambda_: float) -> None:
        unit = moments.gram.diagonal().mean().item()
        self.lambda_, self.lambda_absolute = lambda_, self.absolute_lambda(lambda_, unit)
        self.W = solve_ridge(moments, self.lambda_absolute).cpu()
        self.source_mean, self.target_mean = moments.source_mean.cpu(), moments.target_mean.cpu()
        self.n, self.cv = moments.n, None

    def cross_validate(
        self,
        H_source: Tensor | None = None,
        H_target: Tensor | None = None,
        lambda_values: Sequence[float] = DEFAULT_LAMBDAS,
        n_folds: int = 5,
        groups: Sequence[Hashable] | Tensor | None = None,
        seed: int = 0,
        criterion: str = "pooled",
        beside: "RidgeMapping | None" = None,
        is_control: bool = False,
    ) -> tuple[float, dict[float, float]]:
        """Choose lambda by held-out error, then fit on all pairs at the best one.

        n_folds, groups, seed: how to split the pairs; statistics have folds of their own.
        groups: a document id for each row; a document is never split over folds.
        criterion: `pooled`: squared error over all target dimensions, in which those of large
            variance dominate; `standardised`: every target dimension scaled to variance 1.
        beside: a map that was cross-validated on the same source activations and has not forgotten its pairs;
            what depends on these alone is taken over from it.
        is_control: leave out the principal axes, the degrees of freedom and shuffled pairs.
        Returns (best_lambda, {lambda: held-out mean squared error}). `cv` then also holds
        R2, by dimension and by principal component, retrieval accuracy, the folds' sizes, and a
        control: shuffled pairs, scored at the lambda that suits them best.
        Raises InputError: as `fit`, no lambda values, fewer than 2 folds, or fewer groups than folds.
        """
        values = _checked_lambdas(lambda_values)
        if criterion not in LAMBDA_CRITERIA:
            raise InputError(f"criterion {criterion!r} is unknown; choose {' or '.join(LAMBDA_CRITERIA)}")
        if self._has_pairs(H_source, H_target):
            folds_of_rows = assign_folds(len(H_source), n_folds, groups, seed)
            statistics = PairStatistics(self.d_source, self.d_target, n_folds, seed)
            self.statistics = statistics.add(H_source, H_target, groups, folds_of_rows)
        total = self.statistics.total().to(self.device)
        weights = target_weights(total)
        self.folds = held_out_folds(self.statistics, self.device, beside and beside.folds)
        pooled, squares = self._error_path(self.folds, values, torch.ones_like(weights))
        standardised, weighted_squares = self._error_path(self.folds, values, weights)
        best = values[int((pooled if criterion == "pooled" else standardised).argmin())]
        at_edge = len(values) > 1 and best in (values[0], values[-1])
        if at_edge:
            logger.warning("the best lambda %g is at the edge of the grid; widen lambda_values", best)

        def by_lambda(numbers: Tensor) -> dict[float, float]:
            return dict(zip(values, numbers.tolist(), strict=True))

        r2, r2_standardised = by_lambda(1 - pooled / squares), by_lambda(1 - standardised / weighted_squares)
        cv = {
            "lambda_unit": self.lambda_unit,
            "lambda_values": values,
            "criterion": criterion,
            "best_lambda": best,
            "best_at_edge": at_edge,
            "n_rows": total.n,
            "n_folds": self.statistics.n_folds,
            "seed": self.statistics.seed,
            "fold_sizes": self.statistics.n.tolist(),
            "n_groups": self.statistics.n_groups,
            "errors": by_lambda(pooled / (total.n * self.d_target)),
            "r2": r2,
            "r2_standardised": r2_standardised,
            "best_r2": r2[best],
            "best_r2_standardised": r2_standardised[best],
        }
        if is_control:
            self._solve(total, best)
        else:
            self.fit(lambda_=best)
            unit = total.gram.diagonal().mean().item()
            by_value = {value: self.absolute_lambda(value, unit) for value in values}
            cv["df"] = {value: self._degrees_of_freedom(absolute) for value, absolute in by_value.items()}
            cv |= self._per_component(best) | self._shuffled_control(values, beside)
        self.cv = {**cv, "best_lambda_absolute": self.lambda_absolute, **self._details(best, weights)}
        return best, self.cv["errors"]

    def transform(self, v_source: Tensor) -> Tensor:
        """Map directions, (d_source,) or (n, d_source), to the target, without intercept.

        The map changes the length of a unit vector, often several times: divide by the norm before steering,
        or alpha means another steering strength. Keeps device and floating dtype.
        Raises InputError: a wrong width, or a map that is not fitted.
        """
        return map_directions(self._fitted_W(), v_source)

    def predict(self, H_source: Tensor) -> Tensor:
        """Map activations, (d_source,) or (n, d_source), to the target, with intercept.

        Keeps device and floating dtype. Raises InputError: a wrong width, or a map that is not fitted.
        """
        return map_activations(self._fitted_W(), self.source_mean, self.target_mean, H_source)

    def analyze(self) -> dict[str, Any]:
        """Describe the fitted map.

        effective_rank counts the singular values of W over 1 % of the largest (specification,
        "Analysis via SVD"). df is the effective degrees of freedom of each target dimension, the sum
        of s / (s + lambda) over the eigenvalues s of the centred Gram matrix. The held-out numbers
        come from `cross_validate` and are None if the map was fitted without it; those per component
        are along the target's principal axes.
        """
        singular_values = torch.linalg.svdvals(self._fitted_W())
        cv = self.cv or {}
        return {
            "n": self.n,
            "lambda": self.lambda_,
            "lambda_absolute": self.lambda_absolute,
            "singular_values": singular_values.tolist(),
            "effective_rank": int((singular_values > RANK_THRESHOLD * singular_values[0]).sum()),
            "df": self._degrees_of_freedom(self.lambda_absolute),
            **{f"held_out_{name}": cv.get(f"best_{name}") for name in HELD_OUT_R2},
            **{name: cv.get(name) for name in ("retrieval_accuracy", "retrieval_n", "shuffled_r2")},
        }

    def predicted_energy(self, v_target: Tensor) -> dict[str, float]:
        """Return how much of a target direction lies where the map predicts well.

        v_target: (d_target,), not 0. Its squared length is split over the principal axes of the target's
        activations. mean_r2 is the mean of the axes' held-out R2 (negative ones as 0), weighted by
        these shares; share_well_predicted is the share on axes with an R2 of 0.5 or more. The map must
        be cross-validated.
        """
        shares, r2 = self._energy_shares(v_target)
        return {
            "mean_r2": (shares @ r2.clamp(min=0)).item(),
            "share_well_predicted": shares[r2 >= WELL_PREDICTED].sum().item(),
        }

    def energy_curve(self, v_target: Tensor) -> dict[str, list[float]]:
        """Return the share of v_target's energy on axes with at least a given R2, at 101 levels from 0 to 1.

        See `predicted_energy`. `activations` has the same shares of the target activations' variance.
        """
        shares, r2 = self._energy_shares(v_target)
        variance = torch.tensor(self.cv["component_variance"], dtype=torch.float64)
        levels = torch.linspace(0, 1, 101, dtype=torch.float64)
        reached = (r2 >= levels[:, None]).double()
        return {
            "r2": levels.tolist(),
            "vector": (reached @ shares).tolist(),
            "activations": (reached @ variance).tolist(),
        }

    def _energy_shares(self, v_target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of v_target's squared length on the principal axes, and the axes' R2."""
        energy = (v_target.double().cpu() @ self.target_components).square()
        return energy / energy.sum(), torch.tensor(self.cv["best_r2_per_component"], dtype=torch.float64)

    def save(self, path: str | Path, fingerprint: str = "") -> None:
        """Write the fitted map, without its statistics, to a `.pt` file in one step."""
        content = {"W": self._fitted_W(), "source_blocks": self.source_blocks}
        content |= {name: getattr(self, name) for name in _SAVED}
        widths = {"d_source": self.d_source, "d_target": self.d_target, "lambda_unit": self.lambda_unit}
        save_tensors(Path(path), {"fingerprint": fingerprint, "about": ABOUT, **widths, **content})

    @classmethod
    def load(cls, path: str | Path) -> "RidgeMapping":
        """Read a map that `save` wrote. Raises InputError: the file is damaged or holds something else."""
        return cls.from_content(load_tensors(Path(path)), str(path))

    @classmethod
    def from_content(cls, content: dict[str, Any], name: str = "content") -> "RidgeMapping":
        """Make a map from the loaded content of a file that `save` wrote."""
        try:
            mapping = cls(content["d_source"], content["d_target"], content["lambda_unit"])
            for key in ("W", *_SAVED):
                setattr(mapping, key, content[key])
            mapping.source_blocks = content.get("source_blocks")  # files of earlier versions lack it
        except KeyError as error:
            raise InputError(f"{name} has no entry {error}; it is not a ridge mapping") from error
        return mapping

    def _has_pairs(self, H_source: Tensor | None, H_target: Tensor | None) -> bool:
        """Return whether pairs are given. Raises InputError: one side alone, or neither and no statistics."""
        if (H_source is None) != (H_target is None) or (H_source is None and self.statistics is None):
            raise InputError("give both H_source and H_target, or neither to a map made from_statistics")
        return H_source is not None

    def _error_path(
        self, folds: Sequence[HeldOutFold], values: Sequence[float], weights: Tensor
    ) -> tuple[Tensor, float]:
        """Return the held-out sum of squares for each lambda, over all folds, and the total."""
        errors = torch.zeros(len(values), dtype=torch.float64)
        total = 0.0
        for fold in folds:
            lambdas = [self.absolute_lambda(value, fold.unit) for value in values]
            errors += fold.error_path(lambdas, weights).cpu()
            total += (fold.test.target_gram.diagonal() * weights).sum().item()
        return errors, total

    def _solved(self, lambda_: float) -> list[tuple[HeldOutFold, Tensor]]:
        return [(fold, fold.ridge(self.absolute_lambda(lambda_, fold.unit))) for fold in self.folds]

    def _per_component(self, best: float) -> dict[str, Any]:
        """Return what the best lambda predicts along the principal axes of the target."""
        axes = self.target_components.to(self.device)
        total = (axes * (sum(fold.test.target_gram for fold in self.folds) @ axes)).sum(0)
        predicted = torch.zeros_like(total)  # what the map takes off the sum of squares
        for fold, W in self._solved(best):
            predicted += ((W @ axes) * ((2 * fold.test.cross - fold.test.gram @ W) @ axes)).sum(0)
        # A principal axis without variance can be predicted by nothing; its R2 is set to 0.
        varying = total > torch.finfo(torch.float64).eps * total.max()
        r2 = torch.where(varying, predicted / total.where(varying, 1.0), 0.0)
        shares = total / total.sum()
        return {"best_r2_per_component": r2.tolist(), "component_variance": shares.tolist()}

    def _details(self, best: float, weights: Tensor) -> dict[str, Any]:
        """Return what the best lambda predicts, by dimension, and retrieval."""
        summary = held_out_summary(self.statistics, self._solved(best), weights)
        kept = ("n_constant_dimensions", "retrieval_accuracy", "retrieval_n")
        return {
            "best_r2_median_dimension": summary["r2_median_dimension"],
            "best_r2_per_dimension": summary["r2_per_dimension"],
            **{name: summary[name] for name in kept},
        }

    def _shuffled_control(self, values: Sequence[float], beside: "RidgeMapping | None") -> dict[str, Any]:
        """Return the best held-out R2 on shuffled pairs; None without a sample to shuffle."""
        if len(self.statistics.sample.rows) < 2:
            return {"shuffled_r2": None, "shuffled_best_lambda": None, "shuffled_n": 0}
        shuffled = shuffled_pairs(self.statistics, self.statistics.seed, device=self.device)
        folds = held_out_folds(shuffled, self.device, beside and beside.shuffled[1])
        self.shuffled = shuffled, folds
        weights = torch.ones(self.d_target, dtype=torch.float64, device=self.device)
        errors, total = self._error_path(folds, values, weights)
        best = int(errors.argmin())
        return {
            "shuffled_r2": 1 - errors[best].item() / total,
            "shuffled_best_lambda": values[best],
            "shuffled_n": shuffled.n_pairs,
        }

    def absolute_lambda(self, lambda_: float, unit: float) -> float:
        """Return lambda in the units of a Gram matrix whose mean diagonal is `unit`."""
        if self.lambda_unit == "absolute":
            return float(lambda_)
        if unit <= 0:
            raise InputError("the source activations are constant, so a relative lambda has no unit")
        return float(lambda_) * unit

    def _degrees_of_freedom(self, lambda_absolute: float) -> float:
        return (self.gram_eigenvalues / (self.gram_eigenvalues + lambda_absolute)).sum().item()

    def _fitted_W(self) -> Tensor:
        if self.W is None:
            raise InputError("the mapping is not fitted; call fit() or cross_validate() first")
        return self.W


def solve_ridge(moments: Moments, lambda_absolute: float) -> Tensor:
    """Return solve(X'X + lambda I, X'Y), (d_source, d_target) float64."""
    gram = moments.gram.clone()
    gram.diagonal().add_(lambda_absolute)
    return torch.linalg.solve(gram, moments.cross)


def map_directions(W: Tensor, v_source: Tensor) -> Tensor:
    """Return v_source @ W in the dtype and on the device of v_source, (d_source,) or (n, d_source)."""
    _check_width(v_source, W, "v_source")
    return (v_source.double() @ W.to(v_source.device)).to(_float_dtype(v_source))


def map_activations(W: Tensor, source_mean: Tensor, target_mean: Tensor, H_source: Tensor) -> Tensor:
    """Return (H_source - source_mean) @ W + target_mean in the dtype and on the device of H_source."""
    _check_width(H_source, W, "H_source")
    W, source_mean, target_mean = (item.to(H_source.device) for item in (W, source_mean, target_mean))
    return ((H_source.double() - source_mean) @ W + target_mean).to(_float_dtype(H_source))


def held_out_summary(
    statistics: PairStatistics, solved: Sequence[tuple[HeldOutFold, Tensor]], weights: Tensor
) -> dict[str, Any]:
    """Return R2 and retrieval accuracy over all folds, of maps that never saw their fold's pairs.

    solved: each fold, and its map in the fold's basis. weights: (d_target,), 1 / variance; 0 for a
    constant dimension, which has no R2.
    r2 is pooled over dimensions; for r2_standardised every dimension has variance 1. Retrieval is
    among at most 1,000 sampled pairs, in standardised dimensions.
    """
    squares = [residual_squares(fold.test, W) for fold, W in solved]
    residual, total = (sum(of_folds) for of_folds in zip(*squares, strict=True))
    varying = weights > 0
    per_dimension = 1 - residual[varying] / total[varying]
    return {
        "r2": 1 - (residual.sum() / total.sum()).item(),
        "r2_standardised": 1 - ((residual * weights).sum() / (total * weights).sum()).item(),
        "r2_median_dimension": per_dimension.median().item(),
        "r2_per_dimension": per_dimension.tolist(),
        "n_constant_dimensions": (~varying).sum().item(),
        **_held_out_retrieval(statistics, solved, weights),
    }


def _held_out_retrieval(
    statistics: PairStatistics, solved: Sequence[tuple[HeldOutFold, Tensor]], weights: Tensor
) -> dict[str, Any]:
    sample = statistics.sample
    order = torch.randperm(len(sample.rows), generator=torch.Generator().manual_seed(0))[:N_RETRIEVAL]
    source, target = (H[order].double().to(weights.device) for H in (sample.H_source, sample.H_target))
    predicted, folds = torch.empty_like(target), sample.folds[order].to(weights.device)
    for number, (fold, W) in enumerate(solved):
        rows = (folds == number).nonzero().flatten()
        predicted[rows] = fold.predict(W, source[rows])
    accuracy = retrieval_accuracy(predicted, target, weights) if len(order) else None
    return {"retrieval_accuracy": accuracy, "retrieval_n": len(order)}


def shuffled_pairs(
    statistics: PairStatistics, seed: int = 0, draw: int = 0, device: torch.device | str = "cpu"
) -> PairStatistics:
    """Return statistics of the sample with its target rows shuffled, a control that knows no relation.

    draw: the number of the shuffle under this seed, from 0; sources and their folds are the same in all.
    """
    sample = statistics.sample
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draw + 1):
        order = torch.randperm(len(sample.rows), generator=generator)
    n_folds = min(statistics.n_folds, len(order))
    shuffled = PairStatistics(statistics.d_source, statistics.d_target, n_folds, seed, device=device)
    return shuffled.add(sample.H_source, sample.H_target[order])


def assign_folds(
    n: int, n_folds: int, groups: Sequence[Hashable] | Tensor | None = None, seed: int = 0
) -> Tensor:
    """Return a fold number for each row, (n,) int64; rows of one group share a fold.

    Groups are shuffled and sorted by size; each goes to the fold with the fewest rows so far.
    Raises InputError: fewer than 2 folds, fewer groups than folds, or a wrong number of groups.
    """
    labels = group_labels(groups, n) or range(n)
    members: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    if n_folds < 2 or len(members) < n_folds:
        raise InputError(
            f"{n_folds} folds over {len(members)} groups: expected 2 folds or more and at least as many "
            "groups as folds; lower n_folds or give more documents"
        )
    distinct = list(members.values())
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    folds = torch.empty(n, dtype=torch.int64)
    sizes = [0] * n_folds
    for group in sorted((distinct[index] for index in order), key=len, reverse=True):
        smallest = sizes.index(min(sizes))
        folds[group] = smallest
        sizes[smallest] += len(group)
    return folds


def _check_width(values: Tensor, W: Tensor, name: str) -> None:
    if values.ndim not in (1, 2) or values.shape[-1] != len(W):
        raise InputError(f"{name} has shape {tuple(values.shape)}, expected ({len(W)},) or (n, {len(W)})")


def _float_dtype(values: Tensor) -> torch.dtype:
    return values.dtype if values.is_floating_point() else torch.float32


def _checked_lambdas(lambda_values: Sequence[float]) -> list[float]:
    """Return the distinct values in order. Raises InputError: none, or one that is not finite and above 0."""
    if not lambda_values:
        raise InputError("lambda_values is empty; give at least one value")
    for value in lambda_values:
        if not 0 < value < float("inf"):
            raise InputError(f"lambda is {value}, expected a finite number above 0")
    return sorted({float(value) for value in lambda_values})


def main() -> None:
    """Check on synthetic pairs that a known map is found, and none where pairs are shuffled."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    H_source = 3 * torch.randn(1500, 40, generator=generator, dtype=torch.float64) + 5
    mapping = RidgeMapping(40, 60)
    noise = torch.randn(1500, 60, generator=generator, dtype=torch.float64)  # without it, lambda 0 is best
    mapping.cross_validate(H_source, H_source @ truth + 7 + noise)
    analysis = mapping.analyze()
    assert torch.allclose(mapping.W, truth, atol=0.05)
    assert analysis["shuffled_r2"] < 0.02 < 0.99 < analysis["held_out_r2"]
    print(f"ridge_mapping OK: held-out R2 {analysis['held_out_r2']:.4f}, df {analysis['df']:.1f}")


if __name__ == "__main__":
    main()

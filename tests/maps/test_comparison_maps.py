"""Each kind of map finds what it can find, and equals a refit by another implementation."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from maps.comparison_maps import KINDS, ComparisonMap, at_rank, maps_table, procrustes
from ridge_mapping import RidgeMapping, assign_folds, solve_ridge
from support.artifacts import load_tensors, save_tensors
from support.errors import InputError
from support.pair_statistics import PairStatistics

N, D_SOURCE, D_TARGET, TRUE_RANK = 120, 8, 10, 3
LAMBDAS = [1e-3, 1.0, 30.0]
DOCUMENTS = [row // 4 for row in range(N)]


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def pairs():
    """A map of rank 3, with an intercept, noise, and source dimensions of different size."""
    H_source = gaussian(N, D_SOURCE) * torch.logspace(-0.5, 0.5, D_SOURCE, dtype=torch.float64) + 4
    truth = gaussian(D_SOURCE, TRUE_RANK, seed=1) @ gaussian(TRUE_RANK, D_TARGET, seed=2)
    return H_source, H_source @ truth + 0.8 * gaussian(N, D_TARGET, seed=3) - 7


def moments_of(H_source, H_target):
    return PairStatistics(H_source.shape[1], H_target.shape[1]).add(H_source, H_target).total()


def procrustes_of(*pairs):
    moments = moments_of(*pairs)
    return procrustes(moments.gram, moments.cross)


def reduced_rank_ridge(moments, alpha, rank):
    return at_rank(solve_ridge(moments, alpha), moments.cross, rank)


def cross_validated_ridge(H_source, H_target, seed=0):
    ridge = RidgeMapping(H_source.shape[1], H_target.shape[1])
    ridge.cross_validate(H_source, H_target, LAMBDAS, groups=DOCUMENTS, seed=seed)
    return ridge


@pytest.fixture(scope="module")
def ridge(pairs):
    return cross_validated_ridge(*pairs)


def centred(H):
    return (H - H.mean(0)).numpy()


def reduced_rank_reference(H_source, H_target, alpha, rank):
    """Ridge is least squares on data with sqrt(alpha) I appended; its fitted values are cut by SVD."""
    X = np.vstack([centred(H_source), np.sqrt(alpha) * np.eye(H_source.shape[1])])
    Y = np.vstack([centred(H_target), np.zeros((H_source.shape[1], H_target.shape[1]))])
    W = np.linalg.lstsq(X, Y, rcond=None)[0]
    axes = np.linalg.svd(X @ W)[2][:rank].T
    return W @ axes @ axes.T


@pytest.mark.parametrize("d_target", [5, 8, 10])
def test_procrustes_is_scipys_rotation_of_padded_activations_at_the_best_scale(pairs, d_target):
    H_source, H_target = pairs[0], pairs[1][:, :d_target]
    X, Y = centred(H_source), centred(H_target)
    padded = [np.pad(H, ((0, 0), (0, D_TARGET - H.shape[1]))) for H in (X, Y)]
    rotation = orthogonal_procrustes(*padded)[0][:D_SOURCE, :d_target]
    scale = (Y * (X @ rotation)).sum() / np.square(X @ rotation).sum()
    W = procrustes_of(H_source, H_target)
    assert np.allclose(W, scale * rotation, rtol=0, atol=1e-9)


@pytest.mark.parametrize("d_target", [5, 10])
def test_reduced_rank_is_the_best_map_of_that_rank_and_at_full_rank_ridge(pairs, d_target):
    H_source, H_target = pairs[0], pairs[1][:, :d_target]
    moments, highest = moments_of(H_source, H_target), min(D_SOURCE, d_target)
    for rank in (1, 3, highest - 1):
        W = reduced_rank_ridge(moments, 0.3, rank)
        assert np.linalg.matrix_rank(W.numpy(), tol=1e-8) == rank
        expected = reduced_rank_reference(H_source, H_target, 0.3, rank)
        assert np.allclose(W.numpy(), expected, rtol=0, atol=1e-9)
    ridge = RidgeMapping(D_SOURCE, d_target).fit(H_source, H_target, 2.0)
    assert torch.allclose(reduced_rank_ridge(moments, 2.0, highest), ridge.W, rtol=0, atol=1e-10)


def refitted(pairs, solve):
    """Residuals (n, d_target) of every fold's map and of its mean; solve: training pairs -> W."""
    folds, residual, total = assign_folds(N, 5, DOCUMENTS), *np.empty((2, *pairs[1].shape))
    for fold in range(5):
        train, test = folds != fold, folds == fold
        X, Y = ((H[test] - H[train].mean(0)).numpy() for H in pairs)
        residual[test], total[test] = Y - X @ np.asarray(solve(*(H[train] for H in pairs))), Y
    return residual, total


@pytest.mark.parametrize("d_target", [6, 10])
def test_the_rank_is_the_one_with_the_least_held_out_error(pairs, d_target):
    pairs = pairs[0], pairs[1][:, :d_target]
    ridge, errors = cross_validated_ridge(*pairs), []
    low = ComparisonMap.fitted("reduced_rank", ridge)
    for rank in range(1, 1 + min(D_SOURCE, d_target)):
        residual, total = refitted(pairs, partial(reduced_rank_reference, alpha=ridge.lambda_, rank=rank))
        errors.append(np.square(residual).sum() / np.square(total).sum())
    assert low.rank == low.cv["rank"] == np.argmin(errors) + 1 == TRUE_RANK
    assert 1 - low.cv["r2"] == pytest.approx(min(errors), rel=1e-9)
    assert np.linalg.matrix_rank(low.W.numpy(), tol=1e-8) == TRUE_RANK


@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_lambda_is_that_of_ridge_in_its_unit_and_procrustes_has_none(pairs, unit):
    ridge = RidgeMapping(D_SOURCE, D_TARGET, unit)
    ridge.cross_validate(*pairs, [0.3], groups=DOCUMENTS)
    low = ComparisonMap.fitted("reduced_rank", ridge)
    absolute = 0.3 * (np.square(centred(pairs[0])).sum(0).mean() if unit == "relative" else 1)
    expected = reduced_rank_reference(*pairs, absolute, low.rank)
    assert low.cv["lambda"] == 0.3
    assert np.allclose(low.W.numpy(), expected, rtol=0, atol=1e-9)
    assert ComparisonMap.fitted("procrustes", ridge).cv["lambda"] is None


@pytest.mark.parametrize("kind", ["procrustes", "reduced_rank"])
def test_held_out_scores_equal_refitting_every_fold(pairs, ridge, kind):
    made = ComparisonMap.fitted(kind, ridge)

    def solve(*train):
        if kind == "procrustes":
            return procrustes_of(*train)
        return reduced_rank_ridge(moments_of(*train), ridge.lambda_, made.rank)

    residual, total = (np.square(rows).sum(0) for rows in refitted(pairs, solve))
    weights = 1 / pairs[1].var(0).numpy()
    assert 1 - made.cv["r2"] == pytest.approx(residual.sum() / total.sum(), rel=1e-9)
    assert 1 - made.cv["r2_standardised"] == pytest.approx(residual @ weights / (total @ weights), rel=1e-9)
    assert made.cv["r2_per_dimension"] == pytest.approx(1 - residual / total, rel=1e-8)
    assert made.cv["n"] == N


def test_shuffled_is_the_control_that_ridge_reports_and_each_draw_another_shuffle(pairs):
    ridge = cross_validated_ridge(*pairs, seed=5)
    draws = [ComparisonMap.fitted("shuffled_pairs", ridge, draw) for draw in range(3)]
    assert draws[0].cv["lambda"] == ridge.cv["shuffled_best_lambda"]
    assert draws[0].cv["r2"] == pytest.approx(ridge.cv["shuffled_r2"], rel=1e-9)
    assert max(draws[0].cv["r2"], draws[0].cv["retrieval_accuracy"]) < 0.1 < ridge.cv["best_r2"]
    assert min((draws[0].W - made.W).norm() / made.W.norm() for made in draws[1:]) > 0.5


def test_means_are_those_of_the_pairs_and_the_table_has_a_row_for_each_map(pairs, ridge):
    others = {kind: ComparisonMap.fitted(kind, ridge) for kind in KINDS}
    for made in others.values():
        assert torch.allclose(made.source_mean, pairs[0].mean(0), rtol=0, atol=1e-6)
        assert torch.allclose(made.target_mean, pairs[1].mean(0), rtol=0, atol=1e-6)
    table = maps_table(ridge, others)
    assert [row["map"] for row in table] == ["ridge", *KINDS]
    assert table[0]["r2"] == ridge.cv["best_r2"]
    for row, made in zip(table[1:], others.values(), strict=True):
        assert {key: value for key, value in row.items() if key != "map"}.items() <= made.cv.items()


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_made_from_content_is_the_same_and_transforms_without_intercept(pairs, ridge, kind, tmp_path):
    made = ComparisonMap.fitted(kind, ridge, draw=2)
    save_tensors(tmp_path / "map.pt", made.content())
    again = ComparisonMap.from_content(load_tensors(tmp_path / "map.pt"))
    assert (again.kind, again.draw, again.rank, again.cv) == (made.kind, 2, made.rank, made.cv)
    assert torch.equal(again.target_mean, made.target_mean)
    assert torch.allclose(again.transform(pairs[0]), pairs[0] @ made.W)
    assert made.transform(pairs[0][:2].bfloat16()).dtype == torch.bfloat16


def test_procrustes_of_constant_activations_is_rejected(pairs):
    with pytest.raises(InputError, match="source activations are constant"):
        procrustes_of(torch.ones(N, D_SOURCE), pairs[1])

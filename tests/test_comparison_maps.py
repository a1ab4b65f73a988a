"""Each kind of map finds what it can find, and equals a refit by another implementation."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from experiment.comparison_maps import KINDS, ComparisonMap
from ridge_mapping import RidgeMapping, assign_folds
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


def fitted(kind, pairs, lambda_=1.0, **options):
    rank = TRUE_RANK if kind == "reduced_rank" else None
    made = ComparisonMap(kind, pairs[0].shape[1], pairs[1].shape[1], **options)
    return made.fit(*pairs, lambda_=lambda_, rank=rank)


def cross_validated(kind, pairs, **options):
    made = ComparisonMap(kind, D_SOURCE, D_TARGET, **options)
    made.cross_validate(*pairs, LAMBDAS, groups=DOCUMENTS)
    return made


def centred(H):
    return (H - H.mean(0)).numpy()


def reduced_rank_reference(H_source, H_target, alpha, rank):
    """Ridge is least squares on data with sqrt(alpha) I appended; its fitted values are cut by SVD."""
    X = np.vstack([centred(H_source), np.sqrt(alpha) * np.eye(H_source.shape[1])])
    Y = np.vstack([centred(H_target), np.zeros((H_source.shape[1], H_target.shape[1]))])
    W = np.linalg.lstsq(X, Y, rcond=None)[0]
    axes = np.linalg.svd(X @ W)[2][:rank].T
    return W @ axes @ axes.T


@pytest.mark.parametrize(("d_source", "d_target"), [(8, 13), (8, 8), (13, 8)])
def test_procrustes_recovers_a_scaled_rotation(d_source, d_target):
    widest, narrowest = max(d_source, d_target), min(d_source, d_target)
    rotation = torch.linalg.qr(gaussian(widest, narrowest, seed=1)).Q
    rotation = rotation if d_source == widest else rotation.T
    H_source = gaussian(N, d_source)
    if d_target < d_source:  # what a narrowing rotation leaves out must not matter
        H_source = torch.linalg.qr(H_source - H_source.mean(0)).Q
    else:
        H_source = H_source * torch.linspace(1, 5, d_source).double()
    W = fitted("procrustes", (H_source + 3, 7 * H_source @ rotation - 2)).W
    assert torch.allclose(W, 7 * rotation, rtol=0, atol=1e-9)


@pytest.mark.parametrize("d_target", [5, 8, 10])
def test_procrustes_is_orthonormal_up_to_the_best_scale(pairs, d_target):
    H_source, H_target = pairs[0], pairs[1][:, :d_target]
    W = fitted("procrustes", (H_source, H_target)).W
    product = W @ W.T if d_target >= D_SOURCE else W.T @ W
    square = product.diagonal().mean()
    assert torch.allclose(product, square * torch.eye(len(product)).double(), rtol=0, atol=1e-9 * square)
    errors = [np.square(centred(H_target) - c * centred(H_source) @ W.numpy()).sum() for c in (0.99, 1, 1.01)]
    assert errors[1] < min(errors[0], errors[2])


def test_procrustes_rotates_as_scipy_does(pairs):
    H_source, H_target = pairs[0], pairs[1][:, :D_SOURCE]
    W = fitted("procrustes", (H_source, H_target)).W
    rotation, _ = orthogonal_procrustes(centred(H_source), centred(H_target))
    assert np.allclose((W / W[0].norm()).numpy(), rotation, rtol=0, atol=1e-9)


def test_lambda_means_nothing_to_procrustes(pairs):
    assert torch.equal(fitted("procrustes", pairs, 1e-3).W, fitted("procrustes", pairs, 1e3).W)
    assert cross_validated("procrustes", pairs).cv["lambda"] is None


@pytest.mark.parametrize("unit", ["absolute", "relative"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_reduced_rank_is_the_best_map_of_that_rank(pairs, rank, unit):
    W = ComparisonMap("reduced_rank", D_SOURCE, D_TARGET, unit).fit(*pairs, lambda_=0.3, rank=rank).W
    alpha = 0.3 * (np.square(centred(pairs[0])).sum(0).mean() if unit == "relative" else 1)
    assert np.linalg.matrix_rank(W.numpy(), tol=1e-8) == rank
    assert np.allclose(W.numpy(), reduced_rank_reference(*pairs, alpha, rank), rtol=0, atol=1e-9)


@pytest.mark.parametrize("d_target", [5, 10])
def test_full_rank_equals_ridge(pairs, d_target):
    H_source, H_target = pairs[0], pairs[1][:, :d_target]
    full = ComparisonMap("reduced_rank", D_SOURCE, d_target)
    full.fit(H_source, H_target, lambda_=2.0, rank=min(D_SOURCE, d_target))
    ridge = RidgeMapping(D_SOURCE, d_target).fit(H_source, H_target, 2.0)
    assert torch.allclose(full.W, ridge.W, rtol=0, atol=1e-10)


@pytest.mark.parametrize("d_target", [6, 10])
def test_the_rank_is_the_one_with_the_least_held_out_error(pairs, d_target):
    H_source, H_target = pairs[0], pairs[1][:, :d_target]
    low = ComparisonMap("reduced_rank", D_SOURCE, d_target)
    best, _ = low.cross_validate(H_source, H_target, LAMBDAS, groups=DOCUMENTS)
    folds = assign_folds(N, 5, DOCUMENTS)
    errors, total = np.zeros(min(D_SOURCE, d_target)), 0.0
    for fold in range(5):
        train, test = folds != fold, folds == fold
        X, Y = ((H[test] - H[train].mean(0)).numpy() for H in (H_source, H_target))
        total += np.square(Y).sum()
        for index in range(len(errors)):
            W = reduced_rank_reference(H_source[train], H_target[train], best, index + 1)
            errors[index] += np.square(Y - X @ W).sum()
    assert low.rank == low.cv["rank"] == errors.argmin() + 1 == TRUE_RANK
    assert 1 - low.cv["r2"] == pytest.approx(errors.min() / total, rel=1e-9)
    assert np.linalg.matrix_rank(low.W.numpy(), tol=1e-8) == TRUE_RANK


@pytest.mark.parametrize("kind", ["procrustes", "reduced_rank"])
def test_held_out_scores_equal_refitting_every_fold(pairs, kind):
    found = cross_validated(kind, pairs)
    folds = assign_folds(N, 5, DOCUMENTS)
    residual, total = (torch.empty(N, D_TARGET, dtype=torch.float64) for _ in range(2))
    for fold in range(5):
        train, test = folds != fold, folds == fold
        refitted = ComparisonMap(kind, D_SOURCE, D_TARGET)
        refitted.fit(*(H[train] for H in pairs), lambda_=found.cv["lambda"] or 1.0, rank=found.rank)
        residual[test] = pairs[1][test] - refitted.predict(pairs[0][test])
        total[test] = pairs[1][test] - pairs[1][train].mean(0)
    residual, total = residual.square().sum(0), total.square().sum(0)
    weights = 1 / pairs[1].var(0)
    assert 1 - found.cv["r2"] == pytest.approx((residual.sum() / total.sum()).item(), rel=1e-9)
    standardised = (residual @ weights / (total @ weights)).item()
    assert 1 - found.cv["r2_standardised"] == pytest.approx(standardised, rel=1e-9)
    assert found.cv["r2_per_dimension"] == pytest.approx((1 - residual / total).tolist(), rel=1e-8)
    assert found.cv["n"] == N


def test_shuffled_knows_nothing_where_ridge_knows_much():
    H_source = gaussian(1000, D_SOURCE)
    H_target = H_source @ gaussian(D_SOURCE, D_TARGET, seed=1)
    shuffled = ComparisonMap("shuffled", D_SOURCE, D_TARGET)
    shuffled.cross_validate(H_source, H_target, LAMBDAS)
    assert abs(shuffled.cv["r2"]) < 0.03
    assert shuffled.cv["retrieval_accuracy"] < 0.01
    assert min(shuffled.ridge.cv["best_r2"], shuffled.ridge.cv["retrieval_accuracy"]) > 0.99
    assert shuffled.W.norm() < 0.2 * shuffled.ridge.W.norm()


@pytest.mark.parametrize("seed", [0, 5])
def test_shuffled_is_the_control_that_ridge_reports(pairs, seed):
    shuffled = ComparisonMap("shuffled", D_SOURCE, D_TARGET, seed=seed).partial_fit(*pairs)
    shuffled.cross_validate(lambda_values=LAMBDAS)
    control = shuffled.ridge.cv
    assert shuffled.cv["lambda"] == control["shuffled_best_lambda"]
    assert shuffled.cv["r2"] == pytest.approx(control["shuffled_r2"], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_transform_has_no_intercept_and_predict_maps_mean_to_mean(pairs, kind):
    made = fitted(kind, pairs)
    means = [H.mean(0) for H in pairs]
    assert not made.transform(torch.zeros(D_SOURCE)).any()
    assert torch.allclose(made.predict(means[0]), means[1], rtol=0, atol=1e-5)
    difference = made.predict(pairs[0][3]) - made.predict(pairs[0][8])
    assert torch.allclose(difference, made.transform(pairs[0][3] - pairs[0][8]))
    assert made.transform(pairs[0][:2].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["pieces", "merged", "statistics"])
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_equals_giving_all_pairs(pairs, kind, how):
    expected = cross_validated(kind, pairs)
    fold_of = dict(zip(DOCUMENTS, assign_folds(N, 5, DOCUMENTS).tolist(), strict=True))
    if how == "statistics":
        statistics = PairStatistics(D_SOURCE, D_TARGET, fold_of=fold_of).add(*pairs, DOCUMENTS)
        streamed = ComparisonMap.from_statistics(kind, statistics)
    else:
        streamed = ComparisonMap(kind, D_SOURCE, D_TARGET, fold_of=fold_of)
        for start in range(0, N, 30):
            rows = slice(start, start + 30)
            other = ComparisonMap(kind, D_SOURCE, D_TARGET, fold_of=fold_of)
            into = streamed if how == "pieces" else other
            into.partial_fit(*(H[rows] for H in pairs), DOCUMENTS[rows])
            streamed = into if how == "pieces" else streamed.merge(other)
    streamed.cross_validate(lambda_values=LAMBDAS)
    assert streamed.rank == expected.rank
    assert torch.allclose(streamed.W, expected.W, rtol=0, atol=1e-10)
    assert torch.allclose(streamed.target_mean, expected.target_mean, rtol=0, atol=1e-10)
    for name, value in expected.cv.items():
        close = pytest.approx(value, rel=1e-9) if isinstance(value, float | list) else value
        assert streamed.cv[name] == close, name


@pytest.mark.parametrize("kind", KINDS)
def test_maps_made_after_ridge_was_cross_validated_equal_their_own_cross_validation(pairs, kind):
    expected = cross_validated(kind, pairs)
    ridge = RidgeMapping(D_SOURCE, D_TARGET)
    ridge.cross_validate(*pairs, LAMBDAS, groups=DOCUMENTS)
    before = ridge.W.clone()
    made = ComparisonMap(kind, D_SOURCE, D_TARGET).cross_validate_from(ridge)
    assert made.cv == expected.cv
    assert torch.equal(made.W, expected.W)
    assert torch.equal(ridge.W, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_map_is_the_same_when_loaded(pairs, kind, tmp_path):
    made = cross_validated(kind, pairs)
    made.save(tmp_path / "map.pt", fingerprint="f")
    loaded = ComparisonMap.load(tmp_path / "map.pt")
    assert loaded.analyze() == made.analyze()
    assert loaded.analyze()["kind"] == kind
    assert torch.equal(loaded.predict(pairs[0]), made.predict(pairs[0]))
    assert torch.equal(loaded.transform(pairs[0]), made.transform(pairs[0]))
    assert torch.load(tmp_path / "map.pt", weights_only=True)["fingerprint"] == "f"


def test_a_damaged_or_foreign_file_is_refused(pairs, tmp_path):
    path = tmp_path / "map.pt"
    fitted("procrustes", pairs).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"map\.pt is damaged"):
        ComparisonMap.load(path)
    RidgeMapping(D_SOURCE, D_TARGET).fit(*pairs).save(path)
    with pytest.raises(InputError, match="not a comparison map"):
        ComparisonMap.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_analyze_gives_singular_values_and_fitting_again_forgets_the_scores(pairs, kind):
    made = cross_validated(kind, pairs)
    analysis = made.analyze()
    assert analysis["singular_values"] == pytest.approx(np.linalg.svd(made.W.numpy())[1], abs=1e-9)
    assert analysis["r2"] == made.cv["r2"]
    made.fit(*pairs, rank=TRUE_RANK if kind == "reduced_rank" else None)
    assert made.cv is None
    assert "r2" not in made.analyze()


@pytest.mark.parametrize(
    ("kind", "rank", "message"),
    [
        ("reduced_rank", None, r"rank is None, expected 1 to 8; cross_validate\(\) chooses one"),
        ("reduced_rank", 0, "rank is 0, expected 1 to 8"),
        ("reduced_rank", 9, "rank is 9, expected 1 to 8"),
        ("procrustes", 3, "a procrustes map has none"),
        ("shuffled", 3, "a shuffled map has none"),
    ],
)
def test_a_bad_rank_is_refused(pairs, kind, rank, message):
    made = ComparisonMap(kind, D_SOURCE, D_TARGET)
    with pytest.raises(InputError, match=message):
        made.fit(*pairs, rank=rank)
    assert made.W is None


@pytest.mark.parametrize("kind", ["ridge", "", "Procrustes"])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(InputError, match="unknown; choose procrustes, reduced_rank, shuffled"):
        ComparisonMap(kind, D_SOURCE, D_TARGET)


@pytest.mark.parametrize("use", ["transform", "predict", "analyze", "save"])
def test_a_map_that_is_not_fitted_is_refused(tmp_path, use):
    arguments = {"analyze": (), "save": (tmp_path / "map.pt",)}.get(use, (torch.ones(D_SOURCE),))
    with pytest.raises(InputError, match="not fitted"):
        getattr(ComparisonMap("procrustes", D_SOURCE, D_TARGET), use)(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_constant_source_is_refused_by_procrustes(pairs):
    with pytest.raises(InputError, match="source activations are constant"):
        fitted("procrustes", (torch.ones(N, D_SOURCE), pairs[1]))

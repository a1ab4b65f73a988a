"""The map equals scikit-learn's ridge regression, and its held-out errors a refit of every fold."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from errors import InputError
from ridge_mapping import RidgeMapping, assign_folds

N, D_SOURCE, D_TARGET = 60, 9, 6
LAMBDAS = [0.01, 1.0, 10.0, 1000.0]
X, Y = torch.ones(10, D_SOURCE), torch.ones(10, D_TARGET)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(5)
    H_source = torch.randn(N, D_SOURCE, generator=generator, dtype=torch.float64)
    H_source = H_source * torch.logspace(-1, 1, D_SOURCE, dtype=torch.float64) + 2
    truth = torch.randn(D_SOURCE, D_TARGET, generator=generator, dtype=torch.float64)
    noise = torch.randn(N, D_TARGET, generator=generator, dtype=torch.float64)
    return H_source, H_source @ truth + 20 * noise - 4


@pytest.fixture
def clean_pairs(pairs):
    H_source, _ = pairs
    return H_source, H_source @ torch.randn(D_SOURCE, D_TARGET, dtype=torch.float64) + 3


def sklearn_ridge(H_source, H_target, alpha):
    return Ridge(alpha=alpha, fit_intercept=True, solver="cholesky").fit(H_source.numpy(), H_target.numpy())


def centred(H):
    return (H - H.mean(0)).numpy()


def mean_diagonal(H):
    return float((centred(H) ** 2).sum(0).mean())


def relative_error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("unit", ["absolute", "relative"])
@pytest.mark.parametrize("lambda_", LAMBDAS)
def test_W_and_predictions_equal_scikit_learn(pairs, lambda_, unit):
    H_source, H_target = pairs
    mapping = RidgeMapping(D_SOURCE, D_TARGET, lambda_unit=unit).fit(H_source, H_target, lambda_)
    alpha = lambda_ if unit == "absolute" else lambda_ * mean_diagonal(H_source)
    reference = sklearn_ridge(H_source, H_target, alpha)
    assert mapping.lambda_ == lambda_
    assert mapping.lambda_absolute == pytest.approx(alpha, rel=1e-12)
    assert relative_error(mapping.W, reference.coef_.T) < 1e-9
    assert relative_error(mapping.predict(H_source), reference.predict(H_source.numpy())) < 1e-9


def test_more_dimensions_than_rows_equals_scikit_learn(pairs):
    H_source, H_target = (H[:5] for H in pairs)
    mapping = RidgeMapping(D_SOURCE, D_TARGET).fit(H_source, H_target, 0.5)
    assert relative_error(mapping.W, sklearn_ridge(H_source, H_target, 0.5).coef_.T) < 1e-9


def test_relative_lambda_ignores_the_scale_of_the_source(pairs):
    H_source, H_target = pairs
    mapping = RidgeMapping(D_SOURCE, D_TARGET, lambda_unit="relative").fit(H_source, H_target, 0.3)
    scaled = RidgeMapping(D_SOURCE, D_TARGET, lambda_unit="relative").fit(1000 * H_source, H_target, 0.3)
    assert relative_error(1000 * scaled.W, mapping.W.numpy()) < 1e-9


def test_a_mean_of_100_standard_deviations_costs_no_accuracy(pairs):
    H_source, H_target = pairs
    shift = 100 * H_source.std(0)
    mapping = RidgeMapping(D_SOURCE, D_TARGET).fit(H_source, H_target, 0.1)
    shifted = RidgeMapping(D_SOURCE, D_TARGET).fit(H_source + shift, H_target + 1e4, 0.1)
    assert relative_error(shifted.W, mapping.W.numpy()) < 1e-9
    expected = mapping.predict(H_source).numpy()
    assert relative_error(shifted.predict(H_source + shift) - 1e4, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_input_is_solved_in_float64(pairs, dtype):
    H_source, H_target = (H.to(dtype) for H in pairs)
    mapping = RidgeMapping(D_SOURCE, D_TARGET).fit(H_source, H_target, 1.0)
    exact = RidgeMapping(D_SOURCE, D_TARGET).fit(H_source.double(), H_target.double(), 1.0)
    assert mapping.W.dtype == torch.float64
    assert torch.equal(mapping.W, exact.W)
    for map_it, exactly in ((mapping.transform, exact.transform), (mapping.predict, exact.predict)):
        mapped = map_it(H_source)
        assert mapped.dtype == dtype
        assert torch.equal(mapped, exactly(H_source.double()).to(dtype))


def test_fit_modifies_neither_input(pairs):
    originals = [H.clone() for H in pairs]
    RidgeMapping(D_SOURCE, D_TARGET).cross_validate(*pairs, LAMBDAS)
    assert all(torch.equal(H, original) for H, original in zip(pairs, originals, strict=True))


def test_transform_has_no_intercept_and_predict_has(pairs):
    H_source, H_target = pairs
    mapping = RidgeMapping(D_SOURCE, D_TARGET).fit(H_source, H_target, 1.0)
    assert not mapping.transform(torch.zeros(D_SOURCE)).any()
    assert torch.allclose(mapping.predict(H_source.mean(0)), H_target.mean(0))
    difference = mapping.predict(H_source[3]) - mapping.predict(H_source[8])
    assert torch.allclose(difference, mapping.transform(H_source[3] - H_source[8]))


def test_transform_is_linear(pairs):
    mapping = RidgeMapping(D_SOURCE, D_TARGET).fit(*pairs, 1.0)
    u, v = torch.randn(2, D_SOURCE, dtype=torch.float64)
    combined = 3 * mapping.transform(u) - 0.5 * mapping.transform(v)
    assert torch.allclose(mapping.transform(3 * u - 0.5 * v), combined)
    assert torch.allclose(mapping.transform(torch.stack([u, v])), torch.stack([u, v]) @ mapping.W)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_cross_validation_equals_refitting_every_fold(pairs, unit, grouped):
    H_source, H_target = pairs
    groups = [row // 4 for row in range(N)] if grouped else None
    mapping = RidgeMapping(D_SOURCE, D_TARGET, lambda_unit=unit)
    best, errors = mapping.cross_validate(H_source, H_target, LAMBDAS, n_folds=4, groups=groups, seed=2)
    folds = assign_folds(N, 4, groups, seed=2)
    total = np.zeros(D_TARGET)
    residual = {lambda_: np.zeros(D_TARGET) for lambda_ in LAMBDAS}
    for fold in range(4):
        train, test = folds != fold, folds == fold
        truth = H_target[test].numpy()
        total += ((truth - H_target[train].mean(0).numpy()) ** 2).sum(0)
        for lambda_ in LAMBDAS:
            alpha = lambda_ * (mean_diagonal(H_source[train]) if unit == "relative" else 1)
            reference = sklearn_ridge(H_source[train], H_target[train], alpha)
            residual[lambda_] += ((truth - reference.predict(H_source[test].numpy())) ** 2).sum(0)
    assert sorted(errors) == LAMBDAS
    for lambda_ in LAMBDAS:
        assert errors[lambda_] == pytest.approx(residual[lambda_].sum() / (N * D_TARGET), rel=1e-9)
        assert mapping.cv["r2"][lambda_] == pytest.approx(1 - residual[lambda_].sum() / total.sum(), rel=1e-9)
    assert best == min(LAMBDAS, key=lambda value: residual[value].sum())
    per_dimension = 1 - residual[best] / total
    assert mapping.cv["best_r2_per_dimension"] == pytest.approx(per_dimension.tolist(), rel=1e-9)
    assert mapping.cv["best_r2"] == mapping.cv["r2"][best]


def test_cross_validation_leaves_the_map_fitted_on_all_rows_at_the_best_lambda(pairs):
    mapping = RidgeMapping(D_SOURCE, D_TARGET)
    best, errors = mapping.cross_validate(*pairs, LAMBDAS)
    refitted = RidgeMapping(D_SOURCE, D_TARGET).fit(*pairs, best)
    assert best == min(errors, key=errors.get) == mapping.lambda_
    assert torch.allclose(mapping.W, refitted.W, rtol=0, atol=1e-12)
    assert torch.allclose(mapping.target_mean, refitted.target_mean, rtol=1e-12)
    assert mapping.n == N


def test_order_and_repeats_of_lambda_values_change_nothing(pairs):
    expected = RidgeMapping(D_SOURCE, D_TARGET).cross_validate(*pairs, LAMBDAS)
    repeated = [*LAMBDAS[::-1], LAMBDAS[0]]
    assert RidgeMapping(D_SOURCE, D_TARGET).cross_validate(*pairs, repeated) == expected


def test_cv_describes_its_folds(pairs):
    mapping = RidgeMapping(D_SOURCE, D_TARGET)
    mapping.cross_validate(*pairs, LAMBDAS, n_folds=4, groups=[row // 5 for row in range(N)])
    assert mapping.cv["fold_sizes"] == [15, 15, 15, 15]
    assert (mapping.cv["n_rows"], mapping.cv["n_groups"], mapping.cv["n_folds"]) == (N, 12, 4)


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_never_split(seed):
    groups = torch.randint(12, (100,), generator=torch.Generator().manual_seed(seed)).tolist()
    folds = assign_folds(100, 5, groups, seed)
    for group in set(groups):
        assert len({folds[row].item() for row in range(100) if groups[row] == group}) == 1
    assert set(folds.tolist()) == set(range(5))


def test_folds_without_groups_are_even_and_seeded():
    folds = assign_folds(23, 5, seed=1)
    assert sorted(torch.bincount(folds).tolist()) == [4, 4, 5, 5, 5]
    assert torch.equal(folds, assign_folds(23, 5, seed=1))
    assert not torch.equal(folds, assign_folds(23, 5, seed=2))


def test_repeated_rows_leak_unless_grouped():
    """Each random pair occurs five times: only a split by group shows that nothing is learnt."""
    H_source = torch.randn(30, 40).repeat(5, 1)
    H_target = torch.randn(30, 3).repeat(5, 1)
    r2 = {}
    for groups in (None, list(range(30)) * 5):
        mapping = RidgeMapping(40, 3)
        mapping.cross_validate(H_source, H_target, [0.01], groups=groups)
        r2[groups is None] = mapping.cv["best_r2"]
    assert r2[True] > 0.9
    assert r2[False] < 0.1


def test_analyze_states_degrees_of_freedom_singular_values_and_rank(pairs):
    H_source, H_target = pairs
    H_target = H_target[:, :1] * torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 1.0])
    H_target[:, 5] += 2 * H_source[:, 8]
    mapping = RidgeMapping(D_SOURCE, D_TARGET).fit(H_source, H_target, 7.0)
    analysis = mapping.analyze()
    C = centred(H_source)
    hat = C @ np.linalg.solve(C.T @ C + 7.0 * np.eye(D_SOURCE), C.T)
    eigenvalues = np.linalg.eigvalsh(C.T @ C)
    singular_values = np.linalg.svd(mapping.W.numpy(), compute_uv=False)
    assert analysis["df"] == pytest.approx(np.trace(hat), rel=1e-9)
    assert analysis["df"] == pytest.approx((eigenvalues / (eigenvalues + 7.0)).sum(), rel=1e-9)
    assert analysis["singular_values"][:2] == pytest.approx(singular_values[:2], rel=1e-9)
    assert analysis["effective_rank"] == (singular_values > 0.01 * singular_values[0]).sum() == 2
    assert (analysis["n"], analysis["lambda"], analysis["lambda_absolute"]) == (N, 7.0, 7.0)
    assert analysis["held_out_r2"] is analysis["shuffled_r2"] is None


def test_shuffled_pairs_teach_nothing(clean_pairs):
    mapping = RidgeMapping(D_SOURCE, D_TARGET)
    mapping.cross_validate(*clean_pairs, [0.1, 10.0, 1e3, 1e5])
    analysis = mapping.analyze()
    assert analysis["held_out_r2"] > 0.99
    assert analysis["held_out_r2_median_dimension"] > 0.99
    assert analysis["shuffled_r2"] < 0.02


def test_refitting_forgets_the_earlier_cross_validation(pairs):
    mapping = RidgeMapping(D_SOURCE, D_TARGET)
    mapping.cross_validate(*pairs, LAMBDAS)
    assert mapping.fit(*pairs, 1.0) is mapping
    assert mapping.cv is None
    assert mapping.analyze()["held_out_r2"] is None


@pytest.mark.parametrize(
    ("lambda_values", "at_edge"), [([0.1, 1.0, 10.0], True), ([1e-6, 30.0, 1e6], False), ([1.0], False)]
)
def test_a_best_lambda_at_the_edge_of_the_grid_is_warned_of(pairs, caplog, lambda_values, at_edge):
    mapping = RidgeMapping(D_SOURCE, D_TARGET)
    mapping.cross_validate(*pairs, lambda_values)
    assert mapping.cv["best_at_edge"] is at_edge
    assert ("edge of the grid" in caplog.text) is at_edge


def test_a_saved_map_is_the_same_when_loaded(pairs, tmp_path):
    mapping = RidgeMapping(D_SOURCE, D_TARGET, lambda_unit="relative")
    mapping.cross_validate(*pairs, LAMBDAS)
    mapping.save(tmp_path / "map.pt", fingerprint="f")
    loaded = RidgeMapping.load(tmp_path / "map.pt")
    assert loaded.statistics.n_pairs == 0, "the sums are an artifact of their own"
    fitted = {name: value for name, value in vars(mapping).items() if name != "statistics"}
    for name, value in fitted.items():
        found = getattr(loaded, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    assert loaded.analyze() == mapping.analyze()
    assert torch.load(tmp_path / "map.pt", weights_only=True)["fingerprint"] == "f"


def test_a_damaged_or_foreign_file_is_refused(pairs, tmp_path):
    path = tmp_path / "map.pt"
    RidgeMapping(D_SOURCE, D_TARGET).fit(*pairs).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"map\.pt is damaged"):
        RidgeMapping.load(path)
    torch.save({"W": torch.ones(2, 2)}, path)
    with pytest.raises(InputError, match="not a ridge mapping"):
        RidgeMapping.load(path)


@pytest.mark.parametrize("use", ["transform", "predict", "analyze", "save"])
def test_a_map_that_is_not_fitted_is_refused(tmp_path, use):
    mapping = RidgeMapping(D_SOURCE, D_TARGET)
    arguments = {"analyze": (), "save": (tmp_path / "map.pt",)}.get(use, (torch.ones(D_SOURCE),))
    with pytest.raises(InputError, match="not fitted"):
        getattr(mapping, use)(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("H_source", "H_target", "lambda_", "message"),
    [
        (X, Y[:9], 1.0, "one row for each pair"),
        (X[:, :8], Y, 1.0, r"H_source has shape \(10, 8\), expected .*9"),
        (X, Y[:, :5], 1.0, r"H_target has shape \(10, 5\), expected .*6"),
        (X[0], Y[0], 1.0, r"H_source has shape \(9,\), expected \(n, 9\)"),
        (X[None], Y, 1.0, "H_source has shape"),
        (X[:1], Y[:1], 1.0, "got 1 pairs, expected 2 or more|2 folds over 1 groups"),
        (X, Y, 0.0, r"lambda is 0\.0"),
        (X, Y, -1.0, r"lambda is -1\.0"),
        (X, Y, float("nan"), "lambda is nan"),
        (X, Y, float("inf"), "lambda is inf"),
        (X.clone().index_fill_(0, torch.tensor([3, 7]), float("nan")), Y, 1.0, "H_source has 2 rows.*row 3"),
        (X, Y.clone().index_fill_(0, torch.tensor([4]), float("inf")), 1.0, "H_target has 1 rows.*row 4"),
    ],
)
def test_bad_pairs_and_lambdas_are_refused(H_source, H_target, lambda_, message):
    mapping = RidgeMapping(D_SOURCE, D_TARGET)
    with pytest.raises(InputError, match=message):
        mapping.fit(H_source, H_target, lambda_)
    with pytest.raises(InputError, match=message):
        mapping.cross_validate(H_source, H_target, [lambda_], n_folds=2)
    assert mapping.W is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_values": []}, "lambda_values is empty"),
        ({"n_folds": 1}, "expected 2 or more"),
        ({"n_folds": 11}, "11 folds over 10 groups"),
        ({"groups": [0, 1, 2] * 3 + [0]}, "5 folds over 3 groups"),
        ({"groups": [0, 1, 2]}, "3 groups for 10 rows"),
    ],
)
def test_bad_cross_validation_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RidgeMapping(D_SOURCE, D_TARGET).cross_validate(X, Y, **options)


@pytest.mark.parametrize("use", ["transform", "predict"])
@pytest.mark.parametrize("shape", [(D_SOURCE + 1,), (2, D_TARGET), (1, 2, D_SOURCE), ()])
def test_a_wrong_width_is_refused(pairs, use, shape):
    mapping = RidgeMapping(D_SOURCE, D_TARGET).fit(*pairs)
    with pytest.raises(InputError, match="shape"):
        getattr(mapping, use)(torch.ones(shape))


def test_constant_source_has_no_relative_lambda():
    with pytest.raises(InputError, match="constant"):
        RidgeMapping(D_SOURCE, D_TARGET, lambda_unit="relative").fit(X, Y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 5), "positive integers"), ((5, 0), "positive integers"), ((5, 5, "log"), "'log' is unknown")],
)
def test_bad_constructor_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        RidgeMapping(*arguments)

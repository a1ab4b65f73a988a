"""The map equals scikit-learn's ridge regression, and its held-out errors a refit of every fold."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from ridge_mapping import N_RETRIEVAL, RidgeMapping, assign_folds, retrieval_accuracy
from support.errors import InputError
from support.pair_statistics import PairStatistics

N, D_SOURCE, D_TARGET = 60, 9, 6
LAMBDAS = [0.01, 1.0, 10.0, 1000.0]
TWELVE_DECADES = np.logspace(-6, 6, 13).tolist()
DOCUMENTS = [f"doc {row // 4}" for row in range(N)]
X, Y = torch.ones(10, D_SOURCE), torch.ones(10, D_TARGET)


@pytest.fixture
def mapping():
    return RidgeMapping(D_SOURCE, D_TARGET)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(5)
    H_source = torch.randn(N, D_SOURCE, generator=generator, dtype=torch.float64)
    H_source = H_source * torch.logspace(-1, 1, D_SOURCE, dtype=torch.float64) + 2
    truth = torch.randn(D_SOURCE, D_TARGET, generator=generator, dtype=torch.float64)
    noise = torch.randn(N, D_TARGET, generator=generator, dtype=torch.float64)
    return H_source, H_source @ truth + 20 * noise - 4


def sklearn_ridge(H_source, H_target, alpha):
    return Ridge(alpha=alpha, fit_intercept=True, solver="cholesky").fit(H_source.numpy(), H_target.numpy())


def centred(H):
    return (H - H.mean(0)).numpy()


def mean_diagonal(H):
    return float((centred(H) ** 2).sum(0).mean())


def relative_error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def refitted_folds(H_source, H_target, folds, lambda_values, unit="relative"):
    """What scikit-learn leaves of each held-out row, by lambda, and what the training mean leaves."""
    residual = {lambda_: np.empty(H_target.shape) for lambda_ in lambda_values}
    total = np.empty(H_target.shape)
    for fold in folds.unique():
        train, test = folds != fold, folds == fold
        truth = H_target[test].numpy()
        total[test] = truth - H_target[train].mean(0).numpy()
        for lambda_ in lambda_values:
            alpha = lambda_ * (mean_diagonal(H_source[train]) if unit == "relative" else 1)
            reference = sklearn_ridge(H_source[train], H_target[train], alpha)
            residual[lambda_][test] = truth - reference.predict(H_source[test].numpy())
    return residual, total


def rescaled(pairs, kind):
    H_source, H_target = (H.clone() for H in pairs)
    if kind == "large source dimension":
        H_source[:, 2] *= 1000
    elif kind == "large target dimension":
        H_target[:, 1] *= 1000
    elif kind == "far means":
        H_source, H_target = (H + 100 * H.std(0) for H in (H_source, H_target))
    return H_source, H_target


def streamed(pairs, n=N, n_folds=4):
    """A map of the first n pairs, summed in pieces of 7, with their documents."""
    statistics = PairStatistics(D_SOURCE, D_TARGET, n_folds)
    for start in range(0, n, 7):
        rows = slice(start, min(start + 7, n))
        statistics.add(*(H[rows] for H in pairs), DOCUMENTS[rows])
    return RidgeMapping.from_statistics(statistics, "relative")


@pytest.mark.parametrize("unit", ["absolute", "relative"])
@pytest.mark.parametrize(("lambda_", "n"), [(0.01, N), (1.0, N), (1000.0, N), (0.5, 5)])
def test_W_and_predictions_equal_scikit_learn_also_with_fewer_rows_than_dimensions(pairs, lambda_, n, unit):
    H_source, H_target = (H[:n] for H in pairs)
    mapping = RidgeMapping(D_SOURCE, D_TARGET, lambda_unit=unit).fit(H_source, H_target, lambda_)
    alpha = lambda_ if unit == "absolute" else lambda_ * mean_diagonal(H_source)
    reference = sklearn_ridge(H_source, H_target, alpha)
    assert mapping.lambda_ == lambda_
    assert mapping.lambda_absolute == pytest.approx(alpha, rel=1e-12)
    assert relative_error(mapping.W, reference.coef_.T) < 1e-9
    assert relative_error(mapping.predict(H_source), reference.predict(H_source.numpy())) < 1e-9
    assert relative_error(mapping.transform(H_source), H_source.numpy() @ reference.coef_.T) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_input_is_solved_in_float64(pairs, mapping, dtype):
    H_source, H_target = (H.to(dtype) for H in pairs)
    mapping.fit(H_source, H_target, 1.0)
    exact = RidgeMapping(D_SOURCE, D_TARGET).fit(H_source.double(), H_target.double(), 1.0)
    assert mapping.W.dtype == torch.float64
    assert torch.equal(mapping.W, exact.W)
    for map_it, exactly in ((mapping.transform, exact.transform), (mapping.predict, exact.predict)):
        mapped = map_it(H_source)
        assert mapped.dtype == dtype
        assert torch.equal(mapped, exactly(H_source.double()).to(dtype))


def check_against_refits(mapping, pairs, folds, values, unit):
    """Compare what cross-validation left in a map with a refit of every fold by scikit-learn."""
    H_source, H_target = pairs
    cv, best = mapping.cv, mapping.lambda_
    residual, total = refitted_folds(*pairs, folds, values, unit)
    weights = 1 / H_target.numpy().var(0)
    axes = np.linalg.eigh(np.cov(H_target.numpy().T))[1][:, ::-1]
    C = centred(H_source)
    assert list(cv["errors"]) == values
    for lambda_, rows in residual.items():
        assert cv["errors"][lambda_] == pytest.approx((rows**2).mean(), rel=1e-9)
        assert 1 - cv["r2"][lambda_] == pytest.approx((rows**2).sum() / (total**2).sum(), rel=1e-9)
        standardised = (rows**2 @ weights).sum() / (total**2 @ weights).sum()
        assert 1 - cv["r2_standardised"][lambda_] == pytest.approx(standardised, rel=1e-9)
        alpha = lambda_ * (mean_diagonal(H_source) if unit == "relative" else 1)
        trace = np.trace(C @ np.linalg.solve(C.T @ C + alpha * np.eye(D_SOURCE), C.T))
        assert cv["df"][lambda_] == pytest.approx(trace, rel=1e-6)
    assert best == min(values, key=cv["errors"].get) == cv["best_lambda"]
    assert (cv["best_r2"], cv["best_r2_standardised"]) == (cv["r2"][best], cv["r2_standardised"][best])
    per_dimension = (residual[best] ** 2).sum(0) / (total**2).sum(0)
    assert 1 - np.array(cv["best_r2_per_dimension"]) == pytest.approx(per_dimension, rel=1e-9)
    by_component = ((residual[best] @ axes) ** 2).sum(0) / ((total @ axes) ** 2).sum(0)
    assert 1 - np.array(cv["best_r2_per_component"]) == pytest.approx(by_component, rel=1e-8)
    shares = ((total @ axes) ** 2).sum(0) / (total**2).sum()
    assert cv["component_variance"] == pytest.approx(shares, rel=1e-8)
    assert mapping.analyze()["df"] == cv["df"][best]
    assert relative_error(mapping.W, sklearn_ridge(*pairs, mapping.lambda_absolute).coef_.T) < 1e-9


@pytest.mark.parametrize("groups", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_cross_validation_equals_refitting_every_fold(pairs, unit, groups):
    mapping = RidgeMapping(D_SOURCE, D_TARGET, lambda_unit=unit)
    result = mapping.cross_validate(*pairs, LAMBDAS, n_folds=4, groups=groups, seed=2)
    assert result == (mapping.lambda_, mapping.cv["errors"])
    check_against_refits(mapping, pairs, assign_folds(N, 4, groups, seed=2), LAMBDAS, unit)


@pytest.mark.parametrize("kind", ["plain", "large source dimension", "large target dimension", "far means"])
def test_streamed_cross_validation_equals_refitting_every_fold_at_every_lambda(pairs, kind):
    pairs = rescaled(pairs, kind)
    mapping = streamed(pairs)
    mapping.cross_validate(lambda_values=TWELVE_DECADES)
    folds = mapping.statistics.sample.folds
    check_against_refits(mapping, pairs, folds, TWELVE_DECADES, "relative")
    assert (mapping.cv["n_groups"], mapping.cv["fold_sizes"]) == (N // 4, folds.bincount().tolist())


@pytest.mark.parametrize(("criterion", "chosen"), [("pooled", 1e3), ("standardised", 1e-6)])
def test_a_massive_target_dimension_dictates_lambda_only_by_the_pooled_criterion(criterion, chosen):
    """It is noise, so it is predicted best by its mean; the other dimensions follow from the source."""
    H_source = torch.randn(N, D_SOURCE, dtype=torch.float64)
    H_target = H_source @ torch.randn(D_SOURCE, D_TARGET, dtype=torch.float64)
    H_target[:, 0] = 1e4 * torch.randn(N, dtype=torch.float64)
    mapping = RidgeMapping(D_SOURCE, D_TARGET, lambda_unit="relative")
    best, errors = mapping.cross_validate(H_source, H_target, [1e-6, 1.0, 1e3], criterion=criterion)
    assert best == mapping.lambda_ == mapping.cv["best_lambda"] == chosen
    assert min(errors, key=errors.get) == 1e3, "the errors returned are pooled in any case"


def test_a_noiseless_map_retrieves_every_activation_and_shuffled_pairs_teach_nothing(pairs, mapping):
    H_target = pairs[0] @ torch.randn(D_SOURCE, D_TARGET, dtype=torch.float64) + 3
    mapping.cross_validate(pairs[0], H_target, [1e-6, 0.1, 10.0, 1e3, 1e5])
    analysis = mapping.analyze()
    assert (analysis["retrieval_accuracy"], analysis["retrieval_n"]) == (1.0, N)
    assert min(analysis["held_out_r2"], analysis["held_out_r2_median_dimension"]) > 0.99
    assert analysis["shuffled_r2"] < 0.02


def test_retrieval_of_shuffled_pairs_is_chance(mapping):
    """Of 1,000 activations 1 is expected to be found; more than 7 has a probability of 1e-5."""
    n = N_RETRIEVAL + 200
    H_source = torch.randn(n, D_SOURCE)
    H_target = H_source @ torch.randn(D_SOURCE, D_TARGET)
    mapping.cross_validate(H_source, H_target[torch.randperm(n)], [1.0])
    assert mapping.cv["retrieval_n"] == N_RETRIEVAL
    assert mapping.cv["retrieval_accuracy"] <= 7 / N_RETRIEVAL
    hits = [50 * retrieval_accuracy(*torch.randn(2, 50, 4), torch.ones(4)) for _ in range(40)]
    assert 20 < sum(hits) < 65, "40 are expected"


def test_retrieval_weighs_dimensions():
    true = torch.tensor([[0.0, 0.0], [1.0, 100.0], [2.0, 0.0]])
    predicted = true + torch.tensor([[0.0, 100.0], [0.1, -100.0], [0.0, 0.0]])
    assert retrieval_accuracy(predicted, true, torch.tensor([1.0, 0.0])) == 1
    assert retrieval_accuracy(predicted, true, torch.ones(2)) == pytest.approx(1 / 3)


@pytest.fixture
def half_predicted():
    """A map whose target has 2 axes that follow from the source and 2 of pure noise, and all 4 axes."""
    axes = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    H_source = torch.randn(400, 2, dtype=torch.float64)
    values = torch.cat([H_source, torch.randn(400, 2, dtype=torch.float64)], dim=1)
    mapping = RidgeMapping(2, 4)
    mapping.cross_validate(H_source, values * torch.tensor([8.0, 2.0, 4.0, 1.0]) @ axes.T + 5, [1e-3, 1.0])
    return mapping, axes


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 0, 0, 0], 1), ([0, -9, 0, 0], 1), ([0, 0, 1, 0], 0), ([0, 0, 0, 1], 0), ([0, 3, 4, 0], 9 / 25)],
)
def test_predicted_energy_is_the_share_of_a_vector_on_predictable_axes(half_predicted, weights, expected):
    mapping, axes = half_predicted
    v_target = (axes @ torch.tensor(weights, dtype=torch.float64)).float()
    energy = mapping.predicted_energy(v_target)
    assert list(energy.values()) == pytest.approx([expected, expected], abs=0.03)
    curve = mapping.energy_curve(v_target)
    assert curve["r2"][50] == 0.5
    assert curve["vector"][50] == energy["share_well_predicted"]
    assert curve["activations"][50] == pytest.approx((8**2 + 2**2) / (8**2 + 2**2 + 4**2 + 1), abs=0.03)
    assert mapping.predicted_energy(7 * v_target) == pytest.approx(energy, abs=1e-6)


@pytest.mark.parametrize("constant", [0.0, 3.3, 1e6])
def test_a_constant_target_dimension_is_counted_and_left_out(pairs, mapping, constant):
    H_source, H_target = pairs
    without = RidgeMapping(D_SOURCE, D_TARGET - 1)
    without.cross_validate(H_source, H_target[:, 1:], LAMBDAS)
    mapping.cross_validate(H_source, H_target.index_fill(1, torch.tensor(0), constant), LAMBDAS)
    assert (mapping.cv["n_constant_dimensions"], without.cv["n_constant_dimensions"]) == (1, 0)
    assert len(mapping.cv["best_r2_per_dimension"]) == D_TARGET - 1
    for name in ("best_r2", "best_r2_standardised", "best_r2_median_dimension", "best_r2_per_dimension"):
        assert mapping.cv[name] == pytest.approx(without.cv[name], rel=1e-9)
    assert mapping.cv["retrieval_accuracy"] == without.cv["retrieval_accuracy"]


@pytest.mark.parametrize("case", ["constant dimensions", "fewer pairs than dimensions"])
def test_r2_of_a_principal_axis_without_variance_is_no_huge_number(pairs, case):
    H_source, H_target = pairs
    constants = torch.linspace(0.1, 3.3, 5, dtype=torch.float64).expand(N, 5)
    H_target = torch.cat([H_target, constants], dim=1)
    if case == "fewer pairs than dimensions":
        H_source, H_target = H_source[:10], H_source[:10] @ torch.randn(D_SOURCE, 20, dtype=torch.float64)
    mapping = RidgeMapping(D_SOURCE, H_target.shape[1])
    mapping.cross_validate(H_source, H_target, LAMBDAS)
    assert max(abs(r2 or 0) for r2 in mapping.cv["best_r2_per_component"]) < 1e6
    assert 0 <= mapping.predicted_energy(torch.eye(H_target.shape[1])[-1])["mean_r2"] <= 1


def test_analyze_states_singular_values_and_rank(pairs, mapping):
    H_source, H_target = pairs
    H_target = H_target[:, :1] * torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 1.0])
    H_target[:, 5] += 2 * H_source[:, 8]
    analysis = mapping.fit(H_source, H_target, 7.0).analyze()
    singular_values = np.linalg.svd(mapping.W.numpy(), compute_uv=False)
    assert analysis["singular_values"][:2] == pytest.approx(singular_values[:2], rel=1e-9)
    assert analysis["effective_rank"] == (singular_values > 0.01 * singular_values[0]).sum() == 2
    assert (analysis["n"], analysis["lambda"], analysis["lambda_absolute"]) == (N, 7.0, 7.0)
    assert analysis["held_out_r2"] is analysis["shuffled_r2"] is None


def test_pairs_replace_those_that_were_summed(pairs):
    summed = streamed(pairs).fit(lambda_=0.3)
    replaced = streamed(rescaled(pairs, "large source dimension")).fit(*pairs, 0.3)
    assert summed.n == replaced.n == N
    assert relative_error(replaced.W, summed.W.numpy()) < 1e-11
    assert relative_error(replaced.predict(pairs[0]), summed.predict(pairs[0]).numpy()) < 1e-11


def test_statistics_without_a_sample_can_be_cross_validated(pairs):
    maps = [
        RidgeMapping.from_statistics(PairStatistics(D_SOURCE, D_TARGET, n_sample=n_sample).add(*pairs))
        for n_sample in (N, 0)
    ]
    assert maps[0].cross_validate() == maps[1].cross_validate()
    assert [each.cv["retrieval_n"] for each in maps] == [N, 0]


def test_the_order_of_lambdas_changes_nothing_and_refitting_forgets_their_errors(pairs, mapping):
    expected = mapping.cross_validate(*pairs, LAMBDAS)
    assert mapping.cross_validate(*pairs, [*LAMBDAS[::-1], LAMBDAS[0]]) == expected
    assert mapping.fit(*pairs, 1.0) is mapping
    assert mapping.cv is mapping.analyze()["held_out_r2"] is None


def test_groups_are_never_split_and_folds_are_even_and_seeded():
    groups = torch.randint(12, (100,)).tolist()
    folds = assign_folds(100, 5, groups).tolist()
    assert len(set(zip(groups, folds, strict=True))) == len(set(groups))
    alone, same, other = (assign_folds(23, 5, seed=seed) for seed in (1, 1, 2))
    assert sorted(alone.bincount().tolist()) == [4, 4, 5, 5, 5]
    assert torch.equal(alone, same)
    assert not torch.equal(alone, other)


def test_a_best_lambda_at_the_edge_of_the_grid_is_noted(pairs, mapping):
    for lambda_values, at_edge in (([0.1, 1.0, 10.0], True), ([1e-6, 30.0, 1e6], False), ([1.0], False)):
        mapping.cross_validate(*pairs, lambda_values)
        assert mapping.cv["best_at_edge"] is at_edge


def test_a_saved_map_is_the_same_when_loaded_with_its_layers_and_models(pairs, mapping, tmp_path):
    mapping.cross_validate(*pairs, LAMBDAS)
    mapping.source_layer, mapping.target_model = 7, "another"
    mapping.save(tmp_path / "map.pt", fingerprint="f")
    loaded = RidgeMapping.load(tmp_path / "map.pt")
    assert (loaded.analyze(), loaded.cv) == (mapping.analyze(), mapping.cv)
    assert torch.equal(loaded.predict(pairs[0]), mapping.predict(pairs[0]))
    origin = (loaded.source_layer, loaded.target_layer, loaded.source_model, loaded.target_model)
    assert origin == (7, None, None, "another")
    assert torch.load(tmp_path / "map.pt", weights_only=True)["fingerprint"] == "f"


# Bad input


def test_a_foreign_file_is_rejected(tmp_path):
    torch.save({"W": torch.ones(2, 2)}, tmp_path / "map.pt")
    with pytest.raises(InputError, match="not a ridge mapping"):
        RidgeMapping.load(tmp_path / "map.pt")


@pytest.mark.parametrize(
    ("H_source", "H_target", "lambda_", "message"),
    [
        (X, Y[:9], 1.0, "one row for each pair"),
        (X[:, :8], Y, 1.0, r"H_source has shape \(10, 8\), expected .*9"),
        (X, Y[:, :5], 1.0, r"H_target has shape \(10, 5\), expected .*6"),
        (X[0], Y[0], 1.0, r"H_source has shape \(9,\), expected \(n, 9\)"),
        (X[:1], Y[:1], 1.0, "got 1 pairs, expected 2 or more|2 folds over 1 groups"),
        (X, None, 1.0, "give both H_source and H_target, or neither"),
        (None, None, 1.0, "give both H_source and H_target, or neither"),
        (X, Y, 0.0, r"lambda is 0\.0"),
        (X, Y, float("nan"), "lambda is nan"),
        (X, Y, float("inf"), "lambda is inf"),
        (X.clone().index_fill_(0, torch.tensor([3, 7]), float("nan")), Y, 1.0, "H_source has 2 rows.*row 3"),
        (X, Y.clone().index_fill_(0, torch.tensor([4]), float("inf")), 1.0, "H_target has 1 rows.*row 4"),
    ],
)
def test_bad_pairs_and_lambdas_are_rejected(mapping, H_source, H_target, lambda_, message):
    with pytest.raises(InputError, match=message):
        mapping.fit(H_source, H_target, lambda_)
    with pytest.raises(InputError, match=message):
        mapping.cross_validate(H_source, H_target, [lambda_], n_folds=2)
    assert mapping.W is None


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: m.transform(X), "not fitted"),
        (lambda m: m.predict(X), "not fitted"),
        (lambda m: m.analyze(), "not fitted"),
        (lambda m: m.save("map.pt"), "not fitted"),
        (lambda m: m.fit(X, Y).transform(torch.ones(2, D_TARGET)), "shape"),
        (lambda m: m.fit(X, Y).predict(torch.ones(1, 2, D_SOURCE)), "shape"),
        (lambda m: m.fit(X, Y).predict(torch.tensor(1.0)), "shape"),
        (lambda m: m.cross_validate(X, Y, []), "lambda_values is empty"),
        (lambda m: m.cross_validate(X, Y, n_folds=1), "expected 2 folds or more"),
        (lambda m: m.cross_validate(X, Y, n_folds=11), "11 folds over 10 groups"),
        (lambda m: m.cross_validate(X, Y, criterion="median"), "'median' is unknown; choose pooled or stand"),
        (lambda m: m.cross_validate(X, Y, groups=[0, 1, 2] * 3 + [0]), "5 folds over 3 groups"),
        (lambda m: m.cross_validate(X, Y, groups=[0, 1, 2]), "3 groups for 10 rows"),
        (lambda m: m.cross_validate(X.cumsum(0), 0.1 * Y), "target activations are constant"),
        (lambda m: streamed((X, Y.cumsum(0)), 10).cross_validate(), r"folds have \[4, 4, 2, 0\] pairs"),
        (lambda m: RidgeMapping(D_SOURCE, D_TARGET, "relative").fit(X, Y), "source activations are constant"),
        (lambda m: RidgeMapping(5, 5, "log"), "'log' is unknown"),
    ],
)
def test_bad_use_is_rejected(mapping, ask, message):
    with pytest.raises(InputError, match=message):
        ask(mapping)

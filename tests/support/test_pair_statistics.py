"""Sums in pieces, merged or saved equal one call; no document is split; rejected pairs add nothing."""

import copy

import numpy as np
import pytest
import torch
from tiny_runs import comparable

from support import pair_statistics
from support.artifacts import load_tensors, save_tensors
from support.errors import InputError
from support.pair_statistics import PairStatistics

N, D_SOURCE, D_TARGET, N_FOLDS = 300, 5, 4, 3
DOCUMENTS = [f"doc {row // 7}" for row in range(N)]
FOLD_OF = {f"doc {number}": number % N_FOLDS for number in range(43)}
KINDS = ["plain", "far mean", "large dimension"]
with_and_without_documents = pytest.mark.parametrize("documents", [DOCUMENTS, None], ids=["with", "without"])


def make_pairs(kind="plain", n=N):
    """Correlated pairs; with means of 100 standard deviations, or one dimension 1,000 times larger."""
    generator = torch.Generator().manual_seed(5)
    H_source = torch.randn(n, D_SOURCE, generator=generator, dtype=torch.float64)
    H_target = torch.randn(n, D_TARGET, generator=generator, dtype=torch.float64) + H_source[:, :D_TARGET]
    if kind == "far mean":
        return H_source + 100 * H_source.std(0), H_target - 100 * H_target.std(0)
    if kind == "large dimension":
        H_source[:, 2] *= 1000
        H_target[:, 1] *= 1000
    return H_source, H_target


def summed(pairs, size=N, documents=DOCUMENTS, into=None, **options):
    """The pairs, handed over `size` at a time."""
    statistics = into or PairStatistics(D_SOURCE, D_TARGET, **{"n_folds": N_FOLDS, **options})
    for start in range(0, len(pairs[0]), size):
        rows = slice(start, min(start + size, len(pairs[0])))
        statistics.add(pairs[0][rows], pairs[1][rows], None if documents is None else documents[rows])
    return statistics


def part_of(pairs, rows, **options):
    return summed([H[rows] for H in pairs], 64, DOCUMENTS[rows], fold_of=FOLD_OF, **options)


def restored(statistics, folder):
    save_tensors(folder / "sums.pt", statistics.content())
    return PairStatistics.from_content(load_tensors(folder / "sums.pt"))


def state(statistics):
    """Everything it holds, as values that can be compared later."""
    return copy.deepcopy(comparable(statistics.content()))


def reference(pairs, rows, centre_rows):
    """The blocks of Z'Z of the given rows around the mean of others, in extended precision, by name."""
    Z = np.concatenate([H.double().numpy() for H in pairs], axis=1).astype(np.longdouble)
    centred = Z[rows] - Z[centre_rows].mean(0)
    products = centred.T @ centred
    source, target = slice(None, D_SOURCE), slice(D_SOURCE, None)
    places = {"gram": (source, source), "cross": (source, target), "target_gram": (target, target)}
    return {name: products[place] for name, place in places.items()}


def assert_close_moments(found, expected):
    """Each entry to 1e-13 of the product of its two dimensions' root sums of squares."""
    source, target = (np.sqrt(np.diag(expected[name])) for name in ("gram", "target_gram"))
    scales = {"gram": (source, source), "cross": (source, target), "target_gram": (target, target)}
    for name, pair in scales.items():
        error = np.abs(getattr(found, name).numpy() - expected[name]) / np.outer(*pair)
        assert error.max() < 1e-13, name


def assert_same(found, expected):
    """The same sums but for rounding, and the same sample to the last bit, however its places were drawn."""
    folds = range(expected.n_folds)
    moments = [(found.total(), expected.total())]
    moments += [pair for fold in folds for pair in zip(found.split(fold), expected.split(fold), strict=True)]
    for one, other in moments:
        assert one.n == other.n
        assert torch.allclose(one.source_mean, other.source_mean, rtol=1e-12, atol=1e-13)
        assert torch.allclose(one.target_mean, other.target_mean, rtol=1e-12, atol=1e-13)
        products = {name: getattr(other, name).numpy() for name in ("gram", "cross", "target_gram")}
        assert_close_moments(one, products)
    assert found.n.tolist() == expected.n.tolist()
    assert (found.groups, found.n_groups) == (expected.groups, expected.n_groups)
    for name in ("H_source", "H_target", "folds", "rows"):
        assert torch.equal(getattr(found.sample, name), getattr(expected.sample, name)), name


# Sums


@with_and_without_documents
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_of_any_size_equal_one_call(size, documents, monkeypatch):
    expected = summed(make_pairs(), N, documents, n_sample=20)
    monkeypatch.setattr(pair_statistics, "CHUNK", 16)
    assert_same(summed(make_pairs(), size, documents, n_sample=20), expected)


@pytest.mark.parametrize("size", [1, N])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_centred_products_whatever_the_mean_and_scale(kind, size):
    pairs = make_pairs(kind)
    statistics = summed(pairs, size)
    total, every = statistics.total(), np.full(N, True)
    assert total.n == N
    assert torch.allclose(total.source_mean, pairs[0].mean(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(total.target_mean, pairs[1].mean(0), rtol=1e-12, atol=1e-12)
    assert_close_moments(total, reference(pairs, every, every))
    for fold in range(N_FOLDS):
        train, test = statistics.split(fold)
        held_out = (statistics.sample.folds == fold).numpy()
        assert (train.n, test.n) == (N - held_out.sum(), held_out.sum())
        assert torch.equal(test.source_mean, train.source_mean)
        assert_close_moments(train, reference(pairs, ~held_out, ~held_out))
        assert_close_moments(test, reference(pairs, held_out, ~held_out))


def test_low_precision_is_summed_in_float64():
    pairs = [H.bfloat16() for H in make_pairs("far mean")]
    assert_same(summed(pairs, 50), summed([H.double() for H in pairs], 50))
    large = torch.full((4, D_SOURCE), 6e4, dtype=torch.float16), torch.ones(4, D_TARGET)
    mean = PairStatistics(D_SOURCE, D_TARGET).add(*large).total().source_mean
    assert torch.equal(mean, large[0][0].double()), "its sum would overflow in float16"


def test_inputs_are_neither_modified_nor_kept():
    pairs = [H.float().requires_grad_() for H in make_pairs()]
    originals = [H.detach().clone() for H in pairs]
    statistics = summed(pairs)
    assert all(torch.equal(H, original) for H, original in zip(pairs, originals, strict=True))
    for H in pairs:
        H.detach().zero_()
    assert_same(statistics, summed(originals))
    assert not statistics.sample.H_source.requires_grad


# Merged, saved and continued


@pytest.mark.parametrize("cut", [0, 140, N])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_two_accumulations_equals_one(kind, cut):
    pairs = make_pairs(kind)
    first, second = part_of(pairs, slice(cut)), part_of(pairs, slice(cut, None))
    before = state(second)
    merged = first.merge(second)
    assert merged is first
    assert_same(merged, part_of(pairs, slice(None)))
    merged.merge(part_of(pairs, slice(7)))
    assert state(second) == before


@pytest.mark.parametrize("n_sample", [0, 20, 150, 2 * N])
@with_and_without_documents
def test_sums_and_sample_go_on_after_loading_as_if_nothing_had_happened(tmp_path, documents, n_sample):
    pairs = make_pairs("far mean")
    first = restored(summed([H[:140] for H in pairs], 64, documents, n_sample=n_sample, seed=3), tmp_path)
    continued = summed([H[140:] for H in pairs], 64, documents and documents[140:], into=first)
    assert_same(continued, summed(pairs, 64, documents, n_sample=n_sample, seed=3))


def test_merged_sums_sample_the_same_after_loading_and_different_places_from_both_workers(tmp_path):
    parts = (part_of(make_pairs(), rows, n_sample=20) for rows in (slice(140), slice(140, 280)))
    merged = next(parts).merge(next(parts))
    assert len(set((merged.sample.rows % 140).tolist())) > 14
    loaded = restored(merged, tmp_path)
    assert_same(summed(make_pairs(), into=loaded), summed(make_pairs(), into=merged))


# Folds


def test_given_folds_are_kept_and_other_documents_go_to_the_smallest_fold():
    fold_of = {"a": 2, "b": 2, "c": 0}
    statistics = PairStatistics(D_SOURCE, D_TARGET, N_FOLDS, fold_of=fold_of)
    labels = ["a", "b", "c", "new", "a", "new", "new", "newer"]
    statistics.add(torch.ones(8, D_SOURCE), torch.ones(8, D_TARGET), labels)
    assert statistics.sample.folds.tolist() == [2, 2, 0, 1, 2, 1, 1, 0]
    assert statistics.n_groups == 5
    assert fold_of == {"a": 2, "b": 2, "c": 0}
    chosen = torch.tensor([1, 1, 0, 2])
    rows = torch.ones(4, D_SOURCE), torch.ones(4, D_TARGET)
    statistics = PairStatistics(D_SOURCE, D_TARGET, N_FOLDS).add(*rows, ["a", "a", "b", "c"], chosen)
    assert statistics.add(*rows, ["c", "b", "a", "a"]).sample.folds.tolist() == [1, 1, 0, 2, 2, 0, 1, 1]


@pytest.mark.parametrize("n_folds", [2, 5])
def test_pairs_without_documents_are_dealt_out_evenly_and_seeded(n_folds):
    dealt = [summed(make_pairs(), 11, None, n_folds=n_folds, seed=seed).sample.folds for seed in (1, 1, 2)]
    for turn in dealt[0].reshape(-1, n_folds):
        assert sorted(turn.tolist()) == list(range(n_folds))
    assert torch.equal(dealt[0], dealt[1])
    assert not torch.equal(dealt[0], dealt[2])


# Sample


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (20, 20), (21, 20), (N, 20)])
def test_the_sample_holds_numbered_pairs_in_order_and_no_more_than_asked(n, expected):
    H_source, H_target = (H[:n] for H in make_pairs())
    statistics = summed((H_source, H_target), 11, n_sample=20)
    sample = statistics.sample
    assert len(sample.rows) == len(sample.rows.unique()) == expected
    assert sample.rows.tolist() == sorted(sample.rows.tolist())
    assert torch.equal(sample.H_source, H_source[sample.rows].float())
    assert torch.equal(sample.H_target, H_target[sample.rows].float())
    assert all(statistics.fold_of[DOCUMENTS[r]] == f for r, f in zip(sample.rows, sample.folds, strict=True))


def test_the_sample_is_uniform_and_seeded():
    """Over 100 seeds each tenth of 300 rows expects 200 of the 2,000 places, with deviation 13."""
    pairs = make_pairs()
    rows = [summed(pairs, 50, None, n_sample=20, seed=seed).sample.rows for seed in range(100)]
    counts = torch.bincount(torch.cat(rows) // 30, minlength=10)
    assert counts.sum() == 2000
    assert (counts - 200).abs().max() < 52
    assert abs(torch.cat(rows).double().mean() - 149.5) < 8
    assert torch.equal(rows[7], summed(pairs, N, None, n_sample=20, seed=7).sample.rows)
    assert not torch.equal(rows[7], rows[8])


# Bad input


def with_rows(width, value, rows):
    return torch.ones(10, width).index_fill_(0, torch.tensor(rows), value)


X, Y = torch.ones(10, D_SOURCE), torch.ones(10, D_TARGET)
NOT_FINITE = with_rows(D_TARGET, float("nan"), [3, 7])


@pytest.mark.parametrize(
    ("H_source", "H_target", "options", "message"),
    [
        (X[:, :4], Y, {}, r"H_source has shape \(10, 4\), expected \(n, 5\)"),
        (X, torch.ones(10, 5), {}, r"H_target has shape \(10, 5\), expected \(n, 4\)"),
        (X[0], Y, {}, r"H_source has shape \(5,\)"),
        (X, Y[None], {}, r"H_target has shape \(1, 10, 4\)"),
        (X, Y[:9], {}, "H_source has 10 rows and H_target 9"),
        (X, Y, {"groups": DOCUMENTS[:9]}, "got 9 groups for 10 rows"),
        (X, Y, {"groups": torch.arange(11)}, "got 11 groups for 10 rows"),
        (X, NOT_FINITE, {"groups": ["new"] * 10}, "H_target has 2 rows.*finite, first row 3, of text 'new'"),
        (with_rows(D_SOURCE, float("inf"), [9]), Y, {}, "H_source has 1 rows.*first row 9; "),
        (with_rows(D_SOURCE, -float("inf"), [0]), NOT_FINITE, {}, "H_source has 1 rows.*first row 0; "),
    ],
)
def test_bad_pairs_are_rejected_and_nothing_is_added(H_source, H_target, options, message):
    statistics = summed(make_pairs(n=21), n_sample=9)
    before = state(statistics)
    with pytest.raises(InputError, match=message):
        statistics.add(H_source, H_target, **options)
    assert state(statistics.add(X[:0], Y[:0], [])) == before


def test_fewer_than_2_pairs_and_a_fold_without_pairs_are_an_error():
    with pytest.raises(InputError, match="got 1 pairs, expected 2 or more"):
        PairStatistics(D_SOURCE, D_TARGET).add(X[:1], Y[:1]).total()
    statistics = PairStatistics(D_SOURCE, D_TARGET, N_FOLDS).add(X, Y, ["a"] * 4 + ["b"] * 6)
    with pytest.raises(InputError, match=r"3 folds over 2 groups: the folds have \[4, 6, 0\] pairs"):
        statistics.split(0)

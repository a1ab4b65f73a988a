"""Sums in pieces, merged or saved equal one call; no document is split; refused pairs add nothing."""

import copy

import numpy as np
import pytest
import torch

from support import pair_statistics
from support.errors import InputError
from support.pair_statistics import PairStatistics

N, D_SOURCE, D_TARGET, N_FOLDS = 300, 5, 4, 3
DOCUMENTS = [f"doc {row // 7}" for row in range(N)]
FOLD_OF = {f"doc {number}": number % N_FOLDS for number in range(43)}
KINDS = ["plain", "far mean", "large dimension"]
MOMENTS = ("gram", "cross", "target_gram")


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


def state(statistics):
    """Everything it holds, as values that can be compared later."""
    content = statistics.content()
    content |= {f"sample {name}": values for name, values in content.pop("sample").items()}
    content["groups"] = sorted(content["groups"])
    return {
        name: copy.deepcopy(getattr(value, "tolist", lambda v=value: v)()) for name, value in content.items()
    }


def reference(pairs, rows, centre_rows):
    """The blocks of Z'Z of the given rows around the mean of others, in extended precision, by name."""
    Z = np.concatenate([H.double().numpy() for H in pairs], axis=1).astype(np.longdouble)
    centred = Z[rows] - Z[centre_rows].mean(0)
    products = centred.T @ centred
    source, target = slice(None, D_SOURCE), slice(D_SOURCE, None)
    places = {"gram": (source, source), "cross": (source, target), "target_gram": (target, target)}
    return {name: products[place] for name, place in places.items()}


def assert_close_moments(found, expected, tolerance=1e-13):
    """Each entry to `tolerance` of the product of its two dimensions' root sums of squares."""
    source, target = (np.sqrt(np.diag(expected[name])) for name in ("gram", "target_gram"))
    scales = {"gram": (source, source), "cross": (source, target), "target_gram": (target, target)}
    for name in MOMENTS:
        error = np.abs(getattr(found, name).numpy() - expected[name]) / np.outer(*scales[name])
        assert error.max() < tolerance, name


def assert_same_sums(found, expected):
    folds = range(expected.n_folds)
    moments = [(found.total(), expected.total())]
    moments += [pair for fold in folds for pair in zip(found.split(fold), expected.split(fold), strict=True)]
    for one, other in moments:
        assert one.n == other.n
        assert torch.allclose(one.source_mean, other.source_mean, rtol=1e-12, atol=1e-13)
        assert torch.allclose(one.target_mean, other.target_mean, rtol=1e-12, atol=1e-13)
        assert_close_moments(one, {name: getattr(other, name).numpy() for name in MOMENTS})
    assert found.n.tolist() == expected.n.tolist()
    assert (found.groups, found.n_groups) == (expected.groups, expected.n_groups)


def assert_same_sample(found, expected):
    for name, values in vars(expected.sample).items():
        assert torch.equal(getattr(found.sample, name), values), name


@pytest.mark.parametrize("documents", [DOCUMENTS, None], ids=["documents", "no documents"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_of_any_size_equal_one_call(size, documents, monkeypatch):
    expected = summed(make_pairs(), N, documents, n_sample=20)
    monkeypatch.setattr(pair_statistics, "CHUNK", 16)
    found = summed(make_pairs(), size, documents, n_sample=20)
    assert_same_sums(found, expected)
    assert_same_sample(found, expected)


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


@pytest.mark.parametrize("cut", [0, 140, N])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_two_accumulations_equals_one(kind, cut):
    pairs = make_pairs(kind)
    expected = part_of(pairs, slice(None))
    first, second = part_of(pairs, slice(cut)), part_of(pairs, slice(cut, None))
    before = state(second)
    merged = first.merge(second)
    assert merged is first
    assert_same_sums(merged, expected)
    assert_same_sample(merged, expected)
    assert state(second) == before
    merged.merge(part_of(pairs, slice(7)))
    assert state(second) == before


def test_sums_merged_saved_loaded_and_continued_equal_all_at_once(tmp_path):
    pairs = make_pairs("far mean")
    merged = part_of(pairs, slice(70)).merge(part_of(pairs, slice(70, 140)))
    merged.save(tmp_path / "sums.pt", fingerprint="f")
    rest = [H[140:] for H in pairs]
    continued = summed(rest, 64, DOCUMENTS[140:], into=PairStatistics.load(tmp_path / "sums.pt"))
    assert_same_sums(continued, part_of(pairs, slice(None)))
    assert_same_sample(continued, part_of(pairs, slice(None)))
    assert torch.load(tmp_path / "sums.pt", weights_only=True)["fingerprint"] == "f"


@pytest.mark.parametrize("n_sample", [0, 20, 150, 2 * N])
@pytest.mark.parametrize("documents", [DOCUMENTS, None], ids=["documents", "no documents"])
def test_sums_and_sample_go_on_after_loading_as_if_nothing_had_happened(tmp_path, documents, n_sample):
    pairs = make_pairs()
    expected = summed(pairs, 64, documents, n_sample=n_sample, seed=3)
    first = summed([H[:140] for H in pairs], 64, documents, n_sample=n_sample, seed=3)
    first.save(tmp_path / "sums.pt")
    loaded = PairStatistics.load(tmp_path / "sums.pt")
    rest = documents and documents[140:]
    continued = summed([H[140:] for H in pairs], 64, rest, into=loaded)
    assert_same_sums(continued, expected)
    assert_same_sample(continued, expected)


def merged_workers(n_sample=10):
    pairs = make_pairs()
    return part_of(pairs, slice(140), n_sample=n_sample).merge(
        part_of(pairs, slice(140, 280), n_sample=n_sample)
    )


def test_a_merged_sample_does_not_take_the_same_places_from_both_workers():
    rows = merged_workers(20).sample.rows
    assert len(set((rows % 140).tolist())) > 14


def test_a_merged_accumulation_samples_the_same_whether_or_not_it_was_saved(tmp_path):
    merged_workers().save(tmp_path / "sums.pt")
    more = make_pairs()
    loaded = summed(more, into=PairStatistics.load(tmp_path / "sums.pt"))
    assert_same_sample(summed(more, into=merged_workers()), loaded)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_document_is_never_split_even_when_it_comes_back(seed, as_tensor):
    documents = torch.randint(12, (N,), generator=torch.Generator().manual_seed(seed))
    statistics = summed(make_pairs(), 11, documents if as_tensor else documents.tolist())
    folds = statistics.sample.folds
    assert statistics.n.tolist() == torch.bincount(folds).tolist()
    assert all(len(folds[documents == document].unique()) == 1 for document in range(12))
    assert statistics.n_groups == 12
    assert statistics.n.min() > 0


def test_a_document_is_not_split_after_merging_another_table():
    row = torch.ones(1, D_SOURCE), torch.ones(1, D_TARGET)
    mine = PairStatistics(D_SOURCE, D_TARGET, fold_of={"d": 0}).add(*row, ["d"])
    other = PairStatistics(D_SOURCE, D_TARGET, fold_of={"d": 1, "e": 2}).add(*row, ["e"])
    mine.merge(other).add(*row, ["d"])
    assert mine.n.tolist() == [2, 0, 1, 0, 0]


def test_fold_of_is_respected_and_other_documents_go_to_the_smallest_fold():
    fold_of = {"a": 2, "b": 2, "c": 0}
    statistics = PairStatistics(D_SOURCE, D_TARGET, N_FOLDS, fold_of=fold_of)
    labels = ["a", "b", "c", "new", "a", "new", "new", "newer"]
    statistics.add(torch.ones(8, D_SOURCE), torch.ones(8, D_TARGET), labels)
    assert statistics.sample.folds.tolist() == [2, 2, 0, 1, 2, 1, 1, 0]
    assert fold_of == {"a": 2, "b": 2, "c": 0}


def test_folds_that_the_caller_chooses_are_kept_for_these_documents():
    folds = torch.tensor([1, 1, 0, 2])
    rows = torch.ones(4, D_SOURCE), torch.ones(4, D_TARGET)
    statistics = PairStatistics(D_SOURCE, D_TARGET, N_FOLDS).add(*rows, ["a", "a", "b", "c"], folds)
    assert statistics.add(*rows, ["c", "b", "a", "a"]).sample.folds.tolist() == [1, 1, 0, 2, 2, 0, 1, 1]


@pytest.mark.parametrize("n_folds", [2, 5])
def test_pairs_without_documents_are_dealt_out_evenly_and_seeded(n_folds):
    dealt = [summed(make_pairs(), 11, None, n_folds=n_folds, seed=seed).sample.folds for seed in (1, 1, 2)]
    for turn in dealt[0].reshape(-1, n_folds):
        assert sorted(turn.tolist()) == list(range(n_folds))
    assert torch.equal(dealt[0], dealt[1])
    assert not torch.equal(dealt[0], dealt[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_source": 4}, r"\(5, 4, 3, 9\) and \(4, 4, 3, 9\)"),
        ({"d_target": 5}, r"\(5, 4, 3, 9\) and \(5, 5, 3, 9\)"),
        ({"n_folds": 4}, r"\(5, 4, 3, 9\) and \(5, 4, 4, 9\)"),
        ({"n_sample": 8}, r"\(5, 4, 3, 9\) and \(5, 4, 3, 8\)"),
        ({"fold_of": {"a": 1, "b": 2}}, "2 documents are in different folds.*first is '[ab]'.*same fold_of"),
    ],
)
def test_accumulations_that_do_not_fit_are_not_merged(arguments, message):
    def make(**changed):
        options = {"d_source": D_SOURCE, "d_target": D_TARGET, "n_folds": N_FOLDS, "n_sample": 9, **changed}
        made = PairStatistics(**options)
        H_source, H_target = (torch.ones(3, width) for width in (made.d_source, made.d_target))
        return made.add(H_source, H_target, ["a", "b", "c"])

    statistics = make(fold_of={"a": 0, "b": 0, "c": 0})
    before = state(statistics)
    with pytest.raises(InputError, match=message):
        statistics.merge(make(**{"fold_of": {"a": 0, "b": 0, "c": 0}, **arguments}))
    assert state(statistics) == before


def with_rows(width, value, rows):
    return torch.ones(10, width).index_fill_(0, torch.tensor(rows), value)


X, Y = torch.ones(10, D_SOURCE), torch.ones(10, D_TARGET)
BROKEN = with_rows(D_TARGET, float("nan"), [3, 7])


@pytest.mark.parametrize(
    ("H_source", "H_target", "groups", "message"),
    [
        (X[:, :4], Y, None, r"H_source has shape \(10, 4\), expected \(n, 5\)"),
        (X, torch.ones(10, 5), None, r"H_target has shape \(10, 5\), expected \(n, 4\)"),
        (X[0], Y, None, r"H_source has shape \(5,\)"),
        (X, Y[None], None, r"H_target has shape \(1, 10, 4\)"),
        (X, Y[:9], None, "H_source has 10 rows and H_target 9"),
        (X, Y, DOCUMENTS[:9], "got 9 groups for 10 rows"),
        (X, Y, torch.arange(11), "got 11 groups for 10 rows"),
        (X, BROKEN, DOCUMENTS[:10], "H_target has 2 rows.*not finite, first row 3, of text 'doc 0'"),
        (X, BROKEN, ["new"] * 10, "H_target has 2 rows.*first row 3, of text 'new'"),
        (with_rows(D_SOURCE, float("inf"), [9]), Y, None, "H_source has 1 rows.*first row 9; "),
        (with_rows(D_SOURCE, -float("inf"), [0]), BROKEN, None, "H_source has 1 rows.*first row 0; "),
    ],
)
def test_bad_pairs_are_refused_and_nothing_is_added(H_source, H_target, groups, message):
    statistics = summed(make_pairs(n=21), n_sample=9)
    before = state(statistics)
    with pytest.raises(InputError, match=message):
        statistics.add(H_source, H_target, groups)
    assert state(statistics) == before
    assert statistics.n_pairs == 21


def test_no_rows_change_nothing():
    statistics = summed(make_pairs(n=21))
    before = state(statistics)
    statistics.add(X[:0], Y[:0], [])
    assert state(statistics) == before


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (10, 10), (20, 20), (21, 20), (N, 20)])
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


def test_a_sample_of_none_leaves_the_sums_alone(tmp_path):
    expected, statistics = summed(make_pairs()), summed(make_pairs(), 50, n_sample=0)
    assert_same_sums(statistics, expected)
    assert vars(statistics.sample)["H_source"].shape == (0, D_SOURCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float64(dtype):
    pairs = [H.to(dtype) for H in make_pairs("far mean")]
    exact = summed([H.double() for H in pairs], 50)
    found = summed(pairs, 50)
    assert_same_sums(found, exact)
    assert_same_sample(found, exact)


def test_finite_float16_whose_sum_overflows_is_accepted():
    large = torch.full((4, D_SOURCE), 6e4, dtype=torch.float16), torch.ones(4, D_TARGET)
    assert (
        PairStatistics(D_SOURCE, D_TARGET).add(*large).total().source_mean.tolist()
        == [torch.tensor(6e4, dtype=torch.float16).item()] * D_SOURCE
    )


def test_inputs_are_neither_modified_nor_kept():
    pairs = [H.float() for H in make_pairs()]
    originals = [H.clone() for H in pairs]
    statistics = summed(pairs)
    assert all(torch.equal(H, original) for H, original in zip(pairs, originals, strict=True))
    for H in pairs:
        H.zero_()
    assert_same_sums(statistics, summed(originals))
    assert_same_sample(statistics, summed(originals))


def test_tensors_that_need_gradients_are_accepted():
    pairs = [H.clone().requires_grad_() for H in make_pairs()]
    statistics = summed(pairs)
    assert_same_sums(statistics, summed(make_pairs()))
    assert not statistics.sample.H_source.requires_grad


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "sums.pt"
    summed(make_pairs()).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"sums\.pt is damaged"):
        PairStatistics.load(path)
    torch.save({"W": torch.ones(2, 2)}, path)
    with pytest.raises(InputError, match=r"sums\.pt does not hold pair statistics"):
        PairStatistics.load(path)


@pytest.mark.parametrize("n", [0, 1])
def test_moments_of_fewer_than_2_pairs_are_refused(n):
    statistics = PairStatistics(D_SOURCE, D_TARGET).add(X[:n], Y[:n])
    with pytest.raises(InputError, match=f"got {n} pairs, expected 2 or more"):
        statistics.total()


def test_a_fold_without_pairs_is_refused_with_the_sizes():
    statistics = PairStatistics(D_SOURCE, D_TARGET, N_FOLDS).add(X, Y, ["a"] * 4 + ["b"] * 6)
    with pytest.raises(InputError, match=r"3 folds over 2 groups: the folds have \[4, 6, 0\] pairs"):
        statistics.split(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5), "positive integers"),
        ((5, -1), "positive integers"),
        ((5, 5, 1), "n_folds is 1, expected 2"),
        ((5, 5, 2, 0, None, -1), "n_sample is -1, expected 0"),
        ((5, 5, 2, 0, {"a": 2}), "puts 'a' in fold 2; there are 2 folds"),
    ],
)
def test_bad_constructor_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        PairStatistics(*arguments)


@pytest.mark.parametrize("folds", [torch.tensor([0, 1]), torch.tensor([0, 1, 5]), torch.tensor([0, -1, 1])])
def test_folds_that_do_not_fit_are_refused_and_nothing_is_added(folds):
    statistics = PairStatistics(D_SOURCE, D_TARGET)
    with pytest.raises(InputError, match="a fold below 5"):
        statistics.add(torch.ones(3, D_SOURCE), torch.ones(3, D_TARGET), folds=folds)
    assert statistics.n_pairs == len(statistics.sample.rows) == 0
    with pytest.raises(InputError, match="got 0 pairs"):
        statistics.around(torch.zeros(D_SOURCE), torch.zeros(D_TARGET))

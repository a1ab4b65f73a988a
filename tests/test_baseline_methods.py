"""Each transfer follows its formula, for wider and narrower targets."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from baseline_methods import METHODS, BaselineTransfer
from ridge_mapping import RidgeMapping
from support.errors import InputError

D_SOURCE = 12


def fitted(d_target):
    generator = torch.Generator().manual_seed(1)
    H_source = torch.randn(60, D_SOURCE, generator=generator) + 3
    truth = torch.randn(D_SOURCE, d_target, generator=generator)
    return RidgeMapping(D_SOURCE, d_target).fit(H_source, H_source @ truth - 5, lambda_=0.5)


@pytest.fixture(params=[20, 12, 7])
def d_target(request):
    return request.param


@pytest.fixture
def v_source():
    return torch.randn(D_SOURCE)


@pytest.fixture
def transfer(d_target):
    return BaselineTransfer(D_SOURCE, d_target, seed=3)


def test_zero_pad_appends_zeros_or_cuts(transfer, v_source, d_target):
    padded = transfer.zero_pad(v_source)
    kept = min(D_SOURCE, d_target)
    assert padded.shape == (d_target,)
    assert torch.equal(padded[:kept], v_source[:kept])
    assert not padded[kept:].any()


def test_interpolate_is_linear_resampling_between_pixel_centres(transfer, v_source, d_target):
    places = (np.arange(d_target) + 0.5) * D_SOURCE / d_target - 0.5
    expected = np.interp(places, np.arange(D_SOURCE), v_source.numpy())
    assert_close(transfer.interpolate(v_source).numpy(), expected.astype(np.float32))


def test_random_proj_is_orthonormal(transfer, d_target):
    """Mapping the identity basis gives the matrix: rows orthonormal, or columns if it narrows."""
    matrix = torch.stack([transfer.random_proj(row) for row in torch.eye(D_SOURCE)])
    product = matrix @ matrix.T if d_target >= D_SOURCE else matrix.T @ matrix
    assert matrix.shape == (D_SOURCE, d_target)
    assert_close(product, torch.eye(min(D_SOURCE, d_target)), rtol=0, atol=1e-5)


def test_random_proj_depends_on_the_seed_alone(transfer, v_source, d_target):
    first = transfer.random_proj(v_source)
    torch.manual_seed(456)
    assert torch.equal(BaselineTransfer(D_SOURCE, d_target, seed=3).random_proj(v_source), first)
    assert not torch.allclose(BaselineTransfer(D_SOURCE, d_target, seed=4).random_proj(v_source), first)


def test_random_proj_has_no_preferred_direction():
    """Entries of Haar-distributed rows have mean 0 and mean square 1 / d_target."""
    first = torch.eye(4)[0]
    draws = torch.stack([BaselineTransfer(4, 6, seed).random_proj(first) for seed in range(2000)])
    assert draws.mean(0).abs().max() < 0.05
    assert_close(draws.pow(2).mean(0), torch.full((6,), 1 / 6), rtol=0, atol=0.02)


@pytest.mark.parametrize("normalize", [True, False])
def test_apply_all_baselines_gives_every_method_and_other_maps(transfer, v_source, d_target, normalize):
    mapping, v_oracle = fitted(d_target), 5 * torch.randn(d_target)
    originals = v_source.clone(), v_oracle.clone(), mapping.W.clone()
    others = {"other": lambda vector: torch.ones(d_target) * vector.sum()}
    vectors = transfer.apply_all_baselines(v_source, v_oracle, mapping, normalize, others)
    raw = {
        "zero_pad": transfer.zero_pad(v_source),
        "interpolate": transfer.interpolate(v_source),
        "random_proj": transfer.random_proj(v_source),
        "ridge_mapped": (v_source.double() @ mapping.W).float(),
        "oracle": v_oracle.clone(),
    }
    assert tuple(raw) == METHODS
    raw["other"] = torch.ones(d_target) * v_source.sum()
    assert tuple(vectors) == tuple(raw)
    for name, vector in vectors.items():
        assert vector.dtype == torch.float32
        assert_close(vector, raw[name] / raw[name].norm() if normalize else raw[name])
        vector.zero_()
    assert all(map(torch.equal, (v_source, v_oracle, mapping.W), originals)), "inputs are not modified"


@pytest.mark.parametrize("left_out", [(), (0, 3)])
def test_compare_to_oracle_gives_the_cosine_of_every_other_method(transfer, v_source, d_target, left_out):
    mapping, v_oracle = fitted(d_target), torch.randn(d_target)
    cosines = transfer.compare_to_oracle(v_source, v_oracle, mapping, left_out=left_out)
    vectors = transfer.apply_all_baselines(v_source, v_oracle, mapping)
    kept = [index for index in range(d_target) if index not in left_out]
    oracle = vectors.pop("oracle")[kept]
    assert cosines.keys() == vectors.keys()
    for name, cosine in cosines.items():
        vector = vectors[name][kept]
        assert cosine == pytest.approx((vector @ oracle / vector.norm() / oracle.norm()).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_source": torch.ones(11)}, r"v_source has shape \(11,\), expected \(12,\)"),
        ({"v_source": torch.ones(1, 12)}, r"v_source has shape \(1, 12\), expected \(12,\)"),
        ({"v_oracle": torch.ones(8)}, r"v_oracle has shape \(8,\), expected \(7,\)"),
        ({"v_source": torch.full((12,), float("nan"))}, "v_source has values that are not finite"),
        ({"v_oracle": torch.full((7,), float("inf"))}, "v_oracle has values that are not finite"),
        ({"v_oracle": torch.zeros(7)}, "the oracle vector has norm 0"),
        ({"v_source": torch.eye(12)[11]}, "the zero_pad vector has norm 0"),
        ({"ridge_mapping": RidgeMapping(D_SOURCE, 7)}, "not fitted"),
        ({"ridge_mapping": fitted(8)}, "the mapped vector has shape"),
        ({"ridge_mapping": RidgeMapping(5, 7).fit(torch.randn(9, 5), torch.randn(9, 7))}, r"expected \(5,\)"),
    ],
)
def test_bad_vectors_and_maps_are_rejected(change, message):
    good = {"v_source": torch.ones(D_SOURCE), "v_oracle": torch.ones(7), "ridge_mapping": fitted(7)}
    with pytest.raises(InputError, match=message):
        BaselineTransfer(D_SOURCE, 7).apply_all_baselines(**{**good, **change})

"""Sums and maps by CUDA's rules: computed on the device, they are those of the CPU, and left on the CPU."""

import pickle

import pytest
import torch
from fake_cuda import fake_cuda

from maps.comparison_maps import KINDS, ComparisonMap
from maps.layer_search import CentredLayer, compare_directions, fit_pair, pair_moments
from ridge_mapping import HeldOutFold, RidgeMapping
from support.pair_statistics import PairStatistics

N, D_SOURCE, D_TARGET = 200, 6, 8
LAMBDAS = [1e-3, 0.1, 10.0]
JOINED = [((0, 3), (0, 4)), ((0, 3), (4, 8)), ((3, 6), (0, 4))]


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    H_source = torch.randn(N, D_SOURCE, generator=generator)
    noise = torch.randn(N, D_TARGET, generator=generator)
    return H_source, torch.cat([H_source, H_source[:, :2]], 1) + noise


def summed(pairs, device):
    statistics = PairStatistics(D_SOURCE, D_TARGET, joined=JOINED, device=device)
    for start in range(0, N, 50):
        statistics.add(*(H[start : start + 50] for H in pairs))
    return statistics


def fitted(statistics, device):
    """All that is fitted of two layer pairs with the same source layer."""
    found, before = [], None
    for pair in JOINED[:2]:
        ridge = RidgeMapping.from_statistics(statistics.of_pair(*pair), "relative", device)
        ridge.cross_validate(lambda_values=LAMBDAS, beside=before)
        others = [ComparisonMap.fitted(kind, ridge, draw).content() for kind in KINDS for draw in (0, 1)]
        control = RidgeMapping.from_statistics(ridge.statistics, "relative", device)
        control.cross_validate(lambda_values=LAMBDAS, beside=ridge, is_control=True)
        found += [ridge.W, ridge.cv, ridge.analyze(), ridge.target_components, others, control.W, control.cv]
        before = ridge
    return found


def tensors_of(content):
    """All numbers in nested content, one tensor each."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple):
        return [tensor for each in content for tensor in tensors_of(each)]
    return [torch.as_tensor(content).double()] if isinstance(content, torch.Tensor | int | float) else []


def assert_close(found, expected):
    for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert one.device.type == "cpu"
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sums_on", ["cpu", "cuda:0"])
def test_maps_that_are_fitted_on_a_device_are_those_of_the_cpu(pairs, sums_on):
    expected = fitted(summed(pairs, "cpu"), "cpu")
    with fake_cuda():
        statistics = summed(pairs, sums_on)
        assert {str(values.device) for values in statistics.products.values()} == {sums_on}
        assert_close(fitted(statistics, "cuda:0"), expected)


def test_sums_on_a_device_travel_to_a_process_without_one(pairs):
    expected = summed(pairs, "cpu")
    with fake_cuda():
        sent = pickle.dumps(summed(pairs, "cuda:0"))
    both = pickle.loads(sent).merge(expected)
    one, two = (each.of_pair(*JOINED[1]).total() for each in (expected, both))
    assert_close([two.cross / 2, two.source_mean], [one.cross, one.source_mean])


def searched(pairs, device):
    is_held_out = (torch.arange(N) % 5 == 0).to(device)
    source, target = (CentredLayer.of(H.to(device), is_held_out) for H in pairs)
    fold = HeldOutFold(*pair_moments(source, target, source.products(source)))
    W, *scores = fit_pair(fold, LAMBDAS)
    directions = torch.eye(D_SOURCE, dtype=torch.float64).to(device) @ fold.basis @ W
    native = torch.eye(D_TARGET, dtype=torch.float64)[:D_SOURCE].to(device)
    return [*scores, *compare_directions(directions, directions, native, [1])]


def test_layers_that_are_searched_on_a_device_score_as_on_the_cpu(pairs):
    expected = searched(pairs, "cpu")
    with fake_cuda():
        assert_close(searched(pairs, "cuda:0"), expected)

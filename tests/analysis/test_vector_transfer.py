"""Controls that are made for all blocks at once keep what they are meant to keep."""

import pytest
import torch

from analysis.vector_transfer import OVER_BLOCKS


@pytest.fixture
def oracle():
    """Native vectors of six blocks that lie close to each other, as those of neighbouring blocks do."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(400, generator=generator)
    rows = shared + 0.5 * torch.randn(6, 400, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def test_random_directions_keep_the_native_cosines_between_blocks_and_nothing_else(oracle):
    drawn = OVER_BLOCKS["random_direction"](oracle, 0)
    assert len(drawn) == 3
    for rows in drawn:
        assert rows.dtype == oracle.dtype
        assert torch.allclose(rows @ rows.T, oracle @ oracle.T, atol=1e-5)
        assert (rows * oracle).sum(1).abs().max() < 0.2
    assert (drawn[0] * drawn[1]).sum(1).abs().max() < 0.2


def test_random_directions_depend_on_the_seed_alone(oracle):
    make = OVER_BLOCKS["random_direction"]
    assert torch.equal(make(oracle, 0)[0], make(oracle, 0)[0])
    assert not torch.allclose(make(oracle, 0)[0], make(oracle, 1)[0], atol=0.01)


def test_a_random_direction_of_one_block_in_few_dimensions_has_unit_norm():
    (row,) = OVER_BLOCKS["random_direction"](torch.eye(3)[:1], 0)[0]
    assert row.norm().item() == pytest.approx(1)

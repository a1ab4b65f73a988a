"""Blocks are paired by depth; bands lie in the middle half, small ones within large ones."""

import pytest

from maps.layer_bands import band_of, nested_bands, pair_by_depth
from support.errors import InputError


@pytest.mark.parametrize(
    ("n_source", "n_target", "band"),
    [
        (30, 18, [(7, 4), (9, 5), (11, 6), (12, 7), (14, 8), (16, 9), (17, 10), (19, 11), (21, 12)]),
        (4, 4, [(0, 0), (1, 1), (2, 2)]),
    ],
)
def test_a_band_is_of_the_targets_middle_half_with_source_blocks_as_deep(n_source, n_target, band):
    assert band_of(n_source, n_target) == band


def test_a_deep_target_gets_nine_blocks_spread_over_its_middle_half():
    targets = [target for _, target in band_of(30, 80)]
    assert (len(targets), targets[0], targets[-1]) == (9, 19, 59)
    assert pair_by_depth(0, 4, 40) == (0, 0), "there is no block before the first"


@pytest.mark.parametrize("n_blocks", [(3, 18), (18, 3)])
def test_a_model_with_too_few_blocks_is_rejected(n_blocks):
    with pytest.raises(InputError, match="four blocks or more"):
        band_of(*n_blocks)


def test_nested_bands_are_of_1_3_5_9_and_all_blocks():
    bands = nested_bands(30, 18)
    assert [len(band) for band in bands] == [1, 3, 5, 9, 18]
    assert bands[3] == band_of(30, 18)
    for small in bands[:3]:
        assert set(small) < set(bands[3]) < set(bands[4])
    assert bands[0] == [bands[3][4]]
    assert (bands[4][0], bands[4][-1]) == ((1, 0), (29, 17))
    assert [len(band) for band in nested_bands(4, 4)] == [1, 3, 4]

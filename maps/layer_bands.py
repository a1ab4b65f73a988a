"""Pair the decoder blocks of two models by depth, and choose the bands of blocks to steer (phases 1 to 4).

Depth counts the blocks that a residual stream has passed: block t has depth (t + 1) / n_target.
"""

from support.errors import InputError

LayerPair = tuple[int, int]  # (source layer, target layer)

BAND_DEPTHS = (0.25, 0.75)  # as parts of the target's depth
BAND_SIZE = 9  # blocks at most, because each needs a map of its own
NESTED_SIZES = (1, 3, 5)  # blocks in the smaller bands of the ablation


def band_of(n_source: int, n_target: int) -> list[LayerPair]:
    """Return up to nine blocks of the target's middle half, each with the source's block of that depth.

    Raises InputError: a model with fewer than four blocks.
    """
    if min(n_source, n_target) < 4:
        raise InputError(
            f"a band needs models of four blocks or more, the source has {n_source} and the target "
            f"{n_target}; name layer_idx"
        )
    low, high = BAND_DEPTHS
    inside = [layer for layer in range(n_target) if low <= (layer + 1) / n_target <= high]
    n = min(len(inside), BAND_SIZE)
    chosen = [inside[round(index * (len(inside) - 1) / max(1, n - 1))] for index in range(n)]
    return [pair_by_depth(layer, n_source, n_target) for layer in chosen]


def pair_by_depth(target_layer: int, n_source: int, n_target: int) -> LayerPair:
    """Return a target block with the source block whose depth is nearest."""
    return max(0, round((target_layer + 1) * n_source / n_target) - 1), target_layer


def nested_bands(n_source: int, n_target: int) -> list[list[LayerPair]]:
    """Return bands of 1, 3, 5 and 9 blocks, evenly spread over those of `band_of`, and one of all blocks."""
    band = band_of(n_source, n_target)
    sizes = sorted({*NESTED_SIZES, len(band)})
    bands = [
        [band[round((index + 0.5) * len(band) / size - 0.5)] for index in range(size)]
        for size in sizes
        if size <= len(band)
    ]
    return [*bands, [pair_by_depth(layer, n_source, n_target) for layer in range(n_target)]]

"""Map a vector from the source to the target model with a fitted map; no model is loaded.

    python -m tools.apply_mapping --mapping results/run/ridge_mapping.pt --vector formal.npy \
        --output mapped.safetensors

The vector is read from a .gguf, .safetensors, .pt or .npy file, at the source layer of the map. The mapped
vector keeps the map's scale (v @ W; the intercept is left out, because it belongs to activations alone).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from experiment.command_line import exit_status
from ridge_mapping import RidgeMapping
from support.errors import InputError
from support.vector_files import FORMATS, VectorFile, read_vectors, write_vectors


def apply_mapping(
    mapping: Path,
    vector: Path,
    output: Path,
    layer: int | None = None,
    target_layer: int | None = None,
    source_blocks: int | None = None,
) -> Path:
    """Map the vector of a file into another file, whose suffix says its format, and return its path.

    layer, target_layer: layer at which the vector is read and under which the mapped one is filed, by default
    those of the map. A map that was saved without layers needs target_layer, and also layer if the file holds
    vectors of several layers.
    source_blocks: of the source model, by default as the map knows it; with one row more, (layers, d) begins
    with the embedding's.
    Raises InputError: a file without a map or a vector, another width, or a layer that is missing.
    """
    form = output.suffix.removeprefix(".")
    if form not in FORMATS:
        raise InputError(f"--output is {output}, expected a file that ends with .{', .'.join(FORMATS)}")
    ridge, found = RidgeMapping.load(mapping), read_vectors(vector)
    layer = ridge.source_layer if layer is None else layer
    target_layer = ridge.target_layer if target_layer is None else target_layer
    if target_layer is None:
        raise InputError(f"{mapping} was saved without its target layer; name it with --target-layer")
    n_blocks = ridge.source_blocks if source_blocks is None else source_blocks
    mapped = ridge.transform(_vector_at(found, layer, n_blocks, ridge.d_source))
    metadata = {"mapping": str(mapping), "vector": str(vector), "source_layer": layer}
    for name in ("source_model", "target_model", "lambda_"):
        metadata[name.rstrip("_")] = getattr(ridge, name)
    write_vectors(output, form, {target_layer: mapped}, "", metadata)
    return output


def _vector_at(found: VectorFile, layer: int | None, n_blocks: int | None, d_source: int) -> Tensor:
    """Return the file's vector for a layer, or its only one, (d_source,)."""
    if layer is None and found.anywhere is None:
        if len(found.by_layer) != 1:
            raise InputError(f"{found.path} holds vectors of several layers; choose one with --layer")
        (layer,) = found.by_layer
    if found.rows is not None and n_blocks is None:
        raise InputError(
            f"{found.path} holds {len(found.rows)} rows, of which the first may be the embedding's; give the "
            "source model's number of blocks with --source-blocks"
        )
    return found.at(layer or 0, n_blocks, d_source)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tools.apply_mapping", description=about)
    parser.add_argument("--mapping", type=Path, required=True, help="ridge_mapping.pt of a run")
    parser.add_argument("--vector", type=Path, required=True, help="file with a vector of the source model")
    parser.add_argument("--output", type=Path, required=True, help=f"ends with .{', .'.join(FORMATS)}")
    parser.add_argument("--layer", type=int, help="source layer of the vector, instead of the map's")
    parser.add_argument("--target-layer", type=int, help="layer of the mapped vector, instead of the map's")
    parser.add_argument("--source-blocks", type=int, help="of the source model, for a file of rows")
    options = parser.parse_args(arguments)
    return exit_status(lambda: apply_mapping(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())

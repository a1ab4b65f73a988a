"""Map a vector from the source to the target model with a fitted map; no model is loaded.

    python apply_mapping.py --mapping results/run/ridge_mapping.pt --vector formal.npy --output
    mapped.safetensors

The vector comes from .gguf, .safetensors, .pt or .npy; of a file with several layers, --layer chooses one.
What is written keeps the map's scale (v @ W, without the intercept, which is for activations and not for
directions).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiment.command_line import refusal
from ridge_mapping import RidgeMapping
from support.errors import InputError
from support.vector_files import FORMATS, read_vectors, write_vectors


def apply_mapping(
    mapping: Path, vector: Path, output: Path, layer: int | None = None, target_layer: int | None = None
) -> Path:
    """Map the vector of a file into another file, whose suffix says its format, and return its path.

    layer: of the source, needed where the file has several. target_layer: what the mapped vector is filed
    under; by default, that of a band's `layers/SOURCE_TARGET/`.
    Raises InputError: a file that holds no map or no vector, another width, a layer that is not said or
    missing.
    """
    form = output.suffix.removeprefix(".")
    if form not in FORMATS:
        raise InputError(f"--output is {output}, expected a file that ends with .{', .'.join(FORMATS)}")
    ridge, found = RidgeMapping.load(mapping), read_vectors(vector)
    of_pair = [int(part) for part in mapping.resolve().parent.name.split("_") if part.isdigit()]
    source_layer, of_target = of_pair if len(of_pair) == 2 else (None, None)
    layer = source_layer if layer is None else layer
    target_layer = of_target if target_layer is None else target_layer
    if layer is None and found.anywhere is None:
        if len(found.by_layer) != 1:
            raise InputError(f"{vector} holds vectors of several layers; choose one with --layer")
        (layer,) = found.by_layer
    if target_layer is None:
        raise InputError(
            "the map does not say which layer of the target it is for; name it with --target-layer"
        )
    n_rows = len(found.rows) if found.rows is not None else 0
    given = found.at(layer or 0, n_rows - 1 if n_rows else 0, ridge.d_source)
    mapped = ridge.transform(given)
    known = {"mapping": str(mapping), "vector": str(vector), "source_layer": layer, "lambda": ridge.lambda_}
    write_vectors(output, form, {target_layer: mapped}, "", known)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mapping", type=Path, required=True, help="ridge_mapping.pt of a run")
    parser.add_argument("--vector", type=Path, required=True, help="of the source model")
    parser.add_argument("--output", type=Path, required=True, help=f"ends with .{', .'.join(FORMATS)}")
    parser.add_argument("--layer", type=int, help="of the source, where the file has several")
    parser.add_argument(
        "--target-layer", type=int, help="of the target, where the mapping's folder does not say"
    )
    options = parser.parse_args(arguments)
    try:
        given = options.mapping, options.vector, options.output, options.layer, options.target_layer
        print(apply_mapping(*given))
    except (InputError, OSError) as error:
        return refusal(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

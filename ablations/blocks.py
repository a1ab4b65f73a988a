"""Steer more and more blocks of the target at once, each time at the dose that leaves text coherent.

Only development prompts are used: for each number of blocks, persona and method a dose is searched for
(see `alpha_search`), and the trait and perplexity of the texts at that dose are what is compared.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from experiment.inputs import BAND_SIZE, Inputs, LayerPair, band_of, pair_by_depth
from experiment.plan import UNSTEERED, doses_fingerprint
from phases.choose_alphas import find_alphas, trait_costs, write_development
from phases.fit_maps import learn_maps
from phases.make_vectors import SteeringVectors, transfer_all
from reporting.figures import block_ablation_figure, save_figure
from reporting.tables import markdown_table
from support.artifacts import fingerprint
from support.errors import InputError
from support.run_folder import RunFolder

logger = logging.getLogger(__name__)

NAME = "ablation_blocks.json"
HEADER = ("persona", "method", "blocks", "alpha", "trait, change", "perplexity ratio")


def ablate_blocks(inputs: Inputs, folder: RunFolder, executor: Any) -> str:
    """Search alphas for 1, 3, 5, 9 and all blocks; returns a headline.

    Writes the maps of all blocks, `ablation_blocks.json` and `figure4.png`.
    Raises InputError: a run that does not measure the independent perplexity, or a model with few blocks.
    """
    if not inputs.config.independent_perplexity:
        raise InputError("--ablate blocks searches alphas by the independent perplexity; leave it on")
    inputs = replace(inputs, config=inputs.config.model_copy(update={"alpha_values": "auto"}))
    bands = nested_bands(*(len(side.extractor.blocks) for side in inputs.sides))
    everything = inputs.at_band(bands[-1])
    pairs = everything.layer_pairs
    maps = dict(zip(pairs, learn_maps(everything, folder, executor), strict=True))
    natives = dict(zip(pairs, everything.native_vectors, strict=True))
    costs = trait_costs(inputs, executor) if inputs.config.alpha_search.bound == "excess" else {}
    points, cache_key = [], []
    for band in bands:
        at_band = inputs.at_band(band)
        content = transfer_all(
            band, [natives[pair] for pair in band], [maps[pair] for pair in band], inputs.config.seed
        )
        steering = SteeringVectors.from_content(content)
        logger.info("%d blocks: %s", len(band), ", ".join(str(target) for _, target in band))
        alphas, _ = find_alphas(at_band, folder, executor, steering, costs)
        unsteered = _unsteered_traits(at_band, folder, executor, steering)
        cache_key.append(doses_fingerprint(at_band))
        for (persona, method), dose in alphas.items():
            trait, before = dose.point.trait_probability, unsteered[persona]
            points.append(
                {
                    "persona": persona,
                    "method": method,
                    "target_layers": [target for _, target in band],
                    "alpha": dose.alpha,
                    "is_coherent": dose.is_coherent,
                    "trait_change": None if None in (trait, before) else trait - before,
                    "perplexity_ratio": dose.point.perplexity_ratio,
                }
            )
    cache_key = fingerprint(cache_key)
    folder.save(NAME, cache_key, {"trait_costs": costs, "points": points})
    save_figure(block_ablation_figure(points), folder.path / "figure4.png", cache_key)
    logger.info("by number of blocks\n\n%s\n", markdown_table(HEADER, list(map(_cells, points)), HEADER[:2]))
    return f"{len(bands)} bands, {folder.path / NAME}"


def nested_bands(n_source: int, n_target: int) -> list[list[LayerPair]]:
    """Return bands of 1, 3, 5 and 9 blocks, evenly spread over those of `band_of`, and one of all blocks."""
    band = band_of(n_source, n_target)
    sizes = sorted({1, 3, 5, min(BAND_SIZE, len(band))})
    bands = [
        [band[round((index + 0.5) * len(band) / size - 0.5)] for index in range(size)]
        for size in sizes
        if size <= len(band)
    ]
    return [*bands, [pair_by_depth(layer, n_source, n_target) for layer in range(n_target)]]


def _unsteered_traits(
    inputs: Inputs, folder: RunFolder, executor: Any, steering: SteeringVectors
) -> dict[str, float | None]:
    """Return persona -> mean trait probability of the unsteered development texts, written by now."""
    (rows,) = write_development(
        inputs,
        folder,
        executor,
        [UNSTEERED],
        steering.vectors,
        steering.medians,
        inputs.config.alpha_search.n_seeds,
    )
    traits = {}
    for name in inputs.config.persona_names:
        classifier = inputs.classifiers.get(name)
        scores = classifier.score([row["output"] for row in rows]) if classifier else []
        present = [score for score in scores if score is not None]
        traits[name] = fmean(present) if present else None
    return traits


def _cells(point: dict[str, Any]) -> tuple[str, ...]:
    change, ratio = point["trait_change"], point["perplexity_ratio"]
    return (
        point["persona"],
        point["method"],
        str(len(point["target_layers"])),
        f"{point['alpha']:.3g}" + ("" if point["is_coherent"] else " (not coherent)"),
        "–" if change is None else f"{change:+.2f}",
        "–" if ratio is None else f"{ratio:.2f}",
    )


def main() -> None:
    """Check that smaller bands lie within larger ones' depths, and that the last has every block."""
    bands: Sequence[list[LayerPair]] = nested_bands(30, 18)
    assert [len(band) for band in bands] == [1, 3, 5, 9, 18]
    assert bands[0][0] in bands[3]
    print(f"block_ablation OK: {len(bands)} bands, the middle block is {bands[0][0][1]}")


if __name__ == "__main__":
    main()

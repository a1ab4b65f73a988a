"""Steer more and more blocks, at the alpha that leaves native text coherent (`--ablate blocks`).

Only development prompts are used: for each number of blocks and persona the native vector's alpha is searched
for (see `analysis.alpha_search`), and the trait and perplexity of every method's texts at that alpha are
compared. Its files stand in `ablation_blocks/`. Controls that are read from another source are left out: they
would need maps of their own at each block.
"""

import logging
from dataclasses import replace
from itertools import product
from typing import Any

from analysis.alpha_search import AlphaKey, AlphaPoint
from experiment.plan import SteeringVectors
from experiment.run import Run
from maps.layer_bands import nested_bands
from phases.choose_alphas import find_alphas, measure_at, search_key, trait_costs, unsteered_traits
from phases.fit_maps import fit_maps
from phases.make_vectors import make_vectors, vector_key
from reporting.figures_ablations import block_ablation_figure
from reporting.style import save_figure
from reporting.tables import markdown_table
from support.artifacts import fingerprint
from support.errors import InputError
from support.progress import each

logger = logging.getLogger(__name__)

NAME = "ablation_blocks.json"
HEADER = ("persona", "method", "blocks", "alpha", "trait, change", "perplexity ratio")


def ablate_blocks(run: Run) -> None:
    """Search alphas for 1, 3, 5, 9 and all blocks; writes `ablation_blocks.json` and `figure4.png`.

    Raises InputError: a run that does not measure the independent perplexity, or a model with few blocks.
    """
    if not run.config.independent_perplexity:
        raise InputError("--ablate blocks searches alphas by the independent perplexity; leave it on")
    config = run.config.without_source_controls().model_copy(update={"alpha_values": "auto"})
    inputs = replace(run.inputs, config=config)
    bands = nested_bands(*(side.n_blocks for side in inputs.sides))
    points, keys = [], []
    with run.beside("ablation_blocks", inputs.at_pairs(bands[-1])) as everything:
        maps = dict(zip(everything.inputs.layer_pairs, fit_maps(everything), strict=True))
        for band in each(bands, "bands", "band"):
            name = f"ablation_blocks/{len(band)}"
            with run.beside(name, inputs.at_pairs(band)) as at_band:
                vectors = make_vectors(at_band, [maps[pair] for pair in at_band.inputs.layer_pairs])
                steering = SteeringVectors.from_content(vectors)
                logger.info("%d blocks: %s", len(band), ", ".join(map(str, at_band.inputs.target_layers)))
                cells = list(product(config.persona_names, config.steered_conditions))
                chosen = {name: found.alpha for (name, _), found in find_alphas(at_band, steering).items()}
                measured = measure_at(at_band, steering, {cell: chosen[cell[0]] for cell in cells})
                points += _points(at_band, steering, measured)
                keys.append([search_key(at_band), [vector_key(at_band, *cell) for cell in cells]])
        costs = trait_costs(everything)
    key = fingerprint(keys)
    run.folder.save(NAME, key, {"trait_costs": costs, "points": points})
    save_figure(block_ablation_figure(points), run.folder.path / "figure4.png", key)
    logger.info("by number of blocks\n\n%s\n", markdown_table(HEADER, list(map(_cells, points)), HEADER[:2]))
    logger.info("%d bands, %s", len(bands), run.folder.path / NAME)


def _points(
    run: Run, steering: SteeringVectors, measured: dict[AlphaKey, AlphaPoint]
) -> list[dict[str, Any]]:
    unsteered = unsteered_traits(run, steering)
    points = []
    for (persona, method), found in measured.items():
        trait, before = found.trait_probability, unsteered[persona]
        points.append(
            {
                "persona": persona,
                "method": method,
                "target_layers": run.inputs.target_layers,
                "alpha": found.alpha,
                "is_coherent": found.is_coherent,
                "trait_change": None if None in (trait, before) else trait - before,
                "perplexity_ratio": found.perplexity_ratio,
            }
        )
    return points


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

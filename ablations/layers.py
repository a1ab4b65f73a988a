"""Repeat phases 2 to 5 at several layer pairs, on the development prompts (`--ablate layers`).

Specification, "Figure 2". Each layer pair has a run of its own in `ablation_layers/SOURCE_TARGET/`; the texts
of the map are read once for all of them, and a run that was stopped goes on where it ended. Controls that are
read from another source are left out: they would need maps of their own at each pair.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiment.conditions import MAPPED
from experiment.inputs import Inputs
from experiment.plan import SteeringVectors
from experiment.run import Run
from maps.layer_bands import LayerPair
from phases.choose_alphas import choose_alphas
from phases.decide_verdicts import aggregate_scores, decide
from phases.fit_maps import PAIR_STATISTICS, LearnedMaps, collect_sums, fit_maps, save_sums
from phases.generate_texts import generate_texts
from phases.make_vectors import grid_rows, make_vectors
from phases.score_texts import score_texts
from phases.validate_scorers import validate_scorers
from reporting.figures_ablations import layer_ablation_figure
from reporting.style import save_figure
from support.artifacts import fingerprint
from support.progress import each

logger = logging.getLogger(__name__)

NAME = "ablation_layers.json"
DEPTHS = (0.25, 0.375, 0.5, 0.625, 0.75)  # the specification's layers 8, 12, 16, 20, 24 of 32
COMPARED = ("best_r2", "best_r2_standardised", "best_r2_median_dimension", "retrieval_accuracy")


def ablate_layers(run: Run) -> None:
    """Run phases 2 to 5 at each layer pair; writes `ablation_layers.json` and `figure2.png`."""
    runs = {pair: _inputs_at(run.inputs, pair) for pair in layer_pairs(run.inputs)}
    _collect_missing(run, runs)
    results, keys = [], []
    for pair, inputs in each(runs.items(), "layer pairs", "pair"):
        logger.info("layer pair %d -> %d", *pair)
        with run.beside(_folder(pair), inputs) as at_pair:
            numbers, key = _run_phases(at_pair)
        keys.append(key)
        results.append({"source_layer": pair[0], "target_layer": pair[1], **numbers})
    key = fingerprint(keys)
    run.folder.save(NAME, key, {"layer_pairs": results})
    save_figure(layer_ablation_figure(results), run.folder.path / "figure2.png", key)
    logger.info("%d layer pairs, %s", len(runs), run.folder.path / NAME)


def layer_pairs(inputs: Inputs) -> list[LayerPair]:
    """Return the pairs to compare: those configured, or five depths and the run's own middle pair."""
    configured = inputs.config.ablation_layer_pairs
    if configured is not None:
        inputs.at_pairs(configured)  # raises InputError for a layer that a model lacks
        return list(dict.fromkeys(configured))
    n_source, n_target = (side.n_blocks for side in inputs.sides)
    spread = [(int(depth * n_source), int(depth * n_target)) for depth in DEPTHS]
    return sorted({*spread, inputs.middle_pair}, key=lambda pair: (pair[1], pair[0]))


def _folder(pair: LayerPair) -> str:
    return "ablation_layers/{}_{}".format(*pair)


def _inputs_at(inputs: Inputs, pair: LayerPair) -> Inputs:
    """Return the inputs at another layer pair, tested on the development prompts and at one alpha.

    Alpha is the middle one of `alpha_values` (of two, the lower), or searched for each pair; then the texts
    that are scored helped to choose it, and their coherence is within the bound.
    """
    config, prompts = inputs.config.without_source_controls(), inputs.development_prompts
    alphas = config.alpha_values
    if alphas != "auto":
        ordered = {name: sorted(config.alphas_of(name)) for name in config.persona_names}
        alphas = {name: [values[(len(values) - 1) // 2]] for name, values in ordered.items()}
    changed = {
        "layer_idx": None,
        "source_layer_idx": pair[0],
        "target_layer_idx": pair[1],
        "test_prompts": list(prompts),
        "n_test_prompts": len(prompts),
        "alpha_values": alphas,
        "extraction_resamples": 0,
    }
    return replace(inputs.at_pairs([pair]), config=config.model_copy(update=changed), prompts=prompts)


def _collect_missing(run: Run, runs: Mapping[LayerPair, Inputs]) -> None:
    """Read the texts of the map once for every layer pair whose sums no earlier run has left."""
    missing = []
    for pair, inputs in runs.items():
        with run.beside(_folder(pair), inputs) as at_pair:
            if PAIR_STATISTICS.current(at_pair) is None:
                missing.append(pair)
    sums = collect_sums(run, missing) if missing else {}
    for pair in missing:
        with run.beside(_folder(pair), runs[pair]) as at_pair:
            save_sums(at_pair, sums.pop(pair))


def _run_phases(run: Run) -> tuple[dict[str, Any], str]:
    """Run phases 2 to 5; returns the compared numbers, and the key of what they come from."""
    maps = fit_maps(run)
    vectors = make_vectors(run, maps)
    steering = SteeringVectors.from_content(vectors)
    texts = generate_texts(run, grid_rows(run, choose_alphas(run, steering)), steering)
    validation = validate_scorers(run, steering)
    rows = score_texts(run, texts)
    table = aggregate_scores(run, rows)
    verdict = decide(run, rows, steering, validation)
    return _numbers(maps, vectors, table), verdict["fingerprint"]


def _numbers(
    maps: Sequence[LearnedMaps], vectors: Mapping[str, Any], table: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    cosines = {name: entry["cosine_without_massive"][MAPPED] for name, entry in vectors["personas"].items()}
    numbers = {name: maps[0].ridge.cv[name] for name in COMPARED}
    return {**numbers, "cosine_without_massive": cosines, "conditions": list(table)}

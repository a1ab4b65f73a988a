"""Measure what steering costs where nobody asked for the persona: the perplexity of plain text (phase 5).

The target reads neutral passages under each steering that a verdict compares, and unsteered.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from analysis.results_table import perplexity_ratio
from experiment.conditions import vector_names
from experiment.executor import GenerationSettings
from experiment.inputs import N_PLAIN_TEXTS
from experiment.plan import SteeringVectors
from experiment.run import FORMAT_VERSION, Run
from phases.fit_maps import mapping_data_key
from phases.make_vectors import vector_key
from support.artifacts import fingerprint

NAME = "side_effects.json"

ComparedAlphas = Mapping[str, Mapping[str, float | None]]  # persona -> condition -> alpha


def plain_text_ratios(
    run: Run, steering: SteeringVectors, alphas: ComparedAlphas
) -> dict[str, dict[str, float]]:
    """Return persona -> condition -> perplexity ratio of plain text, steered to unsteered; writes it, too.

    alphas: conditions without one are left out. For a control of several draws, the geometric mean over them.
    A vector is added at every token, whatever `steer_positions` says.
    """
    key = _key(run, alphas)
    content = run.folder.current(NAME, key) or run.folder.save(NAME, key, _measure(run, steering, alphas))
    return content["personas"]


def _key(run: Run, alphas: ComparedAlphas) -> str:
    config, target = run.config, run.inputs.target.fingerprint
    cells = [
        [persona, condition, alpha, vector_key(run, persona, condition)]
        for persona, of_persona in alphas.items()
        for condition, alpha in of_persona.items()
        if alpha is not None
    ]
    unit = [config.alpha_unit, mapping_data_key(run)]
    return fingerprint(FORMAT_VERSION, target, cells, _texts(run), unit)


def _texts(run: Run) -> list[str]:
    return [item.text for item in run.inputs.neutral_texts[:N_PLAIN_TEXTS]]


def _measure(run: Run, steering: SteeringVectors, alphas: ComparedAlphas) -> dict[str, Any]:
    texts, size = _texts(run), run.config.evaluation_batch_size
    settings = replace(GenerationSettings.of(run.inputs, steering.medians), steer_positions="all")
    cells = [
        (persona, condition, alpha, steering.vectors[persona][name])
        for persona, of_persona in alphas.items()
        for condition, alpha in of_persona.items()
        if alpha is not None
        for name in vector_names(condition)
    ]
    some = next(iter(next(iter(steering.vectors.values())).values()))
    chunks = [(texts, torch.zeros_like(some), 0.0, settings, size)]
    chunks += [(texts, vectors, alpha, settings, size) for _, _, alpha, vectors in cells]
    with closing(run.executor.run("plain_perplexities", chunks)) as results:
        found = dict(results)
    logs: dict[tuple[str, str], list[float]] = {}
    for number, (persona, condition, _, _) in enumerate(cells, 1):
        if (ratio := perplexity_ratio(found[number], found[0])) is not None:
            logs.setdefault((persona, condition), []).append(math.log(ratio))
    ratios: dict[str, dict[str, float]] = {persona: {} for persona in alphas}
    for (persona, condition), values in logs.items():
        ratios[persona][condition] = math.exp(fmean(values))
    return {"n_texts": len(texts), "personas": ratios}

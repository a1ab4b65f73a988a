"""What steering costs where nobody asked for the persona: perplexity of plain text while a vector is added.

The target reads neutral passages under each steering that a verdict compares, and its perplexity is held
against that of reading them unsteered (phase 5).
"""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from experiment.inputs import N_PLAIN_TEXTS, Inputs
from experiment.plan import personas_fingerprint
from phases.make_vectors import SteeringVectors
from support.artifacts import fingerprint
from support.run_folder import RunFolder
from support.vocabulary import vector_names

NAME = "side_effects.json"

Doses = Mapping[str, Mapping[str, float | None]]


def side_effects(
    inputs: Inputs, folder: RunFolder, executor: Any, steering: SteeringVectors, alphas: Doses
) -> dict[str, dict[str, float]]:
    """Return persona -> condition -> perplexity of plain text steered / unsteered, a geometric mean.

    alphas: persona -> condition -> alpha; conditions without one are left out. Where chance makes the vectors,
    the mean over their draws. A vector is added at every token, whatever `steer_positions` says.
    """
    texts = [item.text for item in inputs.neutral_texts[:N_PLAIN_TEXTS]]
    cells = [
        (persona, condition, name, alpha)
        for persona, of_persona in alphas.items()
        for condition, alpha in of_persona.items()
        if alpha is not None
        for name in vector_names(condition)
    ]
    cache_key = fingerprint(personas_fingerprint(inputs), cells, texts, inputs.config.alpha_unit)
    content = folder.current(NAME, cache_key, {"personas": dict})
    if content is not None:
        return content["personas"]
    settings = replace(inputs.writing_settings(steering.medians), steer_positions="all")
    size = inputs.config.evaluation_batch_size
    of_first = steering.vectors[inputs.personas[0].name]
    chunks = [(texts, next(iter(of_first.values())), 0.0, settings, size)]
    chunks += [
        (texts, steering.vectors[persona][name], alpha, settings, size) for persona, _, name, alpha in cells
    ]
    logs: dict[int, float] = {}
    with closing(executor.run("plain_perplexities", chunks)) as results:
        for number, found in results:
            logs[number] = fmean(math.log(value) for value in found if value is not None)
    by_condition: dict[tuple[str, str], list[float]] = {}
    for number, (persona, condition, _, _) in enumerate(cells, 1):
        by_condition.setdefault((persona, condition), []).append(logs[number] - logs[0])
    costs: dict[str, dict[str, float]] = {persona: {} for persona in alphas}
    for (persona, condition), found in by_condition.items():
        costs[persona][condition] = math.exp(fmean(found))
    return folder.save(NAME, cache_key, {"n_texts": len(texts), "personas": costs})["personas"]


def main() -> None:
    """Check on a tiny model that alpha 0 costs nothing and a strong vector does."""
    from activation_extractor import ActivationExtractor
    from experiment.executor import Side, Worker, WritingSettings
    from support.tiny_models import D_MODEL, tiny_model, tiny_tokenizer

    model, tokenizer = tiny_model(), tiny_tokenizer()
    side = Side("target", model, tokenizer, ActivationExtractor(model, tokenizer, 1), "target")
    settings = WritingSettings((1,), 8, 1.0, 50, 1.0, "absolute", (1.0,), "all", batch_size=4)
    read = Worker({"target": side}).plain_perplexities
    vector = torch.ones(1, D_MODEL) / D_MODEL**0.5
    plain, same, strong = (
        read(["The sea is wide."], vector, alpha, settings, 4)[0] for alpha in (0.0, 0.0, 50.0)
    )
    assert plain == same != strong
    print(f"side_effects OK: perplexity {plain:.0f} plain, {strong:.0f} under a strong vector")


if __name__ == "__main__":
    main()

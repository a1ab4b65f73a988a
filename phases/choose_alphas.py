"""Texts on the development prompts, for preflight and for alphas: written in one way, journalled.

What is chosen, is chosen here; test prompts are for phases 4 and 5 alone.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from activation_extractor import ResidualNorm, measure_residual_norm
from analysis.alpha_search import (
    AlphaKey,
    ChosenAlpha,
    CoherenceBound,
    DevelopmentText,
    alphas_content,
    alphas_from_content,
    format_alphas,
    search_alphas,
)
from experiment.inputs import Inputs
from experiment.plan import (
    UNSTEERED,
    Cell,
    Row,
    doses_fingerprint,
    evaluation_rows,
    grid,
    planned_texts,
    vector_fingerprint,
)
from experiment.structures import expected
from phases import check_setup as preflight
from phases.generate_texts import Vectors, evaluate_texts, write_texts
from phases.make_vectors import SteeringVectors
from reporting.figures import alpha_search_figure, draw_once
from steered_generation import SteeredGenerator
from support.artifacts import fingerprint
from support.errors import InputError
from support.run_folder import RunFolder

logger = logging.getLogger(__name__)

N_NORM_TEXTS = 256
AUTO_DEPTHS = (0.25, 0.5, 0.75)


def write_development(
    inputs: Inputs,
    folder: RunFolder,
    executor: Any,
    cells: Sequence[Cell],
    vectors: Vectors,
    residual_norms: Sequence[float],
    n_seeds: int = 1,
) -> list[list[Row]]:
    """Return the rows of each cell with their texts: prompts, seeds within them."""
    seeds = range(inputs.config.seed, inputs.config.seed + n_seeds)
    planned = planned_texts(inputs, cells, inputs.development_prompts, seeds)
    rows, _ = write_texts(inputs, folder, executor, planned, vectors, residual_norms)
    size = len(inputs.development_prompts) * len(seeds)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def run_preflight(inputs: Inputs, folder: RunFolder, executor: Any) -> list[preflight.Check]:
    """Run the checklist: technical checks, and if they pass, whether the experiment's premises hold."""
    by_pair = inputs.native_vectors
    natives = by_pair[len(by_pair) // 2]
    checks = [
        check for side in inputs.sides for check in preflight.check_extraction(side.name, side.extractor)
    ]
    first = next(iter(natives["target"].values())).vector
    target = inputs.target
    generator = SteeredGenerator(target.model, target.tokenizer, block_path=inputs.config.target_block_path)
    checks += preflight.check_steering(generator, target.extractor, first)
    checks += [check for name in natives for check in preflight.check_vectors(name, natives[name])]
    if any(check.technical and check.status == "fail" for check in checks):
        return checks
    oracles = {
        persona.name: torch.stack([of_pair["target"][persona.name].vector for of_pair in by_pair])
        for persona in inputs.personas
    }
    unsteered, steered = _oracle_texts(inputs, folder, executor, oracles)
    scorer = inputs.perplexity_scorer
    shown = [inputs.shown_prompt(scorer.name, prompt) for prompt in inputs.development_prompts]
    checks.append(preflight.check_baseline((scorer.model, scorer.tokenizer), shown, unsteered))
    return [*checks, *preflight.check_oracle(inputs.classifiers, unsteered, steered)]


def _oracle_texts(
    inputs: Inputs, folder: RunFolder, executor: Any, oracles: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, dict[float, list[str]]]]:
    """Return unsteered texts, and persona -> alpha -> texts that the target's own vectors steered.

    oracles: persona -> (blocks, d_target), each row of unit norm.
    """
    norms = tuple(map(measure_residual_norm, inputs.neutral_activations(N_NORM_TEXTS)))
    steering = SteeringVectors({name: {"oracle": rows} for name, rows in oracles.items()}, norms)
    of_norms = steering.medians if inputs.band else norms[0].median
    cells = [UNSTEERED]
    for persona in inputs.personas:
        # The map's norm, alpha's unit later, is not measured yet: these texts are no other phase's.
        cache_key = fingerprint(vector_fingerprint(inputs, persona, "oracle"), "preflight", of_norms)
        alphas = preflight_alphas(inputs, steering.middle_norm, persona.name)
        cells += [Cell("oracle", persona.name, alpha, cache_key) for alpha in alphas]
    by_cell = write_development(inputs, folder, executor, cells, steering.vectors, steering.medians)
    texts = [[row["output"] for row in rows] for rows in by_cell]
    steered: dict[str, dict[float, list[str]]] = {persona.name: {} for persona in inputs.personas}
    for cell, outputs in zip(cells[1:], texts[1:], strict=True):
        steered[cell.persona][cell.alpha] = outputs
    return texts[0], steered


def preflight_alphas(inputs: Inputs, norm: ResidualNorm, persona: str) -> list[float]:
    """Return three of a persona's alphas, or three between the ends of the bracket to be searched."""
    low, high = bracket(inputs, norm)
    return [
        low * (high / low) ** dose if searched else dose
        for dose, searched in preflight_depths(inputs, persona)
    ]


def preflight_depths(inputs: Inputs, persona: str) -> list[tuple[float, bool]]:
    """Return the alphas that a preflight tries, and whether each is a depth of the bracket to be searched."""
    if inputs.config.alpha_values == "auto":
        return [(depth, True) for depth in AUTO_DEPTHS]
    ordered = sorted(inputs.config.alphas_of(persona, "oracle"))
    return [(alpha, False) for alpha in sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})]


def bracket(inputs: Inputs, norm: ResidualNorm) -> tuple[float, float]:
    """Return the weakest and strongest dose to search, in units of alpha, at each block that is steered."""
    unit = 1.0 if inputs.config.alpha_unit == "residual_norm" else norm.median
    unit /= len(inputs.layer_pairs)
    low, high = inputs.config.alpha_search.bracket
    return low * unit, high * unit


def searched_alphas(
    inputs: Inputs, folder: RunFolder, executor: Any, steering: SteeringVectors
) -> dict[str, dict[str, float]]:
    """Return persona -> method -> its dose, searched for unless an earlier run has; drawn, logged."""
    name, cache_key = "alpha_search.json", doses_fingerprint(inputs)
    content = folder.current(name, cache_key, expected(name, inputs))
    if content is None:
        costs = trait_costs(inputs, executor) if inputs.config.alpha_search.bound == "excess" else {}
        alphas, bound = find_alphas(inputs, folder, executor, steering, costs)
        content = folder.save(name, cache_key, alphas_content(alphas, bound, costs))
    alphas = _read_doses(inputs, folder, content)
    if costs := content.get("trait_costs"):
        logger.info(
            "what a trait costs by itself, in perplexity of its labelled texts: %s",
            ", ".join(f"{name} x {cost:.2f}" for name, cost in costs.items()),
        )
    logger.info("alphas\n\n%s\n", format_alphas(alphas))
    draw_once(folder, "alpha_search.png", cache_key, alpha_search_figure, content)
    for (persona, method), dose in alphas.items():
        if not dose.is_coherent:
            folder.notes.append(
                f"{persona} {method}: no dose is coherent, not even the weakest tried, {dose.alpha:g}, "
                "which is the one tested; lower alpha_search.bracket"
            )
        elif dose.at == "highest":
            folder.notes.append(
                f"{persona} {method}: the strongest dose tried, {dose.alpha:g}, is still coherent; "
                "raise alpha_search.bracket"
            )
    return _by_persona(alphas)


def required_alphas(inputs: Inputs, folder: RunFolder) -> dict[str, dict[str, float]]:
    """Return the alphas that phase 4 has found. Raises InputError if they are missing or not whole."""
    name = "alpha_search.json"
    content = folder.required(name, doses_fingerprint(inputs), 4, expected(name, inputs))
    return _by_persona(_read_doses(inputs, folder, content))


def _by_persona(alphas: Mapping[AlphaKey, ChosenAlpha]) -> dict[str, dict[str, float]]:
    """Return the alphas in the form in which a configuration gives them."""
    found: dict[str, dict[str, float]] = {}
    for (persona, method), dose in alphas.items():
        found.setdefault(persona, {})[method] = dose.alpha
    return found


def _read_doses(inputs: Inputs, folder: RunFolder, content: dict[str, Any]) -> dict[AlphaKey, ChosenAlpha]:
    path = folder.path / "alpha_search.json"
    alphas = alphas_from_content(content, str(path))
    for cell in grid(inputs, [None]):
        if cell.method not in ("baseline", "prompted") and (cell.persona, cell.method) not in alphas:
            raise InputError(
                f"{path} has no dose for {cell.persona}, {cell.method}; delete it to search for them again"
            )
    return alphas


def trait_costs(inputs: Inputs, executor: Any) -> dict[str, float]:
    """Return persona -> how many times as perplexing its labelled positive texts are as the negative.

    Geometric means over the texts that have one, by the independent model; a persona without labelled texts
    has no cost here.
    """
    personas = [persona for persona in inputs.personas if persona.labelled_positive]
    sides = [
        texts for persona in personas for texts in (persona.labelled_positive, persona.labelled_negative)
    ]
    size = inputs.config.evaluation_batch_size
    chunks = [({"source": [""] * len(texts)}, list(texts), size) for texts in sides]
    logs: dict[int, float] = {}
    with closing(executor.run("perplexities", chunks)) as results:
        for number, found in results:
            logs[number] = fmean(math.log(value) for value in found["source"] if value is not None)
    return {
        persona.name: math.exp(logs[2 * index] - logs[2 * index + 1])
        for index, persona in enumerate(personas)
    }


def find_alphas(
    inputs: Inputs,
    folder: RunFolder,
    executor: Any,
    steering: SteeringVectors,
    costs: Mapping[str, float],
) -> tuple[dict[AlphaKey, ChosenAlpha], CoherenceBound]:
    """Find the strongest coherent alpha of every persona and method, and return the bound that was kept.

    costs: persona -> what its trait costs by itself.
    """
    config = inputs.config
    origins = {(cell.persona, cell.method): cell.origin for cell in grid(inputs, [None])}

    def texts_of(cells: Sequence[Cell]) -> list[list[DevelopmentText]]:
        by_cell = write_development(
            inputs, folder, executor, cells, steering.vectors, steering.medians, config.alpha_search.n_seeds
        )
        # The unsteered text is scored for its fluency alone, so for any persona.
        written = [
            {**row, "persona": row["persona"] or config.persona_names[0]} for rows in by_cell for row in rows
        ]
        planned = evaluation_rows(inputs, written)
        rows, _ = evaluate_texts(inputs, folder, executor, planned)
        texts, size = [_development_text(row) for row in rows], len(by_cell[0])
        return [texts[start : start + size] for start in range(0, len(texts), size)]

    def measure(asked: list[tuple[AlphaKey, float]]) -> list[list[DevelopmentText]]:
        return texts_of([Cell(method, name, alpha, origins[name, method]) for (name, method), alpha in asked])

    (unsteered,) = texts_of([UNSTEERED])
    bound = CoherenceBound(
        config.alpha_search.max_perplexity_ratio, config.alpha_search.max_repetition_increase
    )
    keys = [(name, method) for name in config.persona_names for method in config.steering_methods]
    n_evaluations = config.alpha_search.n_evaluations
    ends = bracket(inputs, steering.middle_norm)
    return search_alphas(keys, measure, unsteered, ends, bound, n_evaluations, costs), bound


def _development_text(row: Row) -> DevelopmentText:
    perplexity = row["independent_perplexity"]
    if perplexity is None and row["output"].strip():
        perplexity = math.inf  # JSON holds no such number
    return DevelopmentText(perplexity, row["repetition"], row["trait_probability"])

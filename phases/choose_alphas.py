"""Choose each persona's steering strength on development prompts (phase 4).

It is the strongest at which the native vector leaves text that can be read, from a search or a list, and
every condition is compared at it: nothing is chosen by what the mapped vector does. Test prompts are for the
texts that are compared alone. What was chosen, here and before, is written down before the first of them is
answered.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from activation_extractor import ResidualNorm
from analysis.alpha_search import (
    AlphaKey,
    AlphaPoint,
    ChosenAlpha,
    CoherenceBound,
    ScoredText,
    alphas_content,
    alphas_from_content,
    choose_listed,
    compare,
    search_alphas,
)
from analysis.results_table import perplexity_ratio
from analysis.verdict import VERDICT_BOUNDS
from experiment.conditions import ORACLE
from experiment.config import ExperimentConfig
from experiment.plan import UNSTEERED_CELL, Alphas, Cell, SteeringVectors, choices, sampling
from experiment.run import FORMAT_VERSION, Artifact, Run
from phases.fit_maps import CV_RESULTS, mapping_data_key
from phases.generate_texts import generate_development
from phases.make_vectors import NATIVE_VECTORS, native_vectors, vector_key
from phases.score_texts import evaluation_rows, perplexity_key, score_rows, scorers_key
from reporting.figures_results import alpha_search_figure
from reporting.style import draw_once
from reporting.tables import alpha_notes, format_alphas
from support.artifacts import fingerprint

logger = logging.getLogger(__name__)

SCORERS = ("classifier",)  # the trait is reported beside a search and never used to choose


def _costs_key(run: Run) -> str:
    labelled = [[each.name, each.labelled_positive, each.labelled_negative] for each in run.inputs.personas]
    return fingerprint(perplexity_key(run), labelled)


def search_key(run: Run) -> str:
    """Return what the chosen alphas depend on."""
    config, inputs = run.config, run.inputs
    cells = [[name, ORACLE, vector_key(run, name, ORACLE)] for name in config.persona_names]
    sides = dict.fromkeys(("target", *inputs.perplexity_sides))
    shown = [
        [inputs.prompting.prompt(side, prompt) for side in sides] for prompt in inputs.development_prompts
    ]
    generated = [inputs.target.fingerprint, sampling(inputs), config.steer_positions, config.seed, shown]
    # The bracket is in units of the norm that is measured on the map's texts, whatever the unit of alpha.
    unit = [mapping_data_key(run), config.alpha_unit]
    tried = [config.alpha_values, config.alpha_search.model_dump()]
    scored = [_costs_key(run), scorers_key(run, SCORERS)]
    return fingerprint(FORMAT_VERSION, cells, generated, unit, tried, scored)


def _protocol_key(run: Run) -> str:
    numbers = [CV_RESULTS.key(run), NATIVE_VECTORS.key(run), search_key(run)]
    return fingerprint(FORMAT_VERSION, choices(run.inputs), VERDICT_BOUNDS, numbers)


FIGURE = "alpha_search.png"
TRAIT_COSTS = Artifact("trait_costs.json", 4, _costs_key)
ALPHA_SEARCH = Artifact("alpha_search.json", 4, search_key)
PROTOCOL = Artifact("protocol.json", 4, _protocol_key)


def choose_alphas(run: Run, steering: SteeringVectors) -> Alphas:
    """Return the alphas of the grid: those configured, or by a search one for each persona.

    Of those configured, one is chosen in the same way, at which the verdict compares.
    """
    content = ALPHA_SEARCH.current_or_make(run, lambda run: _search(run, steering))
    chosen = alphas_from_content(content)
    if costs := content["trait_costs"]:
        logger.info(
            "what a trait costs by itself, as the perplexity ratio of its labelled texts: %s",
            ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items()),
        )
    logger.info("alphas\n\n%s\n", format_alphas(chosen))
    draw_once(run.folder, FIGURE, content["fingerprint"], alpha_search_figure, content)
    run.folder.notes += alpha_notes(chosen)
    return required_alphas(run)


def write_protocol(run: Run) -> None:
    """Write `protocol.json`: what was chosen, from which alternatives and by which numbers."""
    PROTOCOL.current_or_make(run, _choices)


def _choices(run: Run) -> dict[str, Any]:
    maps = []
    for pair in run.inputs.layer_pairs:
        with run.at_pair(pair) as at_pair:
            cv = CV_RESULTS.require(at_pair)
        maps.append({"layers": pair, **{name: cv[name] for name in ("best_lambda", "lambda_unit", "r2")}})
    cosines = {
        side: {name: [each.split_half_cosine for each in vectors] for name, vectors in by_persona.items()}
        for side, by_persona in native_vectors(run).items()
    }
    alphas = {name: ALPHA_SEARCH.require(run)[name] for name in ("bound", "trait_costs", "alphas")}
    return {
        **choices(run.inputs),
        "maps": maps,
        "split_half_cosines": cosines,
        "alpha": {"given": run.config.alpha_values, **alphas},
        "verdict_bounds": VERDICT_BOUNDS,
    }


def required_alphas(run: Run) -> Alphas:
    """Return the same. Raises InputError where alphas are searched and the search is not there."""
    if run.config.alpha_values != "auto":
        return run.config.alpha_values
    return {persona: [alpha] for persona, alpha in compared_alphas(run).items()}


def compared_alphas(run: Run) -> dict[str, float]:
    """Return persona -> the alpha at which the verdict compares. Raises InputError: it is not chosen yet."""
    found = alphas_from_content(ALPHA_SEARCH.require(run))
    return {persona: chosen.alpha for (persona, _), chosen in found.items()}


def unreadable_personas(run: Run) -> dict[str, str]:
    """Return persona -> the bounds that its native vector breaks even at the weakest alpha of the search.

    Empty where alphas are given.
    """
    if run.config.alpha_values != "auto":
        return {}
    found = alphas_from_content(ALPHA_SEARCH.require(run))
    return {name: alpha.point.reason for (name, _), alpha in found.items() if not alpha.is_coherent}


def alpha_bracket(run: Run, norm: ResidualNorm) -> tuple[float, float]:
    """Return the weakest and strongest alpha to search, in units of alpha, at each block that is steered."""
    unit = 1.0 if run.config.alpha_unit == "residual_norm" else norm.median
    unit /= len(run.inputs.layer_pairs)
    low, high = run.config.alpha_search.bracket
    return low * unit, high * unit


def _bound(run: Run) -> CoherenceBound:
    settings = run.config.alpha_search
    return CoherenceBound(
        settings.max_perplexity_ratio, settings.max_repetition_increase, settings.max_non_words_increase
    )


def trait_costs(run: Run) -> dict[str, float]:
    """Return persona -> perplexity ratio of its labelled positive to its negative texts.

    By the independent model; empty where there is none or the bound is `plain`.
    """
    if run.config.alpha_search.bound == "plain" or not run.config.independent_perplexity:
        return {}
    return TRAIT_COSTS.current_or_make(run, _measure_costs)["personas"]


def _measure_costs(run: Run) -> dict[str, Any]:
    personas = [persona for persona in run.inputs.personas if persona.labelled_positive]
    sides = [texts for each in personas for texts in (each.labelled_positive, each.labelled_negative)]
    size, dtype = run.config.evaluation_batch_size, run.inputs.evaluation_dtype
    chunks = [({"source": [""] * len(texts)}, list(texts), size, dtype) for texts in sides]
    with closing(run.executor.run("perplexities", chunks)) as results:
        found = {number: by_side["source"] for number, by_side in results}
    costs = {}
    for number, persona in enumerate(personas):
        positive, negative = found[2 * number], found[2 * number + 1]
        n = min(len(positive), len(negative))  # labelled texts come in pairs; what is over has no partner
        if (ratio := perplexity_ratio(positive[:n], negative[:n])) is not None:
            costs[persona.name] = ratio
    return {"personas": costs}


def find_alphas(run: Run, steering: SteeringVectors) -> dict[AlphaKey, ChosenAlpha]:
    """Return the strongest alpha that leaves native texts coherent, for each persona: listed or searched."""
    config, settings = run.config, run.config.alpha_search
    keys = [(name, ORACLE) for name in config.persona_names]
    measure = partial(_development_texts, run, steering)
    bounds = _bound(run), trait_costs(run)
    if config.alpha_values != "auto":
        listed = {key: config.alphas_of(key[0]) for key in keys}
        return choose_listed(listed, measure, _unsteered(run, steering), *bounds)
    bracket = alpha_bracket(run, steering.middle_norm)
    return search_alphas(
        keys, measure, _unsteered(run, steering), bracket, bounds[0], settings.n_evaluations, bounds[1]
    )


def measure_at(
    run: Run, steering: SteeringVectors, alphas: Mapping[AlphaKey, float]
) -> dict[AlphaKey, AlphaPoint]:
    """Return what an alpha does to the development texts of each persona and method; draws are rotated."""
    bound, costs, unsteered = _bound(run), trait_costs(run), _unsteered(run, steering)
    measured = zip(alphas.items(), _development_texts(run, steering, list(alphas.items())), strict=True)
    return {
        (name, method): compare(alpha, texts, unsteered, bound.of_trait(costs.get(name, 1.0)))
        for ((name, method), alpha), texts in measured
    }


def _unsteered(run: Run, steering: SteeringVectors) -> list[ScoredText]:
    return _scored(run, steering, [UNSTEERED_CELL])[0]


def _development_texts(
    run: Run, steering: SteeringVectors, asked: Sequence[tuple[AlphaKey, float]]
) -> list[list[ScoredText]]:
    """Return the scored development texts of each persona and method at an alpha."""
    return _scored(
        run,
        steering,
        [Cell(method, name, alpha, vector_key(run, name, method)) for (name, method), alpha in asked],
    )


def _scored(run: Run, steering: SteeringVectors, cells: Sequence[Cell]) -> list[list[ScoredText]]:
    by_cell = generate_development(run, cells, steering, run.config.alpha_search.n_seeds)
    # The unsteered text is scored for its fluency alone, so any persona will do.
    first = run.config.persona_names[0]
    generated = [{**row, "persona": row["persona"] or first} for rows in by_cell for row in rows]
    rows, _ = score_rows(run, evaluation_rows(run, generated, SCORERS), SCORERS)
    texts, size = list(map(ScoredText.from_row, rows)), len(by_cell[0])
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def n_tried_alphas(config: ExperimentConfig, persona: str) -> int:
    """Return at how many alphas a persona's native vector is tried."""
    is_searched = config.alpha_values == "auto"
    return config.alpha_search.n_evaluations if is_searched else len(config.alphas_of(persona))


def _search(run: Run, steering: SteeringVectors) -> dict[str, Any]:
    return alphas_content(find_alphas(run, steering), _bound(run), trait_costs(run))

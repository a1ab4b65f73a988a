"""Choose on development prompts each persona's kind of vector (phase 1) and steering strength (phase 4).

What vectors are made from, where the configuration leaves it open, is chosen by what the native vector does
and by how near lexical controls come to it. The strength is the strongest at which the native vector leaves
text that can be read, from a search or a list, and every condition is compared at it. Nothing is chosen by
what the mapped vector does, nor on a test prompt; what was chosen is written down before the first of these
is answered.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
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
from analysis.extraction_choice import KindNumbers, choose_kind
from analysis.results_table import perplexity_ratio
from analysis.verdict import VERDICT_BOUNDS
from experiment.conditions import LEXICAL_CONTROLS, ORACLE
from experiment.config import ASKED_KINDS, VECTOR_KINDS, ExperimentConfig
from experiment.models import SIDES
from experiment.plan import UNSTEERED_CELL, Alphas, Cell, SteeringVectors, choices, sampling
from experiment.run import FORMAT_VERSION, Artifact, Run
from phases.collect_responses import collect_responses
from phases.fit_maps import (
    CV_RESULTS,
    LearnedMaps,
    fit_maps,
    map_runs,
    mapping_data_key,
    with_prompt_maps,
)
from phases.generate_texts import generate_development
from phases.make_vectors import (
    NATIVE_VECTORS,
    check_readable,
    make_vectors,
    native_vectors,
    vector_key,
    vectors_key,
)
from phases.score_texts import evaluation_rows, perplexity_key, score_rows, scorers_key
from reporting.tables import alpha_notes, format_alphas, format_kinds
from support.artifacts import fingerprint
from support.errors import InputError
from support.vocabulary import PROMPT_MAPS
from texts.personas import Persona

logger = logging.getLogger(__name__)

N_COST_PAIRS = 40
SCORERS = ("classifier",)  # the trait is reported beside a search and never used to choose


def _costs_key(run: Run) -> str:
    of_perplexity = perplexity_key(run, _fluency_sides(run))
    return fingerprint(of_perplexity, [[each.name, *_cost_texts(each)] for each in run.inputs.personas])


def _fluency_sides(run: Run) -> tuple[str, ...]:
    """Return whose perplexity bounds a search: the independent model's alone, to spare time."""
    return run.inputs.perplexity_sides[-1:]


def _cost_texts(persona: Persona) -> tuple[Sequence[str], Sequence[str]]:
    """Return the labelled texts on which the cost of a trait is measured: the first pairs, to spare time."""
    return persona.labelled_positive[:N_COST_PAIRS], persona.labelled_negative[:N_COST_PAIRS]


def search_key(run: Run) -> str:
    """Return what the chosen alphas depend on."""
    config, inputs = run.config, run.inputs
    cells = [[name, ORACLE, vector_key(run, name, ORACLE)] for name in config.persona_names]
    sides = dict.fromkeys(("target", *_fluency_sides(run)))
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
    numbers = [*map(CV_RESULTS.key, map_runs(run)), NATIVE_VECTORS.key(run), search_key(run)]
    if run.config.open_kinds:
        numbers.append(_kinds_key(run))
    return fingerprint(FORMAT_VERSION, choices(run.inputs), VERDICT_BOUNDS, numbers)


def _with_kinds(run: Run, kinds: Mapping[str, str]) -> Run:
    return run.with_inputs(replace(run.inputs, config=run.config.with_vector_kinds(kinds)))


def _kinds_key(run: Run) -> str:
    kinds = [_with_kinds(run, dict.fromkeys(run.config.persona_names, kind)) for kind in VECTOR_KINDS]
    searched = [[vectors_key(each), search_key(each)] for each in kinds]
    named = run.config.extraction.by_persona
    return fingerprint(searched, run.config.conditions, named)


EXTRACTION_CHOICE = Artifact("extraction_choice.json", 1, _kinds_key)
TRAIT_COSTS = Artifact("trait_costs.json", 4, _costs_key)
ALPHA_SEARCH = Artifact("alpha_search.json", 4, search_key)
PROTOCOL = Artifact("protocol.json", 4, _protocol_key)


def choose_extraction(run: Run, may_choose: bool) -> Run:
    """Return the run with what each persona's vectors are made from, where the configuration says `auto`.

    may_choose: else the choice of an earlier run is required. Raises InputError where it is not there.
    """
    if run.config.has_chosen_kinds:
        return run
    choice = EXTRACTION_CHOICE
    content = choice.current_or_make(run, _choose_kinds) if may_choose else choice.require(run)
    for name, kinds in content["personas"].items():
        logger.info("vectors of %s: %s\n\n%s\n", name, content["chosen"][name], format_kinds(kinds))
    return _with_kinds(run, content["chosen"])


def _choose_kinds(run: Run) -> dict[str, Any]:
    """Return `chosen`, persona -> kind, and `personas`: persona -> kind -> its numbers."""
    run = collect_responses(run)
    maps = fit_maps(run)
    open_kinds = {persona.name: _available(run, persona) for persona in run.inputs.personas}
    found: dict[str, dict[str, KindNumbers]] = {name: {} for name in open_kinds}
    for kind in VECTOR_KINDS:
        if names := [name for name, kinds in open_kinds.items() if kind in kinds]:
            for name, numbers in _measure_kind(run, maps, kind, names).items():
                found[name][kind] = numbers
    return {
        "chosen": {
            name: choose_kind(kinds) if kinds else run.config.vector_kind(name)
            for name, kinds in found.items()
        },
        "personas": {
            name: {kind: asdict(each) for kind, each in kinds.items()} for name, kinds in found.items()
        },
    }


def _available(run: Run, persona: Persona) -> list[str]:
    """Return the kinds of which a persona has the texts; none where its kind is named or a vector given."""
    inputs, fewest = run.inputs, 2 if run.config.halves_texts else 1
    is_given = any((side, persona.name) in inputs.given for side in SIDES)
    if is_given or persona.name not in run.config.open_kinds:
        return []
    has_texts = min(len(persona.positive_texts), len(persona.negative_texts)) >= fewest
    kinds = ["mean", "last"] if has_texts else []
    if persona.instructions and len(persona.questions) >= fewest and inputs.config.layer_idx != "auto":
        can_ask = {"responses": inputs.prompting.chat_sides, "prompt": inputs.neutral_prompts}
        kinds += [kind for kind in ASKED_KINDS if can_ask[kind] and _is_readable(run, persona, kind)]
    return kinds


def _is_readable(run: Run, persona: Persona, kind: str) -> bool:
    """Tell whether responses, or prompts that a context holds, are left on both sides; it is noted if not."""
    at_kind = _with_kinds(run, {persona.name: kind})
    try:
        check_readable(collect_responses(at_kind) if kind == "responses" else at_kind, persona)
    except InputError as error:
        run.folder.notes.append(f"{persona.name}: no vector of kind {kind} was tried: {error}")
        return False
    return True


def _measure_kind(
    run: Run, maps: Sequence[LearnedMaps], kind: str, names: Sequence[str]
) -> dict[str, KindNumbers]:
    """Return persona -> the numbers of one kind, of its native vector and lexical controls alone."""
    at_kind = collect_responses(_with_kinds(run, dict.fromkeys(names, kind)))
    maps = with_prompt_maps(at_kind, maps)
    with run.beside(f"extraction/{kind}", at_kind.inputs) as beside:
        vectors = make_vectors(beside, maps)
    steering = SteeringVectors.from_content(vectors)
    alphas = find_alphas(at_kind, steering)
    before = unsteered_traits(at_kind, steering)
    found = {}
    for name in names:
        chosen = alphas[name, ORACLE]
        trait = chosen.point.trait_probability
        cosines = [report[name]["cosine_to_oracle"] for report in vectors["by_layer"]]
        lexical = [control for control in LEXICAL_CONTROLS if control in run.config.conditions]
        found[name] = KindNumbers(
            chosen.alpha,
            chosen.is_coherent,
            chosen.point.perplexity_ratio,
            None if None in (trait, before[name]) else trait - before[name],
            {control: fmean(each[control] for each in cosines) for control in lexical},
        )
    return found


def unsteered_traits(run: Run, steering: SteeringVectors) -> dict[str, float | None]:
    """Return persona -> mean trait probability of the unsteered development texts."""
    (rows,) = generate_development(run, [UNSTEERED_CELL], steering, run.config.alpha_search.n_seeds)
    traits = {}
    for name in run.config.persona_names:
        classifier = run.inputs.classifiers.get(name)
        scores = classifier.score([row["output"] for row in rows]) if classifier else []
        present = [score for score in scores if score is not None]
        traits[name] = fmean(present) if present else None
    return traits


def choose_alphas(run: Run, steering: SteeringVectors) -> Alphas:
    """Return the alphas of the grid: those configured, or by a search one for each persona.

    Of those configured, one is chosen in the same way, at which the verdict compares.
    """
    content = ALPHA_SEARCH.current_or_make(run, lambda run: _search(run, steering))
    chosen = alphas_from_content(content)
    if costs := trait_costs(run):
        logger.info(
            "what a trait costs by itself, as the perplexity ratio of its labelled texts: %s",
            ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items()),
        )
    logger.info("alphas\n\n%s\n", format_alphas(chosen))
    run.folder.notes += alpha_notes(chosen)
    return required_alphas(run)


def write_protocol(run: Run) -> None:
    """Write `protocol.json`: what was chosen, from which alternatives and by which numbers."""
    PROTOCOL.current_or_make(run, _choices)


def _choices(run: Run) -> dict[str, Any]:
    of_prompts: list[dict[str, Any]] = []
    if run.config.reads_prompts:
        with run.beside(PROMPT_MAPS, run.inputs.for_kind("prompt")) as beside:
            of_prompts = _map_numbers(beside)
    cosines = {
        side: {name: [each.split_half_cosine for each in vectors] for name, vectors in by_persona.items()}
        for side, by_persona in native_vectors(run).items()
    }
    alphas = {name: ALPHA_SEARCH.require(run)[name] for name in ("bound", "trait_costs", "alphas")}
    return {
        **choices(run.inputs),
        "maps": _map_numbers(run),
        "prompt_maps": of_prompts,
        "split_half_cosines": cosines,
        "extraction_numbers": _kind_numbers(run),
        "alpha": {"given": run.config.alpha_values, **alphas},
        "verdict_bounds": VERDICT_BOUNDS,
    }


def _map_numbers(run: Run) -> list[dict[str, Any]]:
    """Return lambda and held-out R2 of every layer pair's map."""
    maps = []
    for pair in run.inputs.layer_pairs:
        with run.at_pair(pair) as at_pair:
            cv = CV_RESULTS.require(at_pair)
        maps.append({"layers": pair, **{name: cv[name] for name in ("best_lambda", "lambda_unit", "r2")}})
    return maps


def _kind_numbers(run: Run) -> dict[str, Any]:
    """Return persona -> kind of vector -> its numbers; empty where nothing was chosen."""
    content = EXTRACTION_CHOICE.load(run) if run.config.open_kinds else None
    return content["personas"] if content else {}


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
    sides = [texts for each in personas for texts in _cost_texts(each)]
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
    config = run.config
    keys = [(name, ORACLE) for name in config.persona_names]
    measure = partial(_development_texts, run, steering)
    bounds = _bound(run), trait_costs(run)
    if config.alpha_values != "auto":
        listed = {key: config.alphas_of(key[0]) for key in keys}
        return choose_listed(listed, measure, _unsteered(run, steering), *bounds)
    bracket = alpha_bracket(run, steering.middle_norm)
    n_evaluations = config.alpha_search.n_evaluations
    return search_alphas(
        keys, measure, _unsteered(run, steering), bracket, bounds[0], n_evaluations, bounds[1]
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
    side = _fluency_sides(run)
    rows, _ = score_rows(run, evaluation_rows(run, generated, SCORERS, side), SCORERS, side)
    texts, size = list(map(ScoredText.from_row, rows)), len(by_cell[0])
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def n_tried_alphas(config: ExperimentConfig, persona: str) -> int:
    """Return at how many alphas a persona's native vector is tried."""
    is_searched = config.alpha_values == "auto"
    return config.alpha_search.n_evaluations if is_searched else len(config.alphas_of(persona))


def _search(run: Run, steering: SteeringVectors) -> dict[str, Any]:
    return alphas_content(find_alphas(run, steering), _bound(run), trait_costs(run))

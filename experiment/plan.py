"""The grid of a run and what everything in it is made from: cells, rows and every fingerprint.

Pure functions of the inputs. A fingerprint holds just what an artifact depends on, so that a change of
the configuration makes anew what it touches and nothing else.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import chain, cycle, islice
from typing import Any

from experiment.config import ExperimentConfig, JudgeConfig, alphas_of_method
from experiment.inputs import Inputs
from scoring.likelihood_ratio import likelihood_ratio_fingerprint
from scoring.trait_classifier import classifier_fingerprint
from support.artifacts import file_sha256, fingerprint
from support.vocabulary import DRAWN, DRAWS
from texts.neutral_text import NeutralText
from texts.personas import Persona, load_prompts

FORMAT_VERSION = 1
EXAMINATION_VERSION = 7  # of what is examined, and how

Alphas = Sequence[float | None] | Mapping[str, list[float] | dict[str, float]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: everything about a text but its prompt and seed.

    method: of transfer, or `baseline` for unsteered text; rows call it their condition.
    origin: fingerprint of what the added vector and its scale are made from.
    """

    method: str
    persona: str | None
    alpha: float | None
    origin: str


UNSTEERED = Cell("baseline", None, None, "unsteered")


def grid(inputs: Inputs, alphas: Alphas) -> list[Cell]:
    """Return the unsteered baseline, once, and every persona asked for in words, and x method x alpha.

    alphas: for every condition, or for those of each persona, or a dose for each, given or found by a search;
        at the oracle's dose, every other condition is tried too.
    """
    cells = [UNSTEERED]
    for persona in inputs.personas:
        if "prompted" in inputs.config.methods:
            cells.append(Cell("prompted", persona.name, None, "unsteered"))
        for method in inputs.config.steering_methods:
            cache_key = vector_fingerprint(inputs, persona, method)
            given = alphas[persona.name] if isinstance(alphas, Mapping) else alphas
            chosen = alphas_of_method(given, method)
            cells += [Cell(method, persona.name, alpha, cache_key) for alpha in chosen]
    return cells


def planned_texts(
    inputs: Inputs, cells: Sequence[Cell], prompts: Sequence[str], seeds: Sequence[int]
) -> list[Row]:
    """Return a row for each text to be written: cells, prompts within them, seeds within these."""
    target, settings = inputs.target.fingerprint, sampling(inputs)
    rows = []
    for cell in cells:
        shown = [inputs.render_prompt("target", prompt, cell.method, cell.persona) for prompt in prompts]
        for index, prompt in enumerate(prompts):
            for seed in seeds:
                cache_key = [target, cell.origin, cell.alpha, shown[index], seed, settings]
                rows.append(
                    {
                        "key": fingerprint(FORMAT_VERSION, cache_key),
                        "condition": cell.method,
                        "persona": cell.persona,
                        "alpha": cell.alpha,
                        "prompt_idx": index,
                        "prompt": prompt,
                        "seed": seed,
                    }
                )
    return rows


def grid_texts(inputs: Inputs, alphas: Alphas) -> list[Row]:
    """Return the rows of phase 4."""
    return planned_texts(inputs, grid(inputs, alphas), inputs.prompts, inputs.config.seeds)


def planned_evaluations(inputs: Inputs, texts: Sequence[Row]) -> list[Row]:
    """Return a row for each text and persona; the unsteered text is scored for every persona."""
    judged = _judged_places(inputs, texts) if inputs.judge else set()
    names = inputs.config.persona_names
    rows = [
        {**text, "persona": name}
        for text in texts
        for name in ([text["persona"]] if text["persona"] else names)
    ]
    if inputs.judge:
        rows = [{**row, "is_judged": (row["prompt_idx"], row["seed"]) in judged} for row in rows]
    return evaluation_rows(inputs, rows, inputs.config.likelihood_ratio)


def _judged_places(inputs: Inputs, texts: Sequence[Row]) -> set[tuple[int, int]]:
    """Return (prompt, seed) of the texts that are judged, the same in every cell, so that it stays paired.

    With `judge.texts_per_cell`, as many prompts as it allows, drawn by the run's seed, before second seeds.
    """
    places = list(dict.fromkeys((text["prompt_idx"], text["seed"]) for text in texts))
    prompts = sorted({prompt for prompt, _ in places})
    random.Random(inputs.config.seed).shuffle(prompts)
    rank = {prompt: number for number, prompt in enumerate(prompts)}
    ordered = sorted(places, key=lambda place: (place[1], rank[place[0]]))
    return set(ordered[: inputs.config.judge.texts_per_cell])


def judge_settings(settings: JudgeConfig) -> list[Any]:
    """Return what a judgement depends on; the default length of an answer is left out, as it always was."""
    if settings.kind == "local":
        return ["local", settings.model]
    long = [settings.max_answer_tokens] if settings.max_answer_tokens != 1 else []
    return [settings.model, settings.base_url, *long]


def evaluation_rows(inputs: Inputs, texts: Sequence[Row], has_ratios: bool = False) -> list[Row]:
    """Return the rows of texts that have a persona, with the keys of their evaluation and perplexities.

    texts: those with a true `is_judged` are shown to the judge too. has_ratios: whether the second scorer is
        asked too.
    """
    described = {persona.name: _described(persona) for persona in inputs.personas}
    classifiers, independent = classifier_fingerprint(inputs.labelled_personas), _independent(inputs)
    more = [inputs.evaluation_dtype] if inputs.evaluation_dtype else []
    if has_ratios:
        more.append(likelihood_ratio_fingerprint(inputs.labelled_personas))
    sides = scoring_sides(inputs)
    # Once each: a template takes its time, and a prompt stands in every cell.
    shown = {
        prompt: [inputs.shown_prompt(side, prompt) for side in sides]
        for prompt in {text["prompt"] for text in texts}
    }
    rows = []
    for text in texts:
        persona, judge, of_persona = text["persona"], None, None
        if text.get("is_judged"):
            judge, of_persona = judge_settings(inputs.config.judge), described[persona]
        scorers = [classifiers, independent, judge, *more]
        cache_key = [text["key"], text["output"], persona, of_persona, scorers]
        key = fingerprint(FORMAT_VERSION, cache_key)
        # Of its perplexities, in a journal of `evaluations_journal_fingerprint`.
        of_text = fingerprint(FORMAT_VERSION, shown[text["prompt"]], text["output"])
        rows.append({**text, "key": key, "perplexity_key": of_text})
    return rows


def scoring_sides(inputs: Inputs) -> list[str]:
    """Return the models that give perplexities."""
    return ["target", "source"] if inputs.config.independent_perplexity else ["target"]


def _described(persona: Persona) -> Any:
    """Return what a judge is told of a persona."""
    return [persona.description, persona.eval_prompt] if persona.eval_prompt else persona.description


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """Of a result file: the keys of its rows, in order."""
    return fingerprint([row["key"] for row in rows])


def other_personas(names: Sequence[str]) -> dict[str, list[str]]:
    """Return persona -> the DRAWS whose mapped vectors are its control: the next ones, if there are others.

    Of fewer others, some more than once.
    """
    others = {name: [*names[index + 1 :], *names[:index]] for index, name in enumerate(names)}
    return {name: list(islice(cycle(found), DRAWS)) for name, found in others.items() if found}


def sampling(inputs: Inputs) -> list[Any]:
    """Return the settings that every written text depends on."""
    config = inputs.config
    settings = [config.max_new_tokens, config.temperature, config.top_k, config.top_p]
    return [*settings, config.steer_positions]


def by_pair(of_pair: Callable[..., str]) -> Callable[..., str]:
    """Return a fingerprint of inputs at a band, given one of inputs at a layer pair."""

    @wraps(of_pair)
    def of_inputs(inputs: Inputs, *arguments: Any) -> str:
        if not inputs.band:
            return of_pair(inputs, *arguments)
        return fingerprint("band", [of_pair(inputs.at_layers(*pair), *arguments) for pair in inputs.band])

    return of_inputs


@by_pair
def read_fingerprint(inputs: Inputs) -> str:
    """Of the activations that the map learns from."""
    sides = inputs.source.fingerprint, inputs.target.fingerprint
    config = inputs.config
    if inputs.neutral_questions:
        settings = [inputs.layers, config.mapping_positions, config.seed]
        return fingerprint(FORMAT_VERSION, *sides, settings, neutral_responses_fingerprint(inputs))
    return _read_fingerprint(
        *sides, inputs.layers, config.mapping_positions, config.seed, inputs.neutral_texts
    )


@lru_cache(maxsize=16)
def _read_fingerprint(
    source: str,
    target: str,
    layers: tuple[int, int],
    positions: str,
    seed: int,
    neutral_texts: tuple[NeutralText, ...],
) -> str:
    texts = [[item.text, item.document] for item in neutral_texts]
    return fingerprint(FORMAT_VERSION, source, target, [layers, positions, seed], texts)


@by_pair
def pairs_fingerprint(inputs: Inputs) -> str:
    """Of `pair_statistics.pt` and `training_data.pt`."""
    return fingerprint(read_fingerprint(inputs), inputs.config.n_folds)


@by_pair
def mapping_fingerprint(inputs: Inputs) -> str:
    """Of the maps and `cv_results.json`."""
    config = inputs.config
    settings = [config.lambda_values, config.lambda_unit, config.lambda_criterion]
    return fingerprint(pairs_fingerprint(inputs), settings)


@by_pair
def personas_fingerprint(inputs: Inputs) -> str:
    """Of `persona_vectors.pt`."""
    texts = [[persona.name, *_extracted(inputs, persona)] for persona in inputs.personas]
    return fingerprint(mapping_fingerprint(inputs), texts, inputs.config.persona_position)


@by_pair
def vector_fingerprint(inputs: Inputs, persona: Persona, method: str) -> str:
    """Of one transferred vector and its unit.

    Only the inputs of that method count: new lambda values touch nothing but ridge_mapped.
    """
    config, (source_layer, target_layer) = inputs.config, inputs.layers
    carried = [persona]
    if method == "other_persona":
        by_name = {each.name: each for each in inputs.personas}
        carried = [by_name[name] for name in other_personas(config.persona_names)[persona.name]]
    texts = [*chain(*(_extracted(inputs, each) for each in carried)), config.persona_position]
    source = [inputs.source.fingerprint, source_layer]
    naive = {
        "zero_pad": source,
        "interpolate": source,
        "random_proj": [*source, config.seed],
        "oracle": [],
        "random_direction": [config.seed],
    }
    texts = [] if method == "random_direction" else texts
    parts = naive[method] if method in naive else [*source, mapping_fingerprint(inputs)]
    parts += [DRAWS] if method in DRAWN else []
    unit = read_fingerprint(inputs) if config.alpha_unit == "residual_norm" else "absolute"
    return fingerprint(method, texts, parts, target_layer, unit)


def preflight_fingerprint(inputs: Inputs) -> str:
    """Of `preflight.json`."""
    alphas = inputs.config.alpha_values
    alphas = [inputs.config.alpha_search.bracket] if alphas == "auto" else alphas
    cells = [[cell.persona, cell.alpha, cell.origin] for cell in grid(inputs, alphas)]
    cache_key = [cells, classifier_fingerprint(inputs.labelled_personas), sampling(inputs)]
    return fingerprint(personas_fingerprint(inputs), *cache_key, inputs.development_prompts)


def doses_fingerprint(inputs: Inputs) -> str:
    """Of `alpha_search.json`."""
    origins = [[cell.persona, cell.method, cell.origin] for cell in grid(inputs, [None])]
    settings = [inputs.config.alpha_search.model_dump(), inputs.config.seed, sampling(inputs)]
    settings += [inputs.development_prompts, read_fingerprint(inputs)]  # the latter is the bracket's unit
    settings += ["bracket of the whole band"] if inputs.band else []
    scorers = [classifier_fingerprint(inputs.labelled_personas), inputs.source.fingerprint]
    return fingerprint(FORMAT_VERSION, inputs.target.fingerprint, origins, settings, scorers)


def _extracted(inputs: Inputs, persona: Persona) -> list[Any]:
    """Return what a persona's vectors are made from: its texts, or what its answers depend on."""
    given = [
        [side.name, file_sha256(inputs.given[side.name, persona.name].path)]
        for side in inputs.sides
        if (side.name, persona.name) in inputs.given
    ]
    if persona.name not in inputs.answering:
        return [persona.positive_texts, persona.negative_texts, *given]
    return [responses_fingerprint(inputs, persona), *given]


def responses_fingerprint(inputs: Inputs, persona: Persona) -> str:
    """Of the answers that a persona's vectors are made from, and of how both models read them."""
    settings, seed = inputs.config.extraction, inputs.config.seed
    asked = [persona.instructions, persona.questions[: settings.n_questions], settings.n_seeds, seed]
    writers = [
        [side, name, inputs.side(name).fingerprint, inputs.shown_question(name, "?", "!")]
        for side, name in inputs.writers.items()
    ]
    read = [inputs.shown_question(side.name, "?") for side in inputs.sides]
    judge = [judge_settings(inputs.config.judge), _described(persona)] if inputs.judge else None
    scorer = classifier_fingerprint(inputs.labelled_personas)
    sampled = _answer_sampling(inputs.config, settings.max_new_tokens)
    return fingerprint(asked, sampled, writers, read, scorer, judge)


def _answer_sampling(config: ExperimentConfig, max_new_tokens: int) -> list[Any]:
    return [max_new_tokens, config.temperature, config.top_k, config.top_p]


def planned_responses(inputs: Inputs, persona: Persona, writer: str) -> list[Row]:
    """Return a row for each answer that a side's model is to give under a persona's system prompts."""
    settings, config = inputs.config.extraction, inputs.config
    sampled = _answer_sampling(config, settings.max_new_tokens)
    rows = []
    for number, pair in enumerate(persona.instructions):
        for is_positive, system_prompt in zip((True, False), pair, strict=True):
            for asked in persona.questions[: settings.n_questions]:
                shown = inputs.shown_question(writer, asked, system_prompt)
                for seed in range(config.seed, config.seed + settings.n_seeds):
                    cache_key = [inputs.side(writer).fingerprint, shown, seed, sampled]
                    rows.append(
                        {
                            "key": fingerprint(FORMAT_VERSION, "answer", cache_key),
                            "persona": persona.name,
                            "is_positive": is_positive,
                            "instruction": number,
                            "system_prompt": system_prompt,
                            "prompt": asked,
                            "alpha": None,
                            "seed": seed,
                        }
                    )
    return rows


def neutral_responses_fingerprint(inputs: Inputs) -> str:
    """Of `neutral_responses.json`, and of how both models read it."""
    config, writer = inputs.config, inputs.default_responder
    sampled = _answer_sampling(config, config.max_new_tokens)
    cache_key = [inputs.side(writer).fingerprint, sampled, config.seed]
    shown = [inputs.shown_question(side.name, "?", config.system_prompt) for side in inputs.sides]
    styles = [inputs.neutral_styles] if inputs.neutral_styles else []
    asked = inputs.neutral_questions, config.n_training_samples
    return fingerprint(FORMAT_VERSION, cache_key, shown, *asked, *styles)


def planned_neutral_responses(inputs: Inputs) -> list[Row]:
    """Return a row for each answer that the map is learnt from: all questions, again with the next seed.

    Styles take turns from question to question, and go on to the next for each seed.
    """
    config, writer = inputs.config, inputs.default_responder
    rows, sampled = [], _answer_sampling(config, config.max_new_tokens)
    styles = inputs.neutral_styles or (None,)
    for number in range(config.n_training_samples):
        turn, index = divmod(number, len(inputs.neutral_questions))
        asked, seed = inputs.neutral_questions[index], config.seed + turn
        system_prompt = inputs.with_instruction(styles[(index + turn) % len(styles)])
        shown = inputs.shown_question(writer, asked, system_prompt)
        cache_key = [inputs.side(writer).fingerprint, shown, seed, sampled]
        rows.append(
            {
                "key": fingerprint(FORMAT_VERSION, "answer", cache_key),
                "system_prompt": system_prompt,
                "prompt": asked,
                "alpha": None,
                "seed": seed,
            }
        )
    return rows


def licences_fingerprint(inputs: Inputs) -> str:
    """Of `scorer_validation.json`."""
    config = inputs.config
    scorers = [classifier_fingerprint(inputs.labelled_personas), config.likelihood_ratio]
    scorers.append(likelihood_ratio_fingerprint(inputs.labelled_personas))
    examined = [[persona.name, persona.validation] for persona in inputs.labelled_personas]
    texts = [load_prompts("ordinary_validation"), inputs.development_prompts, sampling(inputs)]
    if inputs.judge:
        scorers += [judge_settings(config.judge), list(map(_described, inputs.personas))]
    return fingerprint(EXAMINATION_VERSION, inputs.target.fingerprint, scorers, examined, texts, config.seed)


def search_fingerprint(inputs: Inputs) -> str:
    """Of `layer_search.json`; the layers that the inputs have now don't matter."""
    config = inputs.config
    personas = [
        [persona.name, persona.positive_texts, persona.negative_texts] for persona in inputs.labelled_personas
    ]
    return fingerprint(
        FORMAT_VERSION,
        [inputs.source.fingerprint, inputs.target.fingerprint],
        [config.search_source_layers, config.search_target_layers, config.mapping_positions, config.seed],
        [personas, config.persona_names, config.persona_position],
        [[item.text, item.document] for item in inputs.search_texts()],
    )


def texts_journal_fingerprint(inputs: Inputs) -> str:
    """Of `generation_journal.jsonl`, beside the keys of its rows."""
    return fingerprint(FORMAT_VERSION, inputs.target.fingerprint, sampling(inputs))


def evaluations_journal_fingerprint(inputs: Inputs) -> str:
    """Of `evaluation_journal.jsonl`, beside the keys of its rows."""
    in_dtype = [inputs.evaluation_dtype] if inputs.evaluation_dtype else []
    return fingerprint(FORMAT_VERSION, inputs.target.fingerprint, _independent(inputs), *in_dtype)


def _independent(inputs: Inputs) -> Any:
    if not inputs.config.independent_perplexity:
        return None
    # Of a question to the target, how the other model is shown it is part of what it says.
    shown = [inputs.shown_prompt("source", "?")] if inputs.asks_questions else []
    return [inputs.source.fingerprint, *shown] if shown else inputs.source.fingerprint

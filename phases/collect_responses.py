"""Collect responses, for persona vectors and for the map (before phases 1 to 3).

Persona vectors (arXiv 2507.21509): a model responds to the persona's questions under both kinds of system
prompt; responses that show the trait though they should not, or do not though they should, are left out; the
vector is the difference of means over the responses' tokens, read without the system prompt. Each model reads
its own responses; a model that cannot be asked reads the other's, as plain text.

A map may be learnt from responses too, to questions that ask for no trait: they hold the kind of tokens on
which steering acts.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from experiment.executor import GenerationSettings
from experiment.inputs import Inputs
from experiment.plan import Row, sampling
from experiment.run import FORMAT_VERSION, Artifact, Run
from judging.judge_answers import Judgement
from phases.generate_texts import generate_rows
from phases.score_texts import cached_judge, judge_key, judged_description, trait_prompts
from scoring.response_filter import filter_key, show_trait
from support.artifacts import fingerprint
from support.errors import InputError
from texts.neutral_text import NeutralText
from texts.personas import Persona

logger = logging.getLogger(__name__)

TRAIT_THRESHOLD = 0.5  # probability from which a response shows the trait
JUDGE_THRESHOLD = 3.0  # the middle of a judge's scale
MAX_UNJUDGED = 0.05  # share of a persona's responses without a judgement that a vector may do without
LOGGED_CHARACTERS = 90  # of an example in the log


def persona_responses_key(run: Run, persona: Persona, sides: Sequence[str] = ("source", "target")) -> str:
    """Return what the responses behind a persona's vectors depend on, and how `sides` read them."""
    inputs, settings, prompting = run.inputs, run.config.extraction, run.inputs.prompting
    asked = [
        persona.instructions,
        persona.questions[: settings.n_questions],
        settings.n_seeds,
        run.config.seed,
    ]
    responders = [
        [side, name, inputs.side(name).fingerprint, prompting.question(name, "?", "!")]
        for side, name in prompting.responders.items()
        if side in sides
    ]
    read = [prompting.question(side, "?") for side in sides]
    judged = [judge_key(run.config), judged_description(persona)] if inputs.judge else None
    filtered = filter_key(persona) if persona.labelled_positive else judged
    return fingerprint(
        FORMAT_VERSION, asked, sampling(inputs, settings.max_new_tokens), responders, read, filtered
    )


def _extraction_key(run: Run) -> str:
    return fingerprint([persona_responses_key(run, persona) for persona in run.inputs.responding_personas])


def neutral_responses_key(run: Run) -> str:
    """Return what the responses that the map is learnt from depend on, and how both models read them."""
    config, inputs, prompting = run.config, run.inputs, run.inputs.prompting
    responder = inputs.side(prompting.default_responder).fingerprint
    shown = [prompting.question(side.name, "?", config.system_prompt) for side in inputs.sides]
    asked = [inputs.neutral_questions, config.n_training_samples, inputs.neutral_styles, config.seed]
    return fingerprint(FORMAT_VERSION, responder, sampling(inputs), shown, asked)


EXTRACTION_RESPONSES = Artifact("extraction_responses.json", 3, _extraction_key)
NEUTRAL_RESPONSES = Artifact("neutral_responses.json", 2, neutral_responses_key)


def collect_responses(run: Run) -> Run:
    """Return the run with the responses that its map and its persona vectors are made from, if they are.

    Raises InputError: no response of a side is left, or a judge has failed on more than one in twenty.
    """
    if run.inputs.neutral_questions:
        run = _with_neutral_responses(run)
    personas = run.inputs.responding_personas
    if not personas:
        return run
    rows = EXTRACTION_RESPONSES.current_or_make(run, _collect_extraction)["rows"]
    responders = run.inputs.prompting.responders
    kept = {
        (responder, persona.name): _kept(run, persona, responder, rows)
        for responder in dict.fromkeys(responders.values())
        for persona in personas
    }
    by_side = {
        side: {persona.name: kept[responder, persona.name] for persona in personas}
        for side, responder in responders.items()
    }
    return run.with_inputs(replace(run.inputs, responses=by_side))


def response_rows(run: Run, persona: Persona, responder: str) -> list[Row]:
    """Return a row for each response that a side's model is to give under a persona's system prompts."""
    settings, config = run.config.extraction, run.config
    sampled = sampling(run.inputs, settings.max_new_tokens)
    rows = []
    for number, pair in enumerate(persona.instructions):
        for is_positive, system_prompt in zip((True, False), pair, strict=True):
            for asked in persona.questions[: settings.n_questions]:
                for seed in range(config.seed, config.seed + settings.n_seeds):
                    found = {"persona": persona.name, "is_positive": is_positive, "instruction": number}
                    rows.append({**found, **_asked(run, responder, asked, system_prompt, seed, sampled)})
    return rows


def neutral_response_rows(run: Run) -> list[Row]:
    """Return a row for each response that the map is learnt from: all questions, again with the next seed.

    Styles are rotated from question to question, and shifted by one for each seed.
    """
    config, inputs = run.config, run.inputs
    responder, sampled = inputs.prompting.default_responder, sampling(inputs)
    styles = inputs.neutral_styles or (None,)
    rows = []
    for number in range(config.n_training_samples):
        turn, index = divmod(number, len(inputs.neutral_questions))
        system_prompt = inputs.prompting.with_instruction(styles[(index + turn) % len(styles)])
        asked, seed = inputs.neutral_questions[index], config.seed + turn
        rows.append(_asked(run, responder, asked, system_prompt, seed, sampled))
    return rows


def _asked(
    run: Run, responder: str, asked: str, system_prompt: str | None, seed: int, sampled: Sequence[Any]
) -> Row:
    shown = run.inputs.prompting.question(responder, asked, system_prompt)
    key = fingerprint(
        FORMAT_VERSION, "response", run.inputs.side(responder).fingerprint, shown, seed, sampled
    )
    return {"key": key, "system_prompt": system_prompt, "prompt": asked, "alpha": None, "seed": seed}


def respond(run: Run, planned: Sequence[Row], responder: str, max_new_tokens: int) -> list[Row]:
    """Return the planned rows with a side's unsteered responses under their system prompts."""
    inputs = run.inputs
    settings = GenerationSettings.of(inputs, [1.0] * len(inputs.layer_pairs))
    nothing = torch.zeros(0, inputs.side(responder).d_model)

    def show(rows: Sequence[Row]) -> list[str]:
        return [inputs.prompting.question(responder, row["prompt"], row["system_prompt"]) for row in rows]

    settings = settings.unsteered(responder, max_new_tokens)
    return generate_rows(run, f"responses_{responder}", planned, show, settings, lambda row: nothing)[0]


def _with_neutral_responses(run: Run) -> Run:
    """Return the run with the responses that the map is learnt from.

    Both models read them behind their question, without the style that they may have been asked for. An empty
    response is left out, and counted.
    """
    content = NEUTRAL_RESPONSES.current_or_make(run, _collect_neutral)
    responses = _as_texts(run.inputs, content["rows"])
    if n_empty := content["n"] - len(responses):
        run.folder.notes.append(
            f"{n_empty} of {content['n']} neutral responses are empty and left out of the map"
        )
    return run.with_inputs(replace(run.inputs, neutral_responses=responses))


def more_responses(run: Run, n: int) -> tuple[NeutralText, ...]:
    """Return n neutral responses without the empty ones; the first are those of the run's own map."""
    config = run.config.model_copy(update={"n_training_samples": n})
    larger = run.with_inputs(replace(run.inputs, config=config))
    return _as_texts(run.inputs, _collect_neutral(larger)["rows"])


def _as_texts(inputs: Inputs, rows: Sequence[Row]) -> tuple[NeutralText, ...]:
    """Return the responses that are not empty, with what both models read before them."""
    system_prompt, ask = inputs.config.system_prompt, inputs.prompting.question
    shown = {
        asked: tuple(ask(side.name, asked, system_prompt) for side in inputs.sides)
        for asked in inputs.neutral_questions
    }
    return tuple(
        NeutralText(row["output"], row["prompt"], shown[row["prompt"]])
        for row in rows
        if row["output"].strip()
    )


def _collect_neutral(run: Run) -> dict[str, Any]:
    responder = run.inputs.prompting.default_responder
    rows = respond(run, neutral_response_rows(run), responder, run.config.max_new_tokens)
    return {"responder": responder, "n": len(rows), "rows": rows}


def _collect_extraction(run: Run) -> dict[str, Any]:
    responders = dict.fromkeys(run.inputs.prompting.responders.values())
    rows = [
        {"responder": responder, **row}
        for responder in responders
        for persona in run.inputs.responding_personas
        for row in _scored(run, persona, responder)
    ]
    return {"n": len(rows), "rows": rows}


def _scored(run: Run, persona: Persona, responder: str) -> list[Row]:
    """Return a persona's responses with their score, or why a judge gave none, and whether each is kept."""
    planned = response_rows(run, persona, responder)
    rows = respond(run, planned, responder, run.config.extraction.max_new_tokens)
    judgements, threshold = _judged(run, persona, responder, rows)
    scored = [
        {**row, "trait": judged.score, "failure": judged.failure}
        for row, judged in zip(rows, judgements, strict=True)
    ]
    return [{**row, "is_kept": _is_kept(row, threshold)} for row in scored]


def _judged(
    run: Run, persona: Persona, responder: str, rows: Sequence[Row]
) -> tuple[list[Judgement], float | None]:
    """Return a judgement of each response, and the score from which it shows the trait, if any.

    A scorer that judges the result chooses no responses. A judge does where a persona has no labelled texts,
    and this is said at the end of the run.
    """
    if persona.labelled_positive:
        found = show_trait(persona, [row["output"] for row in rows])
        return list(map(Judgement, found)), TRAIT_THRESHOLD
    if judge := cached_judge(run):
        read = ([row[key] for row in rows] for key in ("prompt", "output"))
        judgements = judge.judge(trait_prompts(persona, *read))
        failed = [judged.failure for judged in judgements if judged.failure]
        if len(failed) > MAX_UNJUDGED * len(rows):
            raise InputError(
                f"persona {persona.name!r}: {len(failed)} of {len(rows)} responses of the {responder} model "
                f"lack a judgement (first reason: {failed[0]}); run again to ask for these again"
            )
        run.folder.notes.append(
            f"{persona.name}: the judge that scores its texts has also chosen the responses that its vectors "
            "are made of; give it labelled texts, and they choose instead"
        )
        return judgements, JUDGE_THRESHOLD
    return [Judgement(None)] * len(rows), None


def _is_kept(row: Row, threshold: float | None) -> bool:
    if not row["output"].strip() or (threshold is not None and row["trait"] is None):
        return False
    return threshold is None or (row["trait"] >= threshold) is row["is_positive"]


def _kept(
    run: Run, persona: Persona, responder: str, rows: Sequence[Row]
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Return (question, response) of the kept positive responses, and of the negative ones; logged."""
    of_persona = [row for row in rows if (row["responder"], row["persona"]) == (responder, persona.name)]
    if all(row["trait"] is None and not row["failure"] for row in of_persona):
        run.folder.notes.append(f"{persona.name}: no scorer has read its responses, so that all are kept")
    positive, negative = (
        _kept_side(
            run, persona, responder, [row for row in of_persona if row["is_positive"] is is_positive], name
        )
        for is_positive, name in ((True, "positive"), (False, "negative"))
    )
    return positive, negative


def _kept_side(
    run: Run, persona: Persona, responder: str, asked: Sequence[Row], name: str
) -> tuple[tuple[str, str], ...]:
    kept = [row for row in asked if row["is_kept"]]
    if not kept:
        should = "show" if name == "positive" else "do not show"
        raise InputError(
            f"persona {persona.name!r}: none of the {len(asked)} {name} responses of the {responder} model "
            f"{should} the trait ({EXTRACTION_RESPONSES.name} has them); write other system prompts in "
            "'instruction', raise extraction.n_seeds, or choose 'extraction' of kind 'texts'"
        )
    example = " ".join(kept[0]["output"].split())[:LOGGED_CHARACTERS]
    of_model = f"{name} responses of the {responder} model"
    counted = f"{persona.name}: {len(kept)} of {len(asked)} {of_model} are kept"
    logger.info("%s, such as %r", counted, example)
    if failed := [row["failure"] for row in asked if row["failure"]]:
        run.folder.notes.append(
            f"{persona.name}: {len(failed)} {of_model} lack a judgement and are left out; "
            f"first reason: {failed[0]}"
        )
    if len(kept) * 2 < len(asked):
        run.folder.notes.append(f"{counted}; the others do not respond as their system prompts ask")
    return tuple((row["prompt"], row["output"]) for row in kept)

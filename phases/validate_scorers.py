"""Validate a run's scorers on texts unlike those that they were trained on (phase 5)."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from experiment.conditions import N_DRAWS, vector_names
from experiment.plan import UNSTEERED_CELL, Cell, SteeringVectors, sampling
from experiment.run import FORMAT_VERSION, Artifact, Run
from judging.cached_judge import CachedJudge
from phases.choose_alphas import required_alphas
from phases.generate_texts import generate_development
from phases.make_vectors import grid_cells, vector_key
from phases.score_texts import (
    cached_judge,
    judge_key,
    judged_description,
    judged_trait,
    scorers_key,
    trait_prompts,
)
from reporting.tables import format_validation
from scoring.validation import (
    FEWEST,
    Sets,
    at_most,
    remembered,
    shared_validation_texts,
    texts_of,
    validate,
    validation_sets,
)
from support.artifacts import fingerprint
from texts.personas import Persona, load_prompts, load_validation_kinds

logger = logging.getLogger(__name__)

VALIDATION_VERSION = 9  # of what the validation sets hold, and of the rules
BREVITY = {"is_validated": True, "problems": [], "measure": "length, which needs no validation"}
N_SEEDS = 2  # unsteered texts for each development prompt
JUDGED_A_SIDE = 24  # texts of a set that a judge reads
JUDGE_THRESHOLD = 0.4999  # on its scale as 0 to 1: a 3, "clearly present in parts", is the trait
TOO_STRONG = 3.0  # times the strongest alpha of the grid, where random directions make text degenerate


def _key(run: Run) -> str:
    inputs, config = run.inputs, run.config
    first = config.persona_names[0]
    steered = [_too_strong(run), vector_key(run, first, "random_direction")]
    generated = [inputs.target.fingerprint, sampling(inputs), config.steer_positions, config.seed]
    shown = [inputs.prompting.prompt("target", prompt) for prompt in inputs.development_prompts]
    texts = [[each.name, each.validation] for each in inputs.labelled_personas]
    texts.append(load_validation_kinds())
    judged = [[judged_description(each), each.positive_texts] for each in inputs.personas]
    judged = [judge_key(config), judged] if inputs.judge else None
    scored = [scorers_key(run, inputs.scorer_names), config.persona_names, judged]
    ordinary = load_prompts("ordinary_validation")
    return fingerprint(FORMAT_VERSION, VALIDATION_VERSION, steered, generated, shown, texts, ordinary, scored)


SCORER_VALIDATION = Artifact("scorer_validation.json", 5, _key)


def validate_scorers(run: Run, steering: SteeringVectors) -> dict[str, dict[str, Any]]:
    """Return persona -> scorer -> what its validation found, unless an earlier run has."""
    content = SCORER_VALIDATION.current_or_make(run, lambda run: _validate(run, steering))
    has_brevity = run.inputs.prompting.asks_questions
    found = {
        persona.name: {
            **content["personas"].get(persona.name, {}),
            **({"brevity": BREVITY} if persona.direct_measure == "brevity" and has_brevity else {}),
        }
        for persona in run.inputs.personas
    }
    logger.info("scorers\n\n%s\n", format_validation(found))
    return found


def sets_of(run: Run, persona: Persona, unsteered: Sequence[str] = (), steered: Sequence[str] = ()) -> Sets:
    """Return the sets on which a persona's scorers are validated.

    unsteered, steered: by the target model; without them, the sets that are the same in every run.
    """
    return validation_sets(persona, *shared_validation_texts(persona), unsteered, steered)


def _validate(run: Run, steering: SteeringVectors) -> dict[str, Any]:
    judge, inputs = cached_judge(run), run.inputs
    scorers = inputs.scorers
    has_scorers = judge or any(scorers.values())
    unsteered, steered = _target_texts(run, steering) if has_scorers else ([], [])
    found: dict[str, dict[str, Any]] = {}
    for persona in inputs.personas:
        sets = sets_of(run, persona, unsteered, steered)
        of_persona = found[persona.name] = {}
        for name, by_persona in scorers.items():
            if scorer := by_persona.get(persona.name):
                # Texts that every run reads are scored once on a machine.
                key = inputs.scorer_key(name, persona)
                score = remembered(scorer.score, key, texts_of(sets_of(run, persona)))
                of_persona[name] = validate(score, sets, scorer.threshold)
        if judge:
            of_persona["judge"] = _validate_judge(run, judge, persona, (unsteered, steered))
    return {"personas": found}


def _validate_judge(
    run: Run, judge: CachedJudge, persona: Persona, texts: tuple[Sequence[str], Sequence[str]]
) -> dict[str, Any]:
    """Return what a judge's validation found, and by how much its second judgement of a text differs.

    A judge has learnt from none of a persona's texts, so those of extraction serve where there are too few
    for validation; where these are too few too, the judge is validated on three shipped personas.
    texts: of the target, unsteered and steered at random.
    """
    if len(persona.validation) >= FEWEST:
        return _judged_on(run, judge, persona, texts) | {"validated_on": "validation texts"}
    if len(persona.positive_texts) >= FEWEST:
        own = replace(persona, validation=persona.positive_texts)
        return _judged_on(run, judge, own, texts) | {"validated_on": "the texts of extraction"}
    others = [each for each in run.inputs.labelled_personas if each.name not in run.config.persona_names]
    shipped = others[:N_DRAWS]
    found = {each.name: _judged_on(run, judge, each, texts) for each in shipped}
    problems = [f"{name}: {problem}" for name, each in found.items() for problem in each["problems"]]
    merged = {
        key: {f"{name}, {of}": value for name, each in found.items() for of, value in each[key].items()}
        for key in ("auc", "false_positives")
    }
    return {
        **next(iter(found.values())),
        **merged,
        # Its errors on this persona are not known, so that no rate is corrected for them.
        "sensitivity": None,
        "specificity": None,
        "problems": problems,
        "is_validated": not problems,
        "validated_on": f"the shipped personas {', '.join(found)}",
    }


def _judged_on(
    run: Run, judge: CachedJudge, persona: Persona, texts: tuple[Sequence[str], Sequence[str]]
) -> dict[str, Any]:
    sets = at_most(sets_of(run, persona, *texts), JUDGED_A_SIDE)

    def score(read: Sequence[str]) -> list[float | None]:
        return judged_trait(judge, persona, [""] * len(read), read)

    validated = validate(score, sets, JUDGE_THRESHOLD)
    whole = [text for sides in islice(sets.values(), 1) for side in sides for text in side[:10]]
    return validated | {"repeat_noise": judge.repeat_noise(trait_prompts(persona, [""] * len(whole), whole))}


def _target_texts(run: Run, steering: SteeringVectors) -> tuple[list[str], list[str]]:
    """Return texts on development prompts: unsteered, and steered by random directions far too strong."""
    persona = run.config.persona_names[0]
    key, alpha = vector_key(run, persona, "random_direction"), _too_strong(run)
    cells = [Cell(name, persona, alpha, fingerprint(key, name)) for name in vector_names("random_direction")]
    (unsteered,) = generate_development(run, [UNSTEERED_CELL], steering, N_SEEDS)
    by_cell = generate_development(run, cells, steering)
    return [row["output"] for row in unsteered], [row["output"] for rows in by_cell for row in rows]


def _too_strong(run: Run) -> float:
    """Return an alpha at which random directions make text degenerate."""
    alphas = [cell.alpha for cell in grid_cells(run, required_alphas(run)) if cell.alpha is not None]
    return TOO_STRONG * max(map(abs, alphas), default=1.0)

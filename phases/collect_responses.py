"""Have answers written, for persona vectors and for the map (phases 1 to 3).

The recipe of persona vectors (arXiv 2507.21509): a model answers the persona's questions under both kinds of
system prompt; answers that show the trait though they should not, or do not though they should, are left
out; and the vector is the difference of means over the response's tokens, read without the system prompt.
Each model reads its own answers. One that cannot be asked reads the other's, as plain text.

A map may be learnt from answers too, to questions that ask for no trait: asked as test prompts are, they have
the tokens on which steering acts.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiment.inputs import Inputs
from experiment.plan import (
    Row,
    neutral_responses_fingerprint,
    planned_neutral_responses,
    planned_responses,
    responses_fingerprint,
)
from experiment.structures import expected
from phases.generate_texts import asked_judge, write_responses
from scoring.brevity import brevity
from scoring.gpt_judge import trait_prompt
from scoring.judge_answers import Judgement
from support.artifacts import fingerprint
from support.errors import InputError
from support.run_folder import RunFolder
from texts.neutral_text import NeutralText
from texts.personas import Persona

logger = logging.getLogger(__name__)

ANSWERS, NEUTRAL_ANSWERS = "extraction_responses.json", "neutral_responses.json"
DECIDED = 0.5  # trait probability from which an answer shows it
JUDGED = 3.0  # middle of a judge's scale
MOST_UNJUDGED = 0.05  # share of a persona's answers without a judgement that a vector may go without
SHOWN = 90  # characters of an answer in the log


def with_responses(inputs: Inputs, folder: RunFolder, executor: Any) -> Inputs:
    """Return the inputs with the answers that the map and persona vectors are made from, if they are.

    Raises InputError: no answer of a side is left, or a judge has failed on more than one in twenty.
    """
    inputs = _with_neutral_responses(inputs, folder, executor)
    personas = [persona for persona in inputs.personas if persona.name in inputs.answering]
    if not personas:
        return inputs
    cache_key = all_responses_fingerprint(inputs)
    content = folder.current(ANSWERS, cache_key, expected(ANSWERS, inputs))
    if content is None:
        folder.lock()
        rows = [
            {"writer": writer, **row}
            for writer in dict.fromkeys(inputs.writers.values())
            for persona in personas
            for row in _scored(inputs, folder, executor, persona, writer)
        ]
        content = folder.save(ANSWERS, cache_key, {"n": len(rows), "rows": rows})
    kept = {
        (writer, persona.name): _kept(persona, writer, content["rows"], folder)
        for writer in dict.fromkeys(inputs.writers.values())
        for persona in personas
    }
    by_side = {
        side: {persona.name: kept[writer, persona.name] for persona in personas}
        for side, writer in inputs.writers.items()
    }
    return replace(inputs, answers=by_side)


def all_responses_fingerprint(inputs: Inputs) -> str:
    """Of `extraction_responses.json`."""
    personas = [persona for persona in inputs.personas if persona.name in inputs.answering]
    return fingerprint([responses_fingerprint(inputs, persona) for persona in personas])


def _with_neutral_responses(inputs: Inputs, folder: RunFolder, executor: Any) -> Inputs:
    """Return the inputs with the answers that the map is learnt from; learnt from passages, as they are.

    Both models read them behind their question, without the style that they may have been asked for. An empty
    answer is left out, and counted.
    """
    if not inputs.neutral_questions:
        return inputs
    cache_key, writer = neutral_responses_fingerprint(inputs), inputs.default_responder
    content = folder.current(NEUTRAL_ANSWERS, cache_key, expected(NEUTRAL_ANSWERS, inputs))
    if content is None:
        folder.lock()
        planned = planned_neutral_responses(inputs)
        rows = write_responses(inputs, folder, executor, planned, writer, inputs.config.max_new_tokens)
        content = folder.save(NEUTRAL_ANSWERS, cache_key, {"writer": writer, "n": len(rows), "rows": rows})
    rows = [row for row in content["rows"] if row["output"].strip()]
    if n_empty := content["n"] - len(rows):
        folder.notes.append(f"{n_empty} of {content['n']} neutral answers are empty and left out of the map")
    shown = {
        asked: tuple(
            inputs.shown_question(side.name, asked, inputs.config.system_prompt) for side in inputs.sides
        )
        for asked in inputs.neutral_questions
    }
    answers = tuple(NeutralText(row["output"], row["prompt"], shown[row["prompt"]]) for row in rows)
    return replace(inputs, neutral_responses=answers)


def _scored(inputs: Inputs, folder: RunFolder, executor: Any, persona: Persona, writer: str) -> list[Row]:
    """Return a persona's answers with their score, or why a judge gave none, and whether each is kept."""
    planned, n_tokens = planned_responses(inputs, persona, writer), inputs.config.extraction.max_new_tokens
    rows = write_responses(inputs, folder, executor, planned, writer, n_tokens)
    middle = None
    judgements = [Judgement(None)] * len(rows)
    judge = asked_judge(inputs, folder)
    if judge:
        described = persona.name, persona.description, persona.eval_prompt
        prompts = [trait_prompt(*described, row["prompt"], row["output"]) for row in rows]
        judgements, middle = judge.judge(prompts), JUDGED
        failed = [judged.failure for judged in judgements if judged.failure]
        if len(failed) > MOST_UNJUDGED * len(rows):
            raise InputError(
                f"persona {persona.name!r}: {len(failed)} of {len(rows)} answers of the {writer} model lack "
                f"a judgement (first reason: {failed[0]}); run again to ask for these again"
            )
    elif persona.direct_measure == "brevity":
        texts, have_ended = ([row[key] for row in rows] for key in ("output", "has_ended"))
        negative = [row["output"] for row in rows if not row["is_positive"]]
        judgements, middle = list(map(Judgement, brevity(texts, have_ended, negative))), DECIDED
    elif persona.name in inputs.classifiers:
        scores = inputs.classifiers[persona.name].score([row["output"] for row in rows])
        judgements, middle = list(map(Judgement, scores)), DECIDED
    return [
        {
            **row,
            "trait": judged.score,
            "failure": judged.failure,
            "is_kept": _is_kept(row, judged.score, middle),
        }
        for row, judged in zip(rows, judgements, strict=True)
    ]


def _is_kept(row: Row, score: float | None, middle: float | None) -> bool:
    if not row["output"].strip():
        return False
    if middle is None:
        return True
    return score is not None and (score >= middle if row["is_positive"] else score < middle)


def _kept(
    persona: Persona, writer: str, rows: Sequence[Row], folder: RunFolder
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Return (question, answer) of the positive answers that are kept, and of the negative ones; logged."""
    sides = []
    for is_positive, name in ((True, "positive"), (False, "negative")):
        asked = [
            row
            for row in rows
            if (row["writer"], row["persona"], row["is_positive"]) == (writer, persona.name, is_positive)
        ]
        kept = [row for row in asked if row["is_kept"]]
        if not kept:
            should = "show" if is_positive else "do not show"
            raise InputError(
                f"persona {persona.name!r}: none of the {len(asked)} {name} answers of the {writer} model "
                f"{should} the trait ({ANSWERS} has them); write other system prompts in 'instruction', "
                "raise extraction.n_seeds, or choose 'extraction' of kind 'texts'"
            )
        example = " ".join(kept[0]["output"].split())[:SHOWN]
        counted = f"{persona.name}: {len(kept)} of {len(asked)} {name} answers of the {writer} model are kept"
        logger.info("%s, such as %r", counted, example)
        if failed := [row["failure"] for row in asked if row["failure"]]:
            folder.notes.append(
                f"{persona.name}: {len(failed)} {name} answers of the {writer} model lack a judgement and "
                f"are left out; first reason: {failed[0]}"
            )
        if len(kept) * 2 < len(asked):
            folder.notes.append(f"{counted}; the others do not answer as their system prompts ask")
        sides.append(tuple((row["prompt"], row["output"]) for row in kept))
    of_persona = [row for row in rows if row["persona"] == persona.name]
    if all(row["trait"] is None and not row["failure"] for row in of_persona):
        folder.notes.append(
            f"{persona.name}: no classifier and no judge has looked at its answers, so that all are kept"
        )
    return sides[0], sides[1]


def main() -> None:
    """Check which answers are kept: those that show what their system prompt asks for."""
    positive, negative = ({"output": "Arr!", "is_positive": side} for side in (True, False))
    assert [_is_kept(positive, score, DECIDED) for score in (0.9, 0.1)] == [True, False]
    assert [_is_kept(negative, score, DECIDED) for score in (0.1, None)] == [True, False]
    assert not _is_kept({**positive, "output": " "}, None, None)
    print("answers OK: an answer is kept if it shows what it was asked to show")


if __name__ == "__main__":
    main()

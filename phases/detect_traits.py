"""Test vectors as detectors in the target: a second answer, which neither steers nor scores (phase 3).

The target reads two sets of texts, each once for all blocks and vectors. The labelled texts of a persona are
not those of which its vectors are made; they are read where the vector was, at the mean over tokens, or at
the last token if its kind is `last` or `prompt`. Its own responses under the persona's system prompts for
and against the trait are there where the run collects them, which costs nothing more. They are labelled by
the system prompt, so that no scorer has a say, and read without it at the mean over their tokens, since most
end where the limit cuts them. No vector is tested on a text that it is made from.

Massive dimensions of the target are left out of projections, as of cosines: with them, native vectors of
SmolLM2-135M-Instruct have an AUROC of 0.950, 0.986 and 0.992 over its band (cheerful, concise, formal, mean
over tokens), without them of 0.963, 0.999 and 1.000, and at the last token the same.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from activation_extractor import ReadText
from analysis.detection import FEWEST_TEXTS, detect
from experiment.conditions import STEERED, drawn_name
from experiment.models import SIDES
from experiment.plan import Row, SteeringVectors, rows_key
from experiment.run import FORMAT_VERSION, Artifact, Run
from phases.collect_responses import respond, response_rows
from phases.make_vectors import vector_kind, vectors_key
from reporting.tables import format_detection
from support.artifacts import fingerprint
from support.vocabulary import PERSONA_POSITIONS
from texts.chat import as_words
from texts.personas import Persona, half_of

logger = logging.getLogger(__name__)

MOST_TEXTS = 50  # of a set on a side, to spare time; spread over all that there are
LABELLED, RESPONSES = "labelled", "responses"


@dataclass(frozen=True)
class TextSet:
    """Texts with a persona's trait and without. position: where they are read. why_not: they are not."""

    name: str
    positive: Sequence[ReadText] = ()
    negative: Sequence[ReadText] = ()
    position: str = "mean"
    why_not: str | None = None

    def checked(self) -> "TextSet":
        """Return the set, or why it is not read if a side is too small."""
        fewest = min(len(self.positive), len(self.negative))
        if self.why_not or fewest >= FEWEST_TEXTS:
            return self
        counted = f"{fewest} texts on a side, fewer than {FEWEST_TEXTS}" if fewest else "there are none"
        return TextSet(self.name, why_not=counted)


def _key(run: Run) -> str:
    texts = [[each.name, *labelled_sides(each)] for each in run.inputs.personas]
    asked = [
        _why_no_responses(run, each) or [rows_key(rows) for rows in response_sides(run, each)]
        for each in run.inputs.personas
    ]
    is_asked = any(isinstance(each, list) for each in asked)
    read = run.inputs.prompting.question("target", "?") if is_asked else None
    return fingerprint(FORMAT_VERSION, vectors_key(run), texts, asked, read)


DETECTION = Artifact("detection.json", 3, _key)


def detect_traits(run: Run, vectors: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `detection.json` holds: persona -> set of texts -> what `analysis.detection` found.

    vectors: what `persona_vectors.pt` holds. A set that is not read has `not_measured`, which says why.
    """
    content = DETECTION.current_or_make(run, lambda run: _detect(run, vectors))
    logger.info("vectors as detectors\n\n%s\n", format_detection(content["personas"]))
    return content


def labelled_sides(persona: Persona) -> list[Sequence[str]]:
    """Return the labelled texts that are read: with the trait, and without."""
    return [_spread(texts) for texts in (persona.labelled_positive, persona.labelled_negative)]


def response_sides(run: Run, persona: Persona) -> list[list[Row]]:
    """Return a row for each response that is read, for the trait and against it; empty if there are none."""
    if _why_no_responses(run, persona):
        return []
    rows = response_rows(run, persona, "target")
    if vector_kind(run, persona) == "responses":
        asked = [(row["prompt"], row) for row in rows]
        rows = [row for _, row in half_of(asked, SIDES.index("source"), persona.questions)]
    return [_spread([row for row in rows if row["is_positive"] is sign]) for sign in (True, False)]


def _why_no_responses(run: Run, persona: Persona) -> str | None:
    inputs, config = run.inputs, run.config
    is_responses = vector_kind(run, persona) == "responses"
    is_given = any((side, persona.name) in inputs.given for side in SIDES)
    has_tried = persona.name in config.open_kinds and not is_given and config.layer_idx != "auto"
    if not is_responses and not (has_tried and persona.instructions and persona.questions):
        return "the run collects none"
    if not inputs.prompting.asks_questions:
        return "the target is not asked questions"
    # Of its own, each model reads one half; else the target's are in the source's vectors, too.
    has_unread = config.halves_texts and inputs.prompting.responders["source"] == "source"
    return "its vectors are made from them" if is_responses and not has_unread else None


def _spread(items: Sequence[Any]) -> list[Any]:
    """Return at most MOST_TEXTS of the items, spread over all."""
    n = min(len(items), MOST_TEXTS)
    return [items[index * len(items) // n] for index in range(n)]


def _labelled(run: Run, persona: Persona) -> TextSet:
    tokenizer = run.inputs.target.tokenizer
    sides = [[as_words(tokenizer, text) for text in side] for side in labelled_sides(persona)]
    position = "last" if vector_kind(run, persona) in ("last", "prompt") else "mean"
    return TextSet(LABELLED, *sides, position).checked()


def _responses(run: Run, persona: Persona) -> TextSet:
    if why_not := _why_no_responses(run, persona):
        return TextSet(RESPONSES, why_not=why_not)
    ask, length = run.inputs.prompting.question, run.config.extraction.max_new_tokens
    sides = [
        [
            (ask("target", row["prompt"]), row["output"])
            for row in respond(run, rows, "target", length)
            if row["output"].strip()
        ]
        for rows in response_sides(run, persona)
    ]
    return TextSet(RESPONSES, *sides, "response").checked()


def _detect(run: Run, content: Mapping[str, Any]) -> dict[str, Any]:
    steering = SteeringVectors.from_content(content)
    massive = [norm.massive_dimensions for norm in steering.norms]
    sets = {
        (persona.name, each.name): each
        for persona in run.inputs.personas
        for each in (_labelled(run, persona), _responses(run, persona))
    }
    activations = _read(run, sets)
    personas: dict[str, dict[str, Any]] = {}
    for (persona, name), each in sets.items():
        found: dict[str, Any] = {"not_measured": each.why_not}
        if each.why_not is None:
            vectors = _named(run, persona, steering.vectors[persona])
            found |= {"position": each.position}
            found |= detect(vectors, *activations[persona, name], massive)
        personas.setdefault(persona, {})[name] = found
    return {"layer_pairs": list(map(list, run.inputs.layer_pairs)), "personas": personas}


def _named(run: Run, persona: str, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return compared name -> vectors; another persona that is drawn twice is there once."""
    return {
        drawn_name(condition, draw): vectors[vector]
        for condition in STEERED
        for vector, draw in run.config.draws_of(persona, condition).items()
        if vector in vectors
    }


def _read(run: Run, sets: Mapping[tuple[str, str], TextSet]) -> dict[tuple[str, str], list[Tensor]]:
    """Return the activations of each set's texts with the trait and without, (blocks, n, d_target) each."""
    layers, found = run.inputs.target_layers, {}
    for position in PERSONA_POSITIONS:
        of_position = {
            key: each for key, each in sets.items() if (each.position, each.why_not) == (position, None)
        }
        if not of_position:
            continue
        sides = [side for each in of_position.values() for side in (each.positive, each.negative)]
        texts = [text for side in sides for text in side]
        by_layer = run.inputs.target.extractor.extract_layers(texts, layers, position)
        parts = torch.stack([by_layer[layer] for layer in layers]).split(list(map(len, sides)), dim=1)
        found |= {key: list(parts[2 * k : 2 * k + 2]) for k, key in enumerate(of_position)}
    return found

"""Ask the test questions as conversations, and follow trait and perplexity over their turns (phase 5).

With `n_turns`, the questions are taken in their order, so many to a conversation. Unsteered, native, mapped
and the first draw of other personas' vectors write at the alpha at which the verdict compares, over the
first seed. The prompt of a turn holds the earlier questions with the model's own responses under the same
vector, which is added where `steer_positions` says: at all of these tokens, or with `response` where the
model writes alone, so that earlier responses are read unsteered. The first turn is a text of the grid.
Nothing is decided by any of this.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from analysis.side_effects import by_turn
from analysis.verdict import FEWEST_PROMPTS
from experiment.conditions import CONVERSING, TRAINED_SCORERS, drawn_name
from experiment.executor import GenerationSettings
from experiment.plan import (
    UNSTEERED_CELL,
    Cell,
    Row,
    SteeringVectors,
    drawn_cells,
    rows_key,
    shown_turns,
    text_rows,
    turn_rows,
)
from experiment.run import Run
from phases.generate_texts import generate_rows
from phases.make_vectors import vector_key
from phases.score_texts import perplexity_key, scorers_key
from phases.side_effects import scorer_of, trait_scores
from support.artifacts import fingerprint

logger = logging.getLogger(__name__)

NAME = "turns.json"


def converse(
    run: Run, steering: SteeringVectors, verdicts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return persona -> `scorer`, whether it `is_validated`, `alpha`, and `conditions`; writes it, too.

    conditions: what `by_turn` returns. verdicts: persona -> `Verdict.content()`, whose alpha is taken, and
    whose scorer, but no judge; a persona without one is left out. Empty where questions come one by one.
    """
    if run.config.n_turns == 1:
        return {}
    scorers = {name: scorer_of(found, list(found["scorers"])) for name, found in verdicts.items()}
    scorers = {name: scorer for name, scorer in scorers.items() if scorer}
    run.folder.notes += _notes(run, [name for name in verdicts if name not in scorers])
    if not scorers:
        return {}
    alphas = {name: _alpha(verdicts[name]["alphas"]) for name in scorers}
    cells = conversing_cells(run, alphas)
    key = _key(run, cells, scorers)
    content = run.folder.current(NAME, key)
    if content is None:
        measured = _measure(run, steering, cells, scorers)
        personas = {
            name: {"scorer": scorers[name], "alpha": alphas[name], "conditions": found}
            for name, found in measured.items()
        }
        counts = {"n_turns": run.config.n_turns, "n_conversations": len(run.inputs.conversations)}
        content = run.folder.save(NAME, key, {**counts, "personas": personas})
    return {
        name: {"is_validated": verdicts[name]["scorers"][scorers[name]]["is_validated"], **found}
        for name, found in content["personas"].items()
    }


def conversing_cells(run: Run, alphas: Mapping[str, float]) -> list[Cell]:
    """Return the cells that write conversations: unsteered, and each persona's.

    alphas: persona -> the alpha at which the verdict compares.
    """
    cells = [UNSTEERED_CELL]
    for persona, alpha in alphas.items():
        for name in CONVERSING:
            if name in run.config.conditions:
                key = vector_key(run, persona, name)
                cells += drawn_cells(run.inputs, persona, name, key, [alpha])[:1]
    return cells


def _alpha(alphas: Mapping[str, float | None]) -> float:
    """Return the alpha of all conditions with a vector."""
    return next(alpha for alpha in alphas.values() if alpha is not None)


def _key(run: Run, cells: Sequence[Cell], scorers: Mapping[str, str]) -> str:
    inputs, side = run.inputs, run.inputs.perplexity_sides[-1]
    questions = list(chain.from_iterable(inputs.conversations))
    shown = [inputs.shown_conversations(name) for name in (inputs.target.name, side)]
    # What a later turn holds beside them follows from these texts.
    texts = rows_key(text_rows(inputs, cells, questions, [run.config.seed]))
    trained = scorers_key(run, sorted({name for name in scorers.values() if name in TRAINED_SCORERS}))
    return fingerprint(run.config.n_turns, texts, shown, perplexity_key(run, [side]), dict(scorers), trained)


def _measure(
    run: Run, steering: SteeringVectors, cells: Sequence[Cell], scorers: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return persona -> what `by_turn` returns."""
    texts = _write(run, steering, cells)
    perplexities = _perplexities(run, texts)
    measured = {}
    for persona, scorer in scorers.items():
        traits, of_persona = {}, {}
        for cell, rows, found in zip(cells, texts, perplexities, strict=True):
            if cell.persona in (None, persona):
                name = drawn_name(cell.condition, cell.draw)
                traits[name] = _by_turn(run, trait_scores(run, scorer, persona, rows, texts[0]))
                of_persona[name] = _by_turn(run, found)
        measured[persona] = by_turn(traits, of_persona)
    return measured


def _write(run: Run, steering: SteeringVectors, cells: Sequence[Cell]) -> list[list[Row]]:
    """Return each cell's rows with their texts: conversations, then turns. A turn is one call for all."""
    inputs, n_turns, n = run.inputs, run.config.n_turns, len(run.inputs.conversations)
    settings, show = GenerationSettings.of(inputs, steering.medians), partial(shown_turns, inputs)
    written: list[list[Row]] = [[] for _ in range(len(cells) * n)]
    for turn in range(1, n_turns + 1):
        earlier = [[(row["prompt"], row["output"]) for row in rows] for rows in written]
        planned = turn_rows(inputs, cells, earlier)
        rows, counted = generate_rows(run, "generation", planned, show, settings, steering.added)
        logger.info("turn %d of %d: %s", turn, n_turns, counted)
        written = [[*before, row] for before, row in zip(written, rows, strict=True)]
    return [list(chain.from_iterable(written[start : start + n])) for start in range(0, len(written), n)]


def _perplexities(run: Run, texts: Sequence[Sequence[Row]]) -> list[list[float | None]]:
    """Return the perplexity of each text given its conversation, by the independent model alone."""
    inputs, side = run.inputs, run.inputs.perplexity_sides[-1]
    settings = run.config.evaluation_batch_size, inputs.evaluation_dtype
    chunks = [
        ({side: shown_turns(inputs, rows, side)}, [row["output"] for row in rows], *settings)
        for rows in texts
    ]
    with closing(run.executor.run("perplexities", chunks)) as results:
        found = dict(results)
    return [found[number][side] for number in range(len(chunks))]


def _by_turn(run: Run, values: Sequence[float | None]) -> np.ndarray:
    """Return the numbers of one cell as (conversations, turns)."""
    return np.array(values, dtype=np.float64).reshape(-1, run.config.n_turns)


def _notes(run: Run, unscored: Sequence[str]) -> list[str]:
    n_turns, n, n_questions = run.config.n_turns, len(run.inputs.conversations), len(run.inputs.prompts)
    notes = []
    if n_over := n_questions - n * n_turns:
        notes.append(f"{n_over} of {n_questions} test questions are in no conversation of {n_turns} turns")
    if n < FEWEST_PROMPTS:
        notes.append(
            f"no interval of effects over turns: {n} conversations, an interval needs {FEWEST_PROMPTS}; "
            f"raise n_test_prompts to {FEWEST_PROMPTS * n_turns}"
        )
    if unscored:
        notes.append(f"nothing over turns of {', '.join(unscored)}: no scorer but a judge reads the trait")
    return notes

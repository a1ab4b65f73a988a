"""Generate each text once, and keep it in a journal as soon as its batch is done (phases 1 to 4).

Development texts, of preflight and searches, are generated here too: whatever is chosen is chosen on them.
Test prompts are for phases 4 and 5 alone.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from decoding.batching import length_sorted_batches
from experiment.executor import GenerationSettings
from experiment.plan import (
    UNSTEERED_CELL,
    Cell,
    Row,
    SteeringVectors,
    rows_key,
    shown_prompts,
    text_rows,
)
from experiment.run import Run
from support.journal import Journal
from support.progress import Bar

logger = logging.getLogger(__name__)

NAME = "generation_results.json"


def generate_texts(run: Run, planned: Sequence[Row], steering: SteeringVectors) -> list[Row]:
    """Return the planned rows of the grid with their `output`, and write `generation_results.json`."""
    rows, counted = generate_steered(run, planned, steering)
    save_rows(run, NAME, rows)
    logger.info("%s, %d in all, %s", counted, len(rows), run.folder.path / NAME)
    return rows


def generated_texts(run: Run, planned: Sequence[Row]) -> list[Row]:
    """Return what phase 4 left of the planned rows. Raises InputError where it is not there."""
    return run.folder.require(NAME, rows_key(planned), 4)["rows"]


def generate_steered(run: Run, planned: Sequence[Row], steering: SteeringVectors) -> tuple[list[Row], str]:
    """Return the planned rows with their `output`, and how many are new and how fast they came.

    A vector of zeros adds nothing: its rows take the unsteered texts of their prompts and seeds.
    """
    settings = GenerationSettings.of(run.inputs, steering.medians)
    asked = [row if _adds_something(row, steering) else _unsteered(run, row) for row in planned]
    made, counted = generate_rows(
        run, "generation", asked, lambda rows: shown_prompts(run.inputs, rows), settings, steering.added
    )
    return [{**text, **row} for text, row in zip(made, planned, strict=True)], counted


def _adds_something(row: Row, steering: SteeringVectors) -> bool:
    return row["alpha"] is None or bool(steering.added(row).any())


def _unsteered(run: Run, row: Row) -> Row:
    """Return the row of the unsteered text of the same prompt and seed."""
    (unsteered,) = text_rows(run.inputs, [UNSTEERED_CELL], [row["prompt"]], [row["seed"]])
    return {**unsteered, "prompt_idx": row["prompt_idx"]}


def generate_development(
    run: Run, cells: Sequence[Cell], steering: SteeringVectors, n_seeds: int = 1, n_prompts: int | None = None
) -> list[list[Row]]:
    """Return each cell's rows on the development prompts with their texts: prompts, then seeds.

    n_prompts: the first ones alone; all by default.
    """
    seeds = range(run.config.seed, run.config.seed + n_seeds)
    prompts = run.inputs.development_prompts[:n_prompts]
    rows, _ = generate_steered(run, text_rows(run.inputs, cells, prompts, seeds), steering)
    size = len(prompts) * n_seeds
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def generate_rows(
    run: Run,
    journal_name: str,
    planned: Sequence[Row],
    show: Callable[[Sequence[Row]], list[str]],
    settings: GenerationSettings,
    added: Callable[[Row], Tensor],
) -> tuple[list[Row], str]:
    """Return the planned rows with `output` and `has_ended`, and a phrase on how many are new and how fast.

    Rows that the journal holds are not generated again. show: returns rows' prompts as the model reads them.
    added: returns what is added to a row, (blocks, d).
    """
    with run.folder.journal(journal_name) as journal:
        # Equal vectors under two names share their texts.
        new = list({row["key"]: row for row in planned if row["key"] not in journal.rows}.values())
        logger.info("%d texts to generate, %d of them cached", len(planned), len(planned) - len(new))
        speed = ""
        if new:
            started = time.perf_counter()
            n_tokens = _generate_new(run, new, show(new), settings, added, journal)
            speed = f", {n_tokens / (time.perf_counter() - started):.0f} tokens/s"
        return from_journal(planned, journal), f"{len(new)} new texts{speed}"


def _generate_new(
    run: Run,
    rows: Sequence[Row],
    shown: Sequence[str],
    settings: GenerationSettings,
    added: Callable[[Row], Tensor],
    journal: Journal,
) -> int:
    """Generate rows of all conditions, packed by length into full batches for speed; returns the tokens."""
    generator = settings.generator(run.inputs.side(settings.side))
    lengths = [len(ids) for ids in generator.tokenise_prompts(shown, settings.max_new_tokens)]
    batches = length_sorted_batches(lengths, settings.batch_size)
    chunks = [
        (
            [{**rows[index], "prompt": shown[index]} for index in batch],
            torch.stack([added(rows[index]) for index in batch]),
            settings,
        )
        for batch in batches
    ]
    n_tokens = 0
    with (
        Bar(len(rows), "generating", "text") as progress,
        closing(run.executor.run("generate", chunks)) as results,
    ):
        for number, generations in results:
            journal.append(
                [
                    {**rows[index], "output": made.text, "has_ended": made.has_ended}
                    for index, made in zip(batches[number], generations, strict=True)
                ]
            )
            n_tokens += sum(made.n_tokens for made in generations)
            progress.update(len(generations))
    return n_tokens


def from_journal(planned: Sequence[Row], journal: Journal) -> list[Row]:
    """Return the planned rows with what the journal knows of them; the plan says names and places."""
    return [{**journal.rows[row["key"]], **row} for row in planned]


def save_rows(run: Run, name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Write a result file of rows, in the planned order."""
    return run.folder.save(name, rows_key(rows), {"n": len(rows), "rows": list(rows)})

"""Write and evaluate rows of the grid: each once, and journalled as soon as it or its batch is done."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from decoding.batching import length_sorted_batches
from evaluation import Evaluator
from experiment.grid import (
    Row,
    evaluations_journal_fingerprint,
    rows_fingerprint,
    texts_journal_fingerprint,
)
from experiment.inputs import Inputs
from scoring.gpt_judge import GPTJudge
from support.journal import Journal
from support.run_folder import RunFolder

logger = logging.getLogger(__name__)

EVALUATION_CHUNK = 60

# What a row adds: persona -> method -> (blocks, d_target), each row of unit norm.
Vectors = Mapping[str, Mapping[str, Tensor]]


def write_texts(
    inputs: Inputs,
    folder: RunFolder,
    executor: Any,
    planned: Sequence[Row],
    vectors: Vectors,
    residual_norms: Sequence[float],
) -> tuple[list[Row], str]:
    """Return the planned rows with their `output`, and a word on how many are new and how fast they came.

    Rows that the journal holds are not written again. residual_norms: of each block that is steered, the unit
    of alpha, if it has one.
    """
    with folder.journal("generation", texts_journal_fingerprint(inputs)) as journal:
        # Equal vectors under two names share their texts.
        new = list({row["key"]: row for row in planned if row["key"] not in journal.rows}.values())
        logger.info("%d generations, %d of them already there", len(planned), len(planned) - len(new))
        speed = _write_missing(inputs, executor, new, vectors, residual_norms, journal) if new else ""
        return _from_journal(planned, journal), f"{len(new)} new texts{speed}"


def _write_missing(
    inputs: Inputs,
    executor: Any,
    rows: Sequence[Row],
    vectors: Vectors,
    residual_norms: Sequence[float],
    journal: Journal,
) -> str:
    """Write rows of all conditions, packed by length into full batches, which is what makes them fast."""
    settings = inputs.writing_settings(residual_norms)
    unsteered = torch.zeros(len(settings.layers), inputs.target.extractor.d_model)
    tokens = inputs.generator().tokenise_prompts([row["prompt"] for row in rows], settings.max_new_tokens)
    batches = [
        [rows[index] for index in batch]
        for batch in length_sorted_batches([len(ids) for ids in tokens], settings.batch_size)
    ]
    chunks = []
    for batch in batches:
        added = [vectors[row["persona"]][row["condition"]] if row["persona"] else unsteered for row in batch]
        chunks.append((batch, torch.stack(added), settings))
    started, n_tokens = time.perf_counter(), 0
    with (
        tqdm(total=len(rows), desc="generating", unit="text", disable=None) as progress,
        closing(executor.run("write", chunks)) as results,
    ):
        for number, (texts, n_written) in results:
            pairs = zip(batches[number], texts, strict=True)
            journal.append([{**row, "output": text} for row, text in pairs])
            n_tokens += n_written
            progress.update(len(texts))
    return f", {n_tokens / (time.perf_counter() - started):.0f} tokens/s"


def evaluate_texts(
    inputs: Inputs, folder: RunFolder, executor: Any, planned: Sequence[Row], judge: GPTJudge | None
) -> tuple[list[Row], int]:
    """Return the planned rows with their metrics, and how many of these are new.

    planned: what `grid.evaluation_rows` returned. A judgement that failed is asked for again.
    """
    with folder.journal("evaluation", evaluations_journal_fingerprint(inputs)) as journal:
        done = {key for key, row in journal.rows.items() if not row.get("gpt4_failure")}
        new = list({row["key"]: row for row in planned if row["key"] not in done}.values())
        logger.info("%d evaluations, %d of them already there", len(planned), len(planned) - len(new))
        if new:
            _evaluate_missing(inputs, executor, new, judge, journal)
        return _from_journal(planned, journal), len(new)


def _evaluate_missing(
    inputs: Inputs, executor: Any, rows: list[Row], judge: GPTJudge | None, journal: Journal
) -> None:
    evaluator = Evaluator(
        inputs.target.model,
        inputs.target.tokenizer,
        use_gpt4=judge is not None,
        judge=judge,
        classifiers=inputs.classifiers,
        descriptions={persona.name: persona.description for persona in inputs.personas},
    )
    scorers = ["target", "source"] if inputs.config.independent_perplexity else ["target"]
    # Texts of similar length share a chunk, and equal ones, which are scored once, stand together.
    rows = sorted(
        rows, key=lambda row: (len(row["prompt"]) + len(row["output"]), row["prompt"], row["output"])
    )
    parts = [rows[start : start + EVALUATION_CHUNK] for start in range(0, len(rows), EVALUATION_CHUNK)]
    size = inputs.config.evaluation_batch_size
    chunks = [
        ([row["prompt"] for row in part], [row["output"] for row in part], scorers, size) for part in parts
    ]
    with (
        tqdm(total=len(rows), desc="evaluating", unit="text", disable=None) as progress,
        closing(executor.run("perplexities", chunks)) as results,
    ):
        for number, perplexities in results:
            part = parts[number]
            independent = perplexities.get("source", [None] * len(part))
            with closing(evaluator.score_each(part, perplexities["target"], independent)) as groups:
                for scored in groups:
                    journal.append([{**part[index], **asdict(score)} for index, score in scored])
                    progress.update(len(scored))


def missing_notes(rows: Sequence[Row]) -> list[str]:
    """Return how many evaluations lack something, for the end of a run."""
    notes = []
    empty = sum(not row["output"].strip() for row in rows)
    if empty:
        notes.append(f"{empty} texts are empty; their metrics are missing")
    failed = [row["gpt4_failure"] for row in rows if row["gpt4_failure"]]
    if failed:
        reason = f"first reason: {failed[0]}"
        notes.append(f"{len(failed)} texts lack a judgement ({reason}); run again to retry them")
    return notes


def save_rows(folder: RunFolder, name: str, rows: Sequence[Row]) -> None:
    """Write the result file of a phase, in the planned order."""
    folder.save(name, rows_fingerprint(rows), {"n": len(rows), "rows": list(rows)})


def _from_journal(planned: Sequence[Row], journal: Journal) -> list[Row]:
    """Return the planned rows with what the journal knows of them; names and places are the plan's."""
    return [{**journal.rows[row["key"]], **row} for row in planned]

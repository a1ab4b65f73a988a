"""Write and evaluate rows of the grid: each once, and journalled as soon as it or its batch is done."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.batching import length_sorted_batches
from evaluation import EvaluationResult, Evaluator
from experiment.executor import WritingSettings
from experiment.inputs import Inputs
from experiment.plan import (
    Row,
    evaluations_journal_fingerprint,
    judge_settings,
    rows_fingerprint,
    scoring_sides,
    texts_journal_fingerprint,
)
from scoring.cached_judge import CachedJudge
from support.artifacts import fingerprint
from support.errors import InputError
from support.journal import Journal
from support.progress import HIDDEN, tqdm
from support.run_folder import RunFolder
from support.vocabulary import vector_names

logger = logging.getLogger(__name__)

EVALUATION_CHUNK = 60
METRIC_NAMES = {field.name for field in fields(EvaluationResult)}

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
        new = _not_written(planned, journal)
        logger.info("%d generations, %d of them already there", len(planned), len(planned) - len(new))
        settings = inputs.writing_settings(residual_norms)
        unsteered = torch.zeros(len(settings.layers), inputs.target.extractor.d_model)
        added = [_added(vectors, row, unsteered) for row in new]
        shown = [
            inputs.render_prompt("target", row["prompt"], row["condition"], row["persona"]) for row in new
        ]
        speed = _write_missing(inputs, executor, new, shown, added, settings, journal) if new else ""
        return _from_journal(planned, journal), f"{len(new)} new texts{speed}"


def _added(vectors: Vectors, row: Row, unsteered: Tensor) -> Tensor:
    """Return what a row adds, (blocks, d_target); a control's vectors take turns, prompt by prompt."""
    if row["alpha"] is None:
        return unsteered
    names = vector_names(row["condition"])
    return vectors[row["persona"]][names[row["prompt_idx"] % len(names)]]


def write_responses(
    inputs: Inputs, folder: RunFolder, executor: Any, planned: Sequence[Row], writer: str, max_new_tokens: int
) -> list[Row]:
    """Return the planned rows with a side's unsteered answers under their system prompts, as `output`."""
    with folder.journal(f"responses_{writer}", fingerprint(inputs.side(writer).fingerprint)) as journal:
        new = _not_written(planned, journal)
        logger.info(
            "%d answers by the %s model, %d of them already there",
            len(planned),
            writer,
            len(planned) - len(new),
        )
        settings = replace(
            inputs.writing_settings([1.0] * len(inputs.layer_pairs)),
            layers=(),
            residual_norms=(),
            max_new_tokens=max_new_tokens,
            side=writer,
        )
        shown = [inputs.shown_question(writer, row["prompt"], row["system_prompt"]) for row in new]
        nothing = [torch.zeros(0, inputs.side(writer).extractor.d_model)] * len(new)
        if new:
            _write_missing(inputs, executor, new, shown, nothing, settings, journal)
        return _from_journal(planned, journal)


def _not_written(planned: Sequence[Row], journal: Journal) -> list[Row]:
    done = {key for key, row in journal.rows.items() if isinstance(row.get("output"), str)}
    # Equal vectors under two names share their texts.
    return list({row["key"]: row for row in planned if row["key"] not in done}.values())


def _write_missing(
    inputs: Inputs,
    executor: Any,
    rows: Sequence[Row],
    shown: Sequence[str],
    added: Sequence[Tensor],
    settings: WritingSettings,
    journal: Journal,
) -> str:
    """Write rows of all conditions, packed by length into full batches, which is what makes them fast.

    shown: each row's prompt as the model reads it. added: (blocks, d) to each row.
    """
    generator = settings.generator(inputs.side(settings.side))
    lengths = [len(ids) for ids in generator.tokenise_prompts(shown, settings.max_new_tokens)]
    batches = length_sorted_batches(lengths, settings.batch_size)
    chunks = [
        (
            [{**rows[index], "prompt": shown[index]} for index in batch],
            torch.stack([added[index] for index in batch]),
            settings,
        )
        for batch in batches
    ]
    started, n_tokens = time.perf_counter(), 0
    with (
        tqdm(total=len(rows), desc="generating", unit="text", disable=HIDDEN) as progress,
        closing(executor.run("write", chunks)) as results,
    ):
        for number, (texts, ended, n_written) in results:
            written = zip(batches[number], texts, ended, strict=True)
            journal.append(
                [
                    {**rows[index], "output": text, "has_ended": has_ended}
                    for index, text, has_ended in written
                ]
            )
            n_tokens += n_written
            progress.update(len(texts))
    return f", {n_tokens / (time.perf_counter() - started):.0f} tokens/s"


def evaluate_texts(
    inputs: Inputs,
    folder: RunFolder,
    executor: Any,
    planned: Sequence[Row],
    has_ratios: bool = False,
) -> tuple[list[Row], int]:
    """Return the planned rows with their metrics, and how many of these are new.

    planned: what `grid.evaluation_rows` returned. has_ratios: as it was told. The judge is asked about rows
    with a true `is_judged`; a failed judgement is asked for again.

    The last digits of a perplexity depend on the texts that share its batch. So texts are scored in the
    company of their cell (condition, persona and alpha) and seed, whichever of them are missing: after damage
    or a kill every number comes back to the last bit, and more seeds cost no more than themselves. (Rounding
    would not do: batches differ by more than the sixth digit, and a number at the edge of a step would still
    flip.) What the journal holds is never replaced, so these are not the same to the last bit: numbers on
    another machine or with another number of threads or another batch size, also one that was halved for want
    of memory, and a number that is lost after prompts were added to its cell.
    """
    with folder.journal("evaluation", evaluations_journal_fingerprint(inputs)) as journal:
        done = {
            key for key, row in journal.rows.items() if row.keys() >= METRIC_NAMES and not row["gpt4_failure"]
        }
        new = list({row["key"]: row for row in planned if row["key"] not in done}.values())
        logger.info("%d evaluations, %d of them already there", len(planned), len(planned) - len(new))
        if new:
            parts = _parts_with(planned, {row["key"] for row in new})
            judge = asked_judge(inputs, folder) if any(row.get("is_judged") for row in new) else None
            wanted = {row["key"] for row in new}
            known = {row["perplexity_key"]: row for row in journal.rows.values() if "perplexity_key" in row}
            perplexities = _perplexities(inputs, executor, parts, known)
            _evaluate_missing(inputs, perplexities, parts, wanted, judge, has_ratios, journal)
        return _from_journal(planned, journal), len(new)


def asked_judge(inputs: Inputs, folder: RunFolder) -> CachedJudge | None:
    """Return the judge of a run, which remembers what it has said and what it may cost; None without one."""
    if inputs.judge is None:
        return None
    settings = inputs.config.judge
    cache_key = fingerprint(judge_settings(settings))
    price = settings.usd_per_million_tokens if settings.kind == "server" else 0.0
    return CachedJudge(inputs.judge, lambda: folder.journal("judgements", cache_key), price, settings.max_usd)


def _parts_with(planned: Sequence[Row], wanted: set[str]) -> list[list[Row]]:
    """Return the parts of cells that hold a wanted row, each with all its rows, in the planned order.

    A part has texts of one seed.
    """
    cells: dict[tuple, dict[str, Row]] = {}
    for row in planned:
        # An unsteered text is scored for every persona; together, what they share is computed and asked once.
        persona = None if row["alpha"] is None else row["persona"]
        cell = cells.setdefault((row["condition"], persona, row["alpha"], row["seed"]), {})
        cell.setdefault(row["key"], row)
    parts = []
    for cell in cells.values():
        rows = list(cell.values())
        parts += [rows[start : start + EVALUATION_CHUNK] for start in range(0, len(rows), EVALUATION_CHUNK)]
    return [part for part in parts if any(row["key"] in wanted for row in part)]


def _perplexities(
    inputs: Inputs, executor: Any, parts: Sequence[Sequence[Row]], known: Mapping[str, Row]
) -> Iterator[tuple[int, list[Any], list[Any]]]:
    """Yield index of a part, perplexities of its texts, and those to the independent model.

    known: evaluations, also by other scorers, by what their perplexities are made from. A part that they hold
    is not read again, so that a scorer that is added later, or trained anew, costs no perplexity.
    """
    unread = []
    for number, part in enumerate(parts):
        if all(row["perplexity_key"] in known for row in part):
            rows = [known[row["perplexity_key"]] for row in part]
            yield number, *([row[name] for row in rows] for name in ("perplexity", "independent_perplexity"))
        else:
            unread.append(number)
    sides = scoring_sides(inputs)
    size, dtype = inputs.config.evaluation_batch_size, inputs.evaluation_dtype
    chunks = []
    for part in (parts[number] for number in unread):
        shown = {name: [inputs.shown_prompt(name, row["prompt"]) for row in part] for name in sides}
        chunks.append((shown, [row["output"] for row in part], size, dtype))
    with closing(executor.run("perplexities", chunks)) as results:
        for index, found in results:
            nothing = [None] * len(found["target"])
            yield unread[index], found["target"], found.get("source", nothing)


def _evaluate_missing(
    inputs: Inputs,
    perplexities: Iterator[tuple[int, list[Any], list[Any]]],
    parts: Sequence[Sequence[Row]],
    wanted: set[str],
    judge: CachedJudge | None,
    has_ratios: bool,
    journal: Journal,
) -> None:
    """Score whole parts, and journal the wanted rows; the judge is asked about these alone."""
    evaluator = Evaluator(
        inputs.target.model,
        inputs.target.tokenizer,
        use_gpt4=judge is not None,
        judge=judge,
        classifiers=inputs.classifiers,
        likelihood_ratios=inputs.likelihood_ratios if has_ratios else {},
        descriptions={persona.name: persona.description for persona in inputs.personas},
        eval_prompts={persona.name: persona.eval_prompt for persona in inputs.personas},
    )
    journalled: set[str] = set()  # a row may stand in two cells
    with (
        tqdm(total=len(wanted), desc="evaluating", unit="text", disable=HIDDEN) as progress,
        closing(perplexities) as results,
    ):
        for number, *of_both in results:
            part = parts[number]
            missing = [
                index
                for index, row in enumerate(part)
                if row["key"] in wanted and row["key"] not in journalled
            ]
            scores = evaluator.score_each(part, *of_both, missing)
            with closing(scores) as groups:
                for scored in groups:
                    journal.append([{**part[index], **asdict(score)} for index, score in scored])
                    progress.update(len(scored))
            journalled |= {part[index]["key"] for index in missing}


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


def check_rows(rows: list[Row], cache_key: str, path: Path) -> list[Row]:
    """Return the rows of a result file. Raises InputError unless they are those that it was made from."""
    if rows_fingerprint(rows) != cache_key:
        raise InputError(f"{path} holds other rows than it says; delete it and run phase 4 again")
    return rows


def save_rows(folder: RunFolder, name: str, rows: Sequence[Row]) -> None:
    """Write the result file of a phase, in the planned order."""
    folder.save(name, rows_fingerprint(rows), {"n": len(rows), "rows": list(rows)})


def _from_journal(planned: Sequence[Row], journal: Journal) -> list[Row]:
    """Return the planned rows with what the journal knows of them; names and places are the plan's."""
    return [{**journal.rows[row["key"]], **row} for row in planned]

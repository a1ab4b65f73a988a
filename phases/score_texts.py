"""Score every text once, and keep its metrics in a journal as soon as they are known (phases 4 and 5).

The last digits of a perplexity depend on the texts that share its batch. So texts are scored together with
the other texts of their cell (condition, persona and alpha) and seed, whichever of them are missing: after
damage or a kill every number comes back to the last bit, and more seeds cost no more than themselves. What
the journal holds is never replaced. So numbers are not the same to the last bit on another machine, with
another number of threads or another batch size, or where one is lost after prompts were added to its cell.
"""

import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

from evaluation import Evaluator
from experiment.conditions import SCORERS
from experiment.config import ExperimentConfig
from experiment.plan import Row
from experiment.run import FORMAT_VERSION, Run
from judging.cached_judge import CachedJudge
from judging.gpt_judge import server_address, trait_prompt
from model_loading import resolve_device, resolve_dtype
from phases.generate_texts import from_journal, save_rows
from scoring.degenerate_text import words_of
from support.artifacts import fingerprint
from support.journal import Journal
from support.progress import Bar
from texts.personas import Persona

logger = logging.getLogger(__name__)

NAME = "eval_results.json"
EVALUATION_CHUNK = 60  # texts


def score_texts(run: Run, texts: Sequence[Row]) -> list[Row]:
    """Return a row for each text and persona with all metrics, and write `eval_results.json`."""
    planned = planned_evaluations(run, texts)
    rows, n_new = score_rows(run, planned, run.inputs.scorer_names)
    save_rows(run, NAME, rows)
    run.folder.notes += _missing_notes(rows)
    logger.info("%d evaluations, %d of them new, %s", len(rows), n_new, run.folder.path / NAME)
    return rows


def planned_evaluations(run: Run, texts: Sequence[Row]) -> list[Row]:
    """Return a row for each text and persona; the unsteered text is scored for every persona."""
    rows = [
        {**text, "persona": name}
        for text in texts
        for name in ([text["persona"]] if text["persona"] else run.config.persona_names)
    ]
    if run.inputs.judge:
        judged = _judged_places(run.config, texts)
        rows = [{**row, "is_judged": (row["prompt_idx"], row["seed"]) in judged} for row in rows]
    return evaluation_rows(run, rows, run.inputs.scorer_names)


def _judged_places(config: ExperimentConfig, texts: Sequence[Row]) -> set[tuple[int, int]]:
    """Return (prompt, seed) of the texts that are judged, the same in every cell, so that they stay paired.

    With `judge.texts_per_cell`, the run's seed draws as many prompts as it allows; second seeds come last.
    """
    places = list(dict.fromkeys((text["prompt_idx"], text["seed"]) for text in texts))
    prompts = sorted({prompt for prompt, _ in places})
    random.Random(config.seed).shuffle(prompts)
    rank = {prompt: number for number, prompt in enumerate(prompts)}
    ordered = sorted(places, key=lambda place: (place[1], rank[place[0]]))
    return set(ordered[: config.judge.texts_per_cell])


def judge_key(config: ExperimentConfig) -> list[Any]:
    """Return what a judgement depends on beside its prompt."""
    settings = config.judge
    if settings.kind == "local":
        place = config.place_of("judge.model")
        device = resolve_device(place.device)
        # On the CPU, the name that the configuration has.
        dtype = place.dtype if device.type == "cpu" else str(resolve_dtype(place.dtype, device))
        key = ["local", place.name, dtype]
        return key if place.quantization == "none" else [*key, place.quantization]
    key = [settings.model, server_address(settings.base_url), settings.max_answer_tokens]
    return [*key, settings.request_options] if settings.request_options else key


def judged_description(persona: Persona) -> list[str]:
    """Return what a judge is told of a persona."""
    return [persona.description, persona.eval_prompt]


def cached_judge(run: Run) -> CachedJudge | None:
    """Return the judge of a run, which remembers what it has said and what it may cost; None without one."""
    if run.inputs.judge is None:
        return None
    settings = run.config.judge
    price = settings.usd_per_million_tokens if settings.kind == "server" else 0.0
    key = fingerprint(judge_key(run.config))
    return CachedJudge(
        run.inputs.judge, lambda: run.folder.journal("judgements"), key, price, settings.max_usd
    )


def trait_prompts(persona: Persona, prompts: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return what a judge is asked about a trait in each text; prompts: what the texts respond to."""
    described = persona.name, persona.description, persona.eval_prompt
    return [trait_prompt(*described, *each) for each in zip(prompts, texts, strict=True)]


def judged_trait(
    judge: CachedJudge, persona: Persona, prompts: Sequence[str], texts: Sequence[str]
) -> list[float | None]:
    """Return a judge's scores of a trait on a scale of 0 to 1, None where it gave none.

    prompts: what the texts respond to, one each. An empty text shows no trait, and no judge is asked.
    """
    asked = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text.strip()]
    judged = iter(judge.judge(trait_prompts(persona, *map(list, zip(*asked, strict=True)))) if asked else [])
    scores = [next(judged).score if text.strip() else 1.0 for text in texts]
    return [None if score is None else (score - 1) / 4 for score in scores]


def perplexity_key(run: Run, sides: Sequence[str]) -> str:
    """Return what perplexities depend on beside the texts: the models that give them, and in which dtype."""
    models = [run.inputs.side(name).fingerprint for name in sides]
    return fingerprint(FORMAT_VERSION, models, run.inputs.evaluation_dtype)


def scorers_key(run: Run, scorers: Sequence[str]) -> str:
    """Return what the scores of these trained scorers depend on beside the texts."""
    inputs = run.inputs
    return fingerprint(
        [[name, [inputs.scorer_key(name, persona) for persona in inputs.personas]] for name in scorers]
    )


def evaluation_rows(
    run: Run, texts: Sequence[Row], scorers: Sequence[str], sides: Sequence[str] | None = None
) -> list[Row]:
    """Return the rows of texts that have a persona, with the keys of their evaluation and perplexities.

    texts: a judge reads those with a true `is_judged`. scorers: names of the trained scorers that read them.
    sides: the models that give perplexities; by default all that the run has.
    """
    inputs, sides = run.inputs, sides or run.inputs.perplexity_sides
    descriptions = {persona.name: judged_description(persona) for persona in inputs.personas}
    # A text is scored for every persona of the run, so that a further persona is a further score.
    of_scorers = [scorers_key(run, scorers), sorted(run.config.persona_names), sorted(_allowed_words(run))]
    of_perplexity, of_judge = perplexity_key(run, sides), judge_key(run.config)
    shown = {
        prompt: [inputs.prompting.prompt(side, prompt) for side in sides]
        for prompt in {text["prompt"] for text in texts}
    }
    rows = []
    for text in texts:
        judged = [of_judge, descriptions[text["persona"]]] if text.get("is_judged") else None
        of_text = fingerprint(of_perplexity, shown[text["prompt"]], text["output"])
        key = fingerprint(text["key"], of_text, text["persona"], of_scorers, judged)
        rows.append({**text, "key": key, "perplexity_key": of_text})
    return rows


def _allowed_words(run: Run) -> frozenset[str]:
    """Return the words of the personas' labelled texts, which a trait may need and no list of words holds."""
    labelled = ([*each.labelled_positive, *each.labelled_negative] for each in run.inputs.personas)
    return words_of(list(chain.from_iterable(labelled)))


def score_rows(
    run: Run, planned: Sequence[Row], scorers: Sequence[str], sides: Sequence[str] | None = None
) -> tuple[list[Row], int]:
    """Return the planned rows with their metrics, and how many of these are new.

    planned: what `evaluation_rows` returned for the same scorers and sides. The judge is asked about rows
    with a true `is_judged`; a failed judgement is asked for again.
    """
    with run.folder.journal("evaluation") as journal:
        done = {key for key, row in journal.rows.items() if not row["gpt4_failure"]}
        wanted = {row["key"] for row in planned} - done
        logger.info("%d evaluations, %d of them cached", len(planned), len(planned) - len(wanted))
        if wanted:
            parts = _parts_with(planned, wanted)
            known = {row["perplexity_key"]: row for row in journal.rows.values()}
            perplexities = _perplexities(run, parts, known, sides or run.inputs.perplexity_sides)
            _score_new(run, parts, wanted, perplexities, scorers, journal)
        return from_journal(planned, journal), len(wanted)


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
    run: Run, parts: Sequence[Sequence[Row]], known: Mapping[str, Row], sides: Sequence[str]
) -> Iterator[tuple[int, list[Any], list[Any]]]:
    """Yield index of a part, perplexities of its texts, and those to the independent model.

    known: evaluations, also by other scorers, by the key of their perplexities. A part that they hold is not
    read again, so that a scorer that is added later, or trained anew, costs no perplexity.
    """
    inputs, unread = run.inputs, []
    for number, part in enumerate(parts):
        if all(row["perplexity_key"] in known for row in part):
            rows = [known[row["perplexity_key"]] for row in part]
            yield number, *([row[name] for row in rows] for name in ("perplexity", "independent_perplexity"))
        else:
            unread.append(number)
    chunks = []
    for part in (parts[number] for number in unread):
        shown = {name: [inputs.prompting.prompt(name, row["prompt"]) for row in part] for name in sides}
        outputs = [row["output"] for row in part]
        chunks.append((shown, outputs, run.config.evaluation_batch_size, inputs.evaluation_dtype))
    with closing(run.executor.run("perplexities", chunks)) as results:
        for index, found in results:
            nothing = [None] * len(parts[unread[index]])
            yield unread[index], *(found.get(name, nothing) for name in ("target", "source"))


def _score_new(
    run: Run,
    parts: Sequence[Sequence[Row]],
    wanted: set[str],
    perplexities: Iterator[tuple[int, list[Any], list[Any]]],
    scorers: Sequence[str],
    journal: Journal,
) -> None:
    """Score whole parts, and journal the wanted rows; the judge is asked about these alone."""
    personas = run.inputs.personas
    is_judged = any(row.get("is_judged") for part in parts for row in part if row["key"] in wanted)
    evaluator = Evaluator(
        run.inputs.target.model,
        run.inputs.target.tokenizer,
        use_gpt4=is_judged,
        judge=cached_judge(run) if is_judged else None,
        scorers={SCORERS[name].column: run.inputs.load_scorers(name) for name in scorers},
        descriptions={persona.name: persona.description for persona in personas},
        eval_prompts={persona.name: persona.eval_prompt for persona in personas},
        allowed_words=_allowed_words(run),
    )
    journalled: set[str] = set()  # a row may stand in two cells
    with (
        Bar(len(wanted), "evaluating", "text") as progress,
        closing(perplexities) as results,
    ):
        for number, *of_both in results:
            part = parts[number]
            missing = [
                index
                for index, row in enumerate(part)
                if row["key"] in wanted and row["key"] not in journalled
            ]
            with closing(evaluator.score_each(part, *of_both, missing)) as groups:
                for scored in groups:
                    journal.append([{**part[index], **result.row()} for index, result in scored])
                    progress.update(len(scored))
            journalled |= {part[index]["key"] for index in missing}


def _missing_notes(rows: Sequence[Row]) -> list[str]:
    """Return how many evaluations lack something, for the end of a run."""
    notes = []
    if empty := sum(not row["output"].strip() for row in rows):
        notes.append(f"{empty} texts are empty: they show no trait and count as collapsed")
    if failed := [row["gpt4_failure"] for row in rows if row["gpt4_failure"]]:
        example = {failure.partition(":")[0]: failure for failure in failed}
        kinds = Counter(failure.partition(":")[0] for failure in failed).most_common(3)
        reasons = "; ".join(f"{n} times: {example[kind]}" for kind, n in kinds)
        notes.append(f"{len(failed)} texts lack a judgement ({reasons}); run again to retry them")
    return notes

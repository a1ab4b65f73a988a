"""Measure what stands beside an effect: what it costs plain text, and how it spreads (phase 5).

What steering costs where nobody asked for the persona: the target reads neutral passages under each steering
that a verdict compares, and unsteered, and answers short questions with one right continuation of four.
What another sample of the extraction texts would change: vectors of resampled texts steer on development
questions. What vectors do over strengths: the verdict compares all conditions at one alpha, and native,
mapped and lexical controls write at multiples of it, too. Texts cost time, so that one seed and the first
prompts serve there. Nothing is decided by any of this.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from analysis.extraction_spread import effect_spread
from analysis.results_table import perplexity_ratio, results_table
from analysis.significance import share_change
from analysis.strength_curve import MULTIPLES, strength_curve
from experiment.conditions import (
    LEXICAL_CONTROLS,
    MAPPED,
    ORACLE,
    RANDOM,
    SCORERS,
    TRAINED_SCORERS,
    drawn_name,
    vector_names,
)
from experiment.executor import GenerationSettings
from experiment.inputs import N_PLAIN_TEXTS
from experiment.plan import UNSTEERED_CELL, Cell, Row, SteeringVectors, drawn_cells, rows_key, text_rows
from experiment.run import FORMAT_VERSION, Run
from phases.fit_maps import mapping_data_key
from phases.generate_texts import generate_development, generate_steered
from phases.make_vectors import RESAMPLED_VECTORS, vector_key
from phases.score_texts import (
    cached_judge,
    evaluation_rows,
    judge_key,
    judged_description,
    judged_trait,
    score_rows,
    scorers_key,
)
from scoring.brevity import brevity
from support.artifacts import fingerprint
from texts.questions import Question, load_questions

logger = logging.getLogger(__name__)

NAME, CAPABILITY, OF_EFFECTS = "side_effects.json", "capability.json", "effect_spread.json"
N_QUESTIONS = 12  # development prompts on which vectors of resampled texts steer
N_CURVE_PROMPTS = 20  # test prompts on which vectors also write at other strengths, which decides nothing
UNSCORED = "too few texts have a score"
RESAMPLED = "_resampled_"  # between condition and number, in what such a vector is called

ComparedAlphas = Mapping[str, Mapping[str, float | None]]  # persona -> condition -> alpha


def plain_text_ratios(
    run: Run, steering: SteeringVectors, alphas: ComparedAlphas
) -> dict[str, dict[str, float]]:
    """Return persona -> condition -> perplexity ratio of plain text, steered to unsteered; writes it, too.

    alphas: conditions without one are left out. For a control of several draws, the geometric mean over them.
    A vector is added at every token, whatever `steer_positions` says.
    """
    key = _key(run, alphas, _texts(run))
    content = run.folder.current(NAME, key) or run.folder.save(NAME, key, _measure(run, steering, alphas))
    return content["personas"]


def _key(run: Run, alphas: ComparedAlphas, texts: Sequence[Any]) -> str:
    """Return what perplexities of texts depend on under the vectors of these conditions."""
    config, target = run.config, run.inputs.target.fingerprint
    cells = [
        [persona, condition, alpha, vector_key(run, persona, condition)]
        for persona, of_persona in alphas.items()
        for condition, alpha in of_persona.items()
        if alpha is not None
    ]
    unit = [config.alpha_unit, mapping_data_key(run)]
    return fingerprint(FORMAT_VERSION, target, cells, texts, unit)


def _texts(run: Run) -> list[str]:
    return [item.text for item in run.inputs.neutral_texts[:N_PLAIN_TEXTS]]


def _measure(run: Run, steering: SteeringVectors, alphas: ComparedAlphas) -> dict[str, Any]:
    texts = _texts(run)
    cells = [
        (persona, condition, alpha, name)
        for persona, of_persona in alphas.items()
        for condition, alpha in of_persona.items()
        if alpha is not None
        for name in vector_names(condition)
    ]
    unsteered, *found = _steered_perplexities(run, steering, cells, texts)
    logs: dict[tuple[str, str], list[float]] = {}
    for (persona, condition, _, _), steered in zip(cells, found, strict=True):
        if (ratio := perplexity_ratio(steered, unsteered)) is not None:
            logs.setdefault((persona, condition), []).append(math.log(ratio))
    ratios: dict[str, dict[str, float]] = {persona: {} for persona in alphas}
    for (persona, condition), values in logs.items():
        ratios[persona][condition] = math.exp(fmean(values))
    return {"n_texts": len(texts), "personas": ratios}


def _steered_perplexities(
    run: Run,
    steering: SteeringVectors,
    cells: Sequence[tuple[str, str, float, str]],
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
) -> list[list[float | None]]:
    """Return the perplexities of texts to the unsteered target, then under the vector of each cell.

    cells: (persona, condition, alpha, vector name); the vector is added at every token. prompts: what
    precedes each text, if anything.
    """
    size = run.config.evaluation_batch_size
    settings = replace(GenerationSettings.of(run.inputs, steering.medians), steer_positions="all")
    any_vectors = next(iter(next(iter(steering.vectors.values())).values()))
    added = [(any_vectors, 0.0)]
    added += [(steering.vectors[persona][name], alpha) for persona, _, alpha, name in cells]
    chunks = [(texts, vectors, alpha, settings, size, prompts) for vectors, alpha in added]
    with closing(run.executor.run("plain_perplexities", chunks)) as results:
        found = dict(results)
    return [found[number] for number in range(len(chunks))]


def measure_capability(
    run: Run, steering: SteeringVectors, verdicts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return how many short questions the target answers right, unsteered and steered; writes it, too.

    A question is a text to be continued, without a chat template, and the answer is the continuation with the
    lowest perplexity: the highest mean log-likelihood of a token. verdicts: persona -> `Verdict.content()`,
    whose alphas are taken. The native and the mapped vector steer, the stronger lexical control and the first
    random direction, where the run has them. Returns `n_questions`, the accuracy `unsteered`, and `personas`
    -> condition -> `accuracy` and its `change`, with an interval paired by question; empty without questions.
    """
    questions = load_questions(run.config.n_capability_questions)
    if not questions:
        return {}
    alphas = {persona: _of_capability(found) for persona, found in verdicts.items()}
    key = _key(run, alphas, list(map(asdict, questions)))
    if content := run.folder.current(CAPABILITY, key):
        return content
    cells = [
        (persona, condition, alpha, vector_names(condition)[0])
        for persona, of_persona in alphas.items()
        for condition, alpha in of_persona.items()
    ]
    asked = [(each.text, continuation) for each in questions for continuation in each.continuations]
    prompts, texts = map(list, zip(*asked, strict=True))
    perplexities = _steered_perplexities(run, steering, cells, texts, prompts)
    unsteered, *steered = (_are_right(questions, found) for found in perplexities)
    personas: dict[str, dict[str, Any]] = {persona: {} for persona in alphas}
    for (persona, condition, _, _), right in zip(cells, steered, strict=True):
        change = asdict(share_change(right, unsteered))
        personas[persona][condition] = {"accuracy": fmean(right), "change": change}
    content = {"n_questions": len(questions), "unsteered": fmean(unsteered), "personas": personas}
    return run.folder.save(CAPABILITY, key, content)


def _of_capability(found: Mapping[str, Any]) -> dict[str, float]:
    """Return condition -> alpha of those under which a persona's verdict has questions answered."""
    scorers = [found["decided_by"], *found["scorers"]]
    effects = next(filter(None, (found["scorers"][name]["effects"] for name in scorers if name)), {})
    lexical = [name for name in LEXICAL_CONTROLS if found["alphas"].get(name) is not None]
    lexical.sort(key=lambda name: -effects[name]["estimate"] if name in effects else 0.0)
    names = (ORACLE, MAPPED, *lexical[:1], RANDOM)
    return {name: alpha for name in names if (alpha := found["alphas"].get(name)) is not None}


def _are_right(questions: Sequence[Question], perplexities: Sequence[float | None]) -> list[bool]:
    """Return for each question whether its right continuation alone has the lowest perplexity."""
    remaining = iter(perplexities)
    right = []
    for question in questions:
        values = dict(zip(question.continuations, remaining, strict=False))
        own = values.pop(question.right)
        right.append(all(own < other for other in values.values()))
    return right


def resampled_effects(
    run: Run, steering: SteeringVectors, verdicts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return persona -> how far effects spread over vectors of resampled texts; writes it, too.

    verdicts: persona -> `Verdict.content()`, whose alphas are taken, and whose scorer, but a judge only where
    no other is validated. Of each persona: `scorer`; `vectors`, condition -> what `effect_spread` returns;
    `not_measured`: why there is nothing.
    """
    if not run.config.extraction_resamples:
        return {}
    resampled = RESAMPLED_VECTORS.require(run)
    scorers = {
        name: scorer_of(found, found["rests_on"]) or found["decided_by"] for name, found in verdicts.items()
    }
    cells = [
        cell
        for name, found in verdicts.items()
        if scorers[name]
        for method in resampled["vectors"].get(name, {})
        if method in found["alphas"]
        for cell in _resampled_cells(run, name, method, found["alphas"][method])
    ]
    key = _resampled_key(run, cells, scorers)
    content = run.folder.current(OF_EFFECTS, key)
    # A judge that failed may answer now; what it has said, and the texts, are cached.
    if content is None or UNSCORED in {found["not_measured"] for found in content["personas"].values()}:
        measured = _measure_resampled(run, steering, resampled["vectors"], cells, scorers)
        personas = {}
        for name, scorer in scorers.items():
            why_not = resampled["personas"][name]["not_resampled"] or (
                "no scorer is validated" if scorer is None else UNSCORED
            )
            entry = {"scorer": scorer, "vectors": measured.get(name, {})}
            personas[name] = {**entry, "not_measured": None if entry["vectors"] else why_not}
        content = run.folder.save(OF_EFFECTS, key, {"personas": personas})
    run.folder.notes += [
        f"{name}: how far another sample of the extraction texts moves the effect is not known: {why_not}"
        for name, found in content["personas"].items()
        if (why_not := found["not_measured"])
    ]
    return content["personas"]


def scorer_of(found: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the scorer of these that decided a verdict, else the first of them; no judge, which costs."""
    free = [name for name in names if name != "judge"]
    return found["decided_by"] if found["decided_by"] in free else next(iter(free), None)


def _resampled_cells(run: Run, persona: str, method: str, alpha: float) -> list[Cell]:
    key = vector_key(run, persona, method), run.config.seed
    names = [f"{method}{RESAMPLED}{number}" for number in range(run.config.extraction_resamples)]
    return [Cell(name, persona, alpha, fingerprint(*key, name)) for name in names]


def _resampled_key(run: Run, cells: Sequence[Cell], scorers: Mapping[str, str | None]) -> str:
    inputs, config = run.inputs, run.config
    texts = text_rows(inputs, cells, inputs.development_prompts[:N_QUESTIONS], [config.seed])
    trained = scorers_key(run, sorted({name for name in scorers.values() if name in TRAINED_SCORERS}))
    judged = None
    if "judge" in scorers.values():
        judged = [judge_key(config), list(map(judged_description, inputs.personas))]
    return fingerprint(RESAMPLED_VECTORS.key(run), rows_key(texts), dict(scorers), trained, judged)


def _measure_resampled(
    run: Run,
    steering: SteeringVectors,
    vectors: Mapping[str, Mapping[str, Tensor]],
    cells: Sequence[Cell],
    scorers: Mapping[str, str | None],
) -> dict[str, dict[str, Any]]:
    """Return persona -> condition -> what `effect_spread` returns. vectors: (resamples, blocks, d) each."""
    if not cells:
        return {}
    by_name = {
        persona: {
            f"{method}{RESAMPLED}{number}": vector
            for method, drawn in of_persona.items()
            for number, vector in enumerate(drawn)
        }
        for persona, of_persona in vectors.items()
    }
    resampled = SteeringVectors(by_name, steering.norms)
    unsteered, *texts = generate_development(run, [UNSTEERED_CELL, *cells], resampled, n_prompts=N_QUESTIONS)
    scores: dict[tuple[str, str], list[Sequence[float | None]]] = {}
    for cell, rows in zip(cells, texts, strict=True):
        method = cell.condition.partition(RESAMPLED)[0]
        found = trait_scores(run, scorers[cell.persona], cell.persona, rows, unsteered)
        scores.setdefault((cell.persona, method), []).append(found)
    measured: dict[str, dict[str, Any]] = {}
    for (persona, method), found in scores.items():
        if spread := effect_spread(found):
            measured.setdefault(persona, {})[method] = spread
    return measured


def trait_scores(
    run: Run, scorer: str, persona: str, rows: Sequence[Row], unsteered: Sequence[Row]
) -> Sequence[float | None]:
    """Return a scorer's scores of a persona's trait in texts, None where it gives none.

    unsteered: texts against whose length brevity is measured.
    """
    outputs = [row["output"] for row in rows]
    if scorer == "brevity":
        return brevity(outputs, [row["has_ended"] for row in rows], [row["output"] for row in unsteered])
    if scorer == "judge":
        described = next(each for each in run.inputs.personas if each.name == persona)
        return judged_trait(cached_judge(run), described, [row["prompt"] for row in rows], outputs)
    return run.inputs.load_scorers(scorer)[persona].score(outputs)


def compare_strengths(
    run: Run, steering: SteeringVectors, rows: Sequence[Row], verdicts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return persona -> `scorer`, whether it `is_validated`, and what `strength_curve` returns.

    rows: of `eval_results.json`. verdicts: persona -> `Verdict.content()`, whose scorer is taken, but no
    judge. A persona without a scorer, or without effects of the native and the mapped vector, is left out.
    """
    if not run.config.strength_curve:
        return {}
    scorers: dict[str, str] = {}
    for persona, found in verdicts.items():
        has_effects = [
            name for name, by in found["scorers"].items() if {MAPPED, ORACLE} <= by["effects"].keys()
        ]
        if scorer := scorer_of(found, has_effects):
            scorers[persona] = scorer
    alphas = {persona: verdicts[persona]["alphas"][ORACLE] for persona in scorers}
    planned = texts_over_strengths(run, alphas)
    known = [row for row in rows if row["seed"] == run.config.seed]
    held = set(map(_place, known))  # also where a listed alpha is a multiple of the compared one
    texts, counted = generate_steered(run, [row for row in planned if _place(row) not in held], steering)
    logger.info("texts over strengths: %s", counted)
    of_texts = evaluation_rows(run, texts, run.inputs.scorer_names)
    table = results_table([*known, *score_rows(run, of_texts, run.inputs.scorer_names)[0]])
    compared = {}
    for persona, scorer in scorers.items():
        names = dict.fromkeys(_place(row)[1] for row in planned if row["persona"] == persona)
        column, by = SCORERS[scorer].column, verdicts[persona]["scorers"][scorer]
        if curve := strength_curve(table, persona, list(names), alphas[persona], column):
            compared[persona] = {"scorer": scorer, "is_validated": by["is_validated"], **curve}
    if left_out := [name for name in verdicts if name not in compared]:
        run.folder.notes.append(
            f"no strength curve of {', '.join(left_out)}: too few prompts have perplexities and, by a scorer "
            "that is no judge, scores under all of its vectors"
        )
    return compared


def texts_over_strengths(run: Run, alphas: Mapping[str, float]) -> list[Row]:
    """Return a row for each text over strengths, with those that the grid has: first prompts, first seed.

    alphas: persona -> the alpha at which the verdict compares.
    """
    names = [name for name in (ORACLE, MAPPED, *LEXICAL_CONTROLS) if name in run.config.conditions]
    cells = []
    for persona, alpha in alphas.items():
        tried = [multiple * alpha for multiple in MULTIPLES]
        for name in names:
            cells += drawn_cells(run.inputs, persona, name, vector_key(run, persona, name), tried)
    return text_rows(run.inputs, cells, run.inputs.prompts[:N_CURVE_PROMPTS], [run.config.seed])


def _place(row: Row) -> tuple[str, str, float | None]:
    return row["persona"], drawn_name(row["condition"], row["draw"]), row["alpha"]

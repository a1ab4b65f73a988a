"""Measure what stands beside an effect: what it costs plain text, and how it spreads (phase 5).

What steering costs where nobody asked for the persona: the target reads neutral passages under each steering
that a verdict compares, and unsteered. What another sample of the extraction texts would change: vectors of
resampled texts steer on development questions. What controls would do at an equal cost: the verdict compares
all conditions at one alpha, and each deciding control's worst draw writes at more alphas, until its
perplexity ratio lies around that of the mapped vector. Texts cost time, so that one seed serves there.
Nothing is decided by any of this.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor

from analysis.equal_cost import N_STEPS, Points, at_equal_cost, by_prompt, next_alpha
from analysis.extraction_spread import effect_spread
from analysis.results_table import perplexity_ratio, results_table, worst_draws
from experiment.conditions import (
    DECIDING_CONTROLS,
    MAPPED,
    SCORERS,
    TRAINED_SCORERS,
    condition_of,
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

logger = logging.getLogger(__name__)

NAME, OF_EFFECTS = "side_effects.json", "effect_spread.json"
N_QUESTIONS = 12  # development prompts on which vectors of resampled texts steer
UNSCORED = "too few texts have a score"
RESAMPLED = "_resampled_"  # between condition and number, in what such a vector is called

Control = tuple[str, str]  # (persona, drawn name)
ComparedAlphas = Mapping[str, Mapping[str, float | None]]  # persona -> condition -> alpha


def plain_text_ratios(
    run: Run, steering: SteeringVectors, alphas: ComparedAlphas
) -> dict[str, dict[str, float]]:
    """Return persona -> condition -> perplexity ratio of plain text, steered to unsteered; writes it, too.

    alphas: conditions without one are left out. For a control of several draws, the geometric mean over them.
    A vector is added at every token, whatever `steer_positions` says.
    """
    key = _key(run, alphas)
    content = run.folder.current(NAME, key) or run.folder.save(NAME, key, _measure(run, steering, alphas))
    return content["personas"]


def _key(run: Run, alphas: ComparedAlphas) -> str:
    config, target = run.config, run.inputs.target.fingerprint
    cells = [
        [persona, condition, alpha, vector_key(run, persona, condition)]
        for persona, of_persona in alphas.items()
        for condition, alpha in of_persona.items()
        if alpha is not None
    ]
    unit = [config.alpha_unit, mapping_data_key(run)]
    return fingerprint(FORMAT_VERSION, target, cells, _texts(run), unit)


def _texts(run: Run) -> list[str]:
    return [item.text for item in run.inputs.neutral_texts[:N_PLAIN_TEXTS]]


def _measure(run: Run, steering: SteeringVectors, alphas: ComparedAlphas) -> dict[str, Any]:
    texts, size = _texts(run), run.config.evaluation_batch_size
    settings = replace(GenerationSettings.of(run.inputs, steering.medians), steer_positions="all")
    cells = [
        (persona, condition, alpha, steering.vectors[persona][name])
        for persona, of_persona in alphas.items()
        for condition, alpha in of_persona.items()
        if alpha is not None
        for name in vector_names(condition)
    ]
    any_vectors = next(iter(next(iter(steering.vectors.values())).values()))
    chunks = [(texts, any_vectors, 0.0, settings, size)]
    chunks += [(texts, vectors, alpha, settings, size) for _, _, alpha, vectors in cells]
    with closing(run.executor.run("plain_perplexities", chunks)) as results:
        found = dict(results)
    logs: dict[tuple[str, str], list[float]] = {}
    for number, (persona, condition, _, _) in enumerate(cells, 1):
        if (ratio := perplexity_ratio(found[number], found[0])) is not None:
            logs.setdefault((persona, condition), []).append(math.log(ratio))
    ratios: dict[str, dict[str, float]] = {persona: {} for persona in alphas}
    for (persona, condition), values in logs.items():
        ratios[persona][condition] = math.exp(fmean(values))
    return {"n_texts": len(texts), "personas": ratios}


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
    scorers = {name: _scorer_of(found) for name, found in verdicts.items()}
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


def _scorer_of(found: Mapping[str, Any]) -> str | None:
    names = (found["decided_by"], *found["rests_on"])
    return next((name for name in names if name != "judge"), found["decided_by"])


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
        found = _scores(run, scorers[cell.persona], cell.persona, rows, unsteered)
        scores.setdefault((cell.persona, method), []).append(found)
    measured: dict[str, dict[str, Any]] = {}
    for (persona, method), found in scores.items():
        if spread := effect_spread(found):
            measured.setdefault(persona, {})[method] = spread
    return measured


def _scores(
    run: Run, scorer: str, persona: str, rows: Sequence[Row], unsteered: Sequence[Row]
) -> Sequence[float | None]:
    outputs = [row["output"] for row in rows]
    if scorer == "brevity":
        return brevity(outputs, [row["has_ended"] for row in rows], [row["output"] for row in unsteered])
    if scorer == "judge":
        described = next(each for each in run.inputs.personas if each.name == persona)
        return judged_trait(cached_judge(run), described, [row["prompt"] for row in rows], outputs)
    return run.inputs.load_scorers(scorer)[persona].score(outputs)


def compare_at_equal_cost(
    run: Run, steering: SteeringVectors, rows: Sequence[Row], verdicts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return persona -> `scorer`, and `controls`: drawn name -> `EqualCost.content()`.

    rows: of `eval_results.json`. verdicts: persona -> `Verdict.content()`, whose scorer is taken, but no
    judge. A persona without a scorer, or without an effect of the mapped vector, is left out.
    """
    if not run.config.equal_cost or MAPPED not in run.config.conditions:
        return {}
    scorers = {name: scorer for name, found in verdicts.items() if (scorer := _trained_scorer_of(found))}
    known = [row for row in rows if row["seed"] == run.config.seed]
    tried: dict[Control, list[float]] = {
        (persona, name): [verdicts[persona]["alphas"][MAPPED]]
        for persona, scorer in scorers.items()
        for name in _worst(verdicts[persona]["scorers"][scorer]["effects"])
    }
    for _ in range(N_STEPS):
        points = _points(known, tried, scorers)
        asked = {
            control: alpha
            for control, found in points.items()
            if control[1] != MAPPED
            and (alpha := next_alpha(found, _only(points[control[0], MAPPED]))) is not None
        }
        if not asked:
            break
        # A listed alpha may be one that the grid has.
        held = {(row["persona"], drawn_name(row["condition"], row["draw"]), row["alpha"]) for row in known}
        if new := {control: alpha for control, alpha in asked.items() if (*control, alpha) not in held}:
            known += _written(run, steering, new)
        for control, alpha in asked.items():
            tried[control].append(alpha)
    points = _points(known, tried, scorers)
    compared: dict[str, dict[str, Any]] = {}
    for (persona, name), found in points.items():
        if name != MAPPED and (equal := at_equal_cost(found, _only(points[persona, MAPPED]))):
            of_persona = compared.setdefault(persona, {"scorer": scorers[persona], "controls": {}})
            of_persona["controls"][name] = equal.content()
    return compared


def most_texts(run: Run) -> int:
    """Return how many texts the comparison writes at most."""
    kinds = [name for name in DECIDING_CONTROLS if name in run.config.conditions]
    n_controls = len(kinds) * len(run.config.persona_names) * run.config.equal_cost
    return n_controls * N_STEPS * len(run.inputs.prompts)


def _trained_scorer_of(found: Mapping[str, Any]) -> str | None:
    """Return the scorer that decided a verdict, else the first that has effects; no judge, which costs."""
    names = [name for name in (found["decided_by"], *found["scorers"]) if name and name != "judge"]
    return next((name for name in names if MAPPED in found["scorers"][name]["effects"]), None)


def _worst(effects: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the mapped vector, and of each deciding control the draw with the largest effect."""
    worst = worst_draws({name: each["estimate"] for name, each in effects.items()})
    return [MAPPED, *(name for condition, name in worst.items() if condition in DECIDING_CONTROLS)]


def _points(
    rows: Sequence[Row], tried: Mapping[Control, Sequence[float]], scorers: Mapping[str, str]
) -> dict[Control, Points]:
    """Return (persona, drawn name) -> alpha -> effects and log ratios by prompt."""
    table = results_table(rows)
    columns = {persona: SCORERS[scorer].column for persona, scorer in scorers.items()}
    return {
        (persona, name): {alpha: by_prompt(table, persona, name, alpha, columns[persona]) for alpha in alphas}
        for (persona, name), alphas in tried.items()
    }


def _only(points: Points) -> Any:
    (found,) = points.values()
    return found


def _written(run: Run, steering: SteeringVectors, asked: Mapping[Control, float]) -> list[Row]:
    """Return the scored texts of controls at an alpha each, of the run's first seed."""
    cells = [
        cell
        for (persona, name), alpha in asked.items()
        for condition in (condition_of(name),)
        for cell in drawn_cells(run.inputs, persona, condition, vector_key(run, persona, condition), [alpha])
        if drawn_name(cell.condition, cell.draw) == name
    ]
    planned = text_rows(run.inputs, cells, run.inputs.prompts, [run.config.seed])
    texts, counted = generate_steered(run, planned, steering)
    logger.info("controls at an equal cost: %s", counted)
    names = run.inputs.scorer_names
    return score_rows(run, evaluation_rows(run, texts, names), names)[0]

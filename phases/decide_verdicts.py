"""Decide what a run comes to: verdicts at comparable alphas, tables for other programs, figures (phase 5)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from analysis.checklist import check_lambda, effect_check_name, failures
from analysis.results_table import Alphas, effects_table, results_table
from analysis.side_effects import largest_off_target, off_target
from analysis.success_criteria import success
from analysis.verdict import decide_verdicts
from evaluation import aggregated_tables
from experiment.conditions import CONDITIONS, IDENTITIES
from experiment.plan import Row, SteeringVectors, rows_key
from experiment.run import Run
from phases.check_setup import PREFLIGHT
from phases.choose_alphas import compared_alphas, unreadable_personas
from phases.converse import converse
from phases.fit_maps import CV_RESULTS
from phases.side_effects import (
    compare_strengths,
    measure_capability,
    plain_text_ratios,
    resampled_effects,
)
from reporting.figures_headline import headline_figure
from reporting.figures_results import (
    coherence_trait_figure,
    off_target_figure,
    strength_curve_figure,
)
from reporting.style import draw_or_remove, save_figure
from reporting.tables import (
    format_capability,
    format_headed,
    format_recoveries,
    format_success,
    format_verdicts,
    strength_tables,
    turn_tables,
    verdict_sentence,
)
from scoring.trait_scorer import auc_notes
from support.artifacts import fingerprint, save_text

logger = logging.getLogger(__name__)


def aggregate_scores(run: Run, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return metrics by condition, persona and alpha; writes `aggregated_results.json` and figure 1."""
    key, tables = rows_key(rows), aggregated_tables(rows)
    run.folder.save("aggregated_results.json", key, tables)
    table = tables["conditions"]
    save_figure(coherence_trait_figure(table), run.folder.path / "figure1.png", key)
    return table


def decide(
    run: Run,
    rows: Sequence[Row],
    steering: SteeringVectors,
    validation: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Return what `verdict.json` holds, and write it with its tables and figures.

    rows: of `eval_results.json`. validation: what `validate_scorers` returned.
    """
    table, checks = results_table(rows), _preflight(run)
    alphas = _alphas(run)
    unreadable = unreadable_personas(run)
    not_controls = _not_controls(run)
    personas = _verdicts(table, alphas, validation, checks, unreadable, not_controls)
    spread = resampled_effects(run, steering, personas)
    strengths = compare_strengths(run, steering, rows, personas)
    turns = converse(run, steering, personas)
    content = {
        "personas": _explained(personas, spread),
        "strength_curve": strengths,
        "turns": turns,
        "validation": validation,
        "plain_text_perplexity_ratios": plain_text_ratios(run, steering, alphas),
        "success": success(table, alphas),
    }
    key = fingerprint(rows_key(rows), validation, checks, spread, unreadable, not_controls, strengths, turns)
    content = run.folder.save("verdict.json", key, content)
    capability = measure_capability(run, steering, personas)
    save_text(run.folder.path / "results.csv", table.to_csv(index=False))
    save_text(run.folder.path / "effects.csv", effects_table(content, table).to_csv(index=False))
    headline = headline_figure(content["personas"], table, not_controls)
    save_figure(headline, run.folder.path / "headline.png", rows_key(rows))
    matrix = off_target(table, alphas, validation)
    draw_or_remove(run.folder.path / "off_target.png", off_target_figure, matrix)
    draw_or_remove(run.folder.path / "strength_curve.png", strength_curve_figure, strengths)
    if content["success"]:
        logger.info("judged\n\n%s\n", format_success(content["success"]))
    if strengths:
        logger.info("over strengths\n\n%s\n", format_headed(strength_tables(strengths)))
    if capability:
        logger.info("questions answered right\n\n%s\n", format_capability(capability))
    if turns:
        logger.info("over turns\n\n%s\n", format_headed(turn_tables(turns)))
    logger.info("recovery, * not validated\n\n%s\n", format_recoveries(content["personas"]))
    logger.info("verdict\n\n%s\n", format_verdicts(content["personas"]))
    return content


def _alphas(run: Run) -> Alphas:
    """Return persona -> condition -> the alpha at which the verdict compares, None without a vector."""
    steered = run.config.steered_conditions
    return {
        name: {condition: alpha if condition in steered else None for condition in run.config.conditions}
        for name, alpha in compared_alphas(run).items()
    }


def _verdicts(
    table: pd.DataFrame,
    alphas: Alphas,
    validation: Mapping[str, Mapping[str, Mapping[str, Any]]],
    checks: Sequence[Mapping[str, Any]],
    unreadable: Mapping[str, str],
    not_controls: Sequence[str],
) -> dict[str, Any]:
    """Return persona -> its verdict as JSON holds it, with what else its mapped vector changes most.

    source_vector: whether the persona's vector works in the source itself.
    """
    others = largest_off_target(off_target(table, alphas, validation))
    status = {check["name"]: check["status"] for check in checks}
    return {
        name: verdict.content()
        | {"source_vector": status.get(effect_check_name("source", name)), "off_target": others.get(name)}
        for name, verdict in decide_verdicts(table, alphas, validation, unreadable, not_controls).items()
    }


def _explained(verdicts: Mapping[str, Any], spread: Mapping[str, Any]) -> dict[str, Any]:
    """Return the verdicts with how far another sample of the extraction texts moves effects, and why."""
    contents = {name: found | {"extraction_spread": spread.get(name)} for name, found in verdicts.items()}
    return {name: content | {"why": verdict_sentence(content)} for name, content in contents.items()}


def _not_controls(run: Run) -> list[str]:
    """Return the conditions that leave the source's vector as it is; it is noted, also of a single model."""
    source, target = run.inputs.sides
    found = [
        name for name in IDENTITIES if name in run.config.conditions and source.d_model == target.d_model
    ]
    if found:
        labels = " and ".join(CONDITIONS[name].label for name in found)
        run.folder.notes.append(
            f"source and target are equally wide, so that {labels} leave the vector as it is: a transfer "
            "without a map, which mapped need not beat"
        )
    if source.fingerprint == target.fingerprint:
        run.folder.notes.append(
            "source and target are one model: this checks the tool. Mapped vectors should do as much as "
            "native ones, and that they are text-borne cannot be excluded"
        )
    return found


def _preflight(run: Run) -> list[dict[str, Any]]:
    """Return the checks that phase 1 made, none if it has not run."""
    done = PREFLIGHT.load(run)
    return done["checks"] if done else []


def closing_notes(run: Run, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a run is to end with: failed checks, a lambda at the edge, weak or borrowed scorers.

    table: what `evaluation.aggregate` returns.
    """
    with run.at_pair(run.inputs.middle_pair) as at_pair:
        results = CV_RESULTS.load(at_pair)
    checks = [*_preflight(run), asdict(check_lambda(run.config.lambda_values, results))]
    aucs = {entry["persona"]: entry["classifier_auc"] for entry in table}
    failed = [f"preflight: {failure}" for failure in failures(checks)]
    return [*failed, *auc_notes(aucs), *run.inputs.notes]

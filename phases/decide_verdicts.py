"""What a run comes to: the verdict at comparable alphas, tables for other programs, figures (phase 5)."""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from analysis.success_criteria import format_success, success
from analysis.verdict import MAPPED, ORACLE, format_verdicts, verdicts
from evaluation import aggregate
from experiment.inputs import Inputs
from experiment.plan import Row, mapping_fingerprint, personas_fingerprint, preflight_fingerprint
from experiment.structures import expected
from phases import check_setup as preflight
from phases.make_vectors import SteeringVectors
from phases.side_effects import side_effects
from phases.validate_scorers import format_validation, validated_scorers
from reporting.figures import effect_perplexity_figure, off_target_figure, recovery_figure, save_figure
from scoring.trait_classifier import auc_notes
from support.artifacts import fingerprint, save_text
from support.run_folder import RunFolder

logger = logging.getLogger(__name__)


def conclude(
    inputs: Inputs, folder: RunFolder, executor: Any, rows: Sequence[Row], cache_key: str
) -> dict[str, Any]:
    """Return what `verdict.json` holds, and write it with its tables and figures.

    rows: of `eval_results.json`. cache_key: their fingerprint.
    """
    made_vectors = personas_fingerprint(inputs)
    name = "persona_vectors.pt"
    steering = SteeringVectors.from_content(folder.required(name, made_vectors, 3, expected(name, inputs)))
    validation = validated_scorers(inputs, folder, executor, steering, rows)
    alphas, same = compared_alphas(inputs, rows), oracle_alphas(inputs, rows)
    found = verdicts(rows, alphas, validation)
    content = {
        "personas": found,
        "at_oracle_alpha": verdicts(rows, same, validation),
        "validation": validation,
        "side_effects": side_effects(inputs, folder, executor, steering, alphas),
        "success": success(rows, alphas),
    }
    folder.save("verdict.json", fingerprint(cache_key, validation), content)
    save_text(folder.path / "results.csv", results_frame(rows).to_csv(index=False))
    save_text(folder.path / "effects.csv", effects_frame(content, rows).to_csv(index=False))
    save_figure(recovery_figure(found), folder.path / "recovery.png", cache_key)
    if matrix := off_target(rows, alphas):
        save_figure(off_target_figure(matrix), folder.path / "off_target.png", cache_key)
    if curves := strength_curves(rows, inputs.config.persona_names):
        save_figure(effect_perplexity_figure(curves), folder.path / "effect_perplexity.png", cache_key)
    logger.info("scorers\n\n%s\n", format_validation(validation))
    if content["success"]:
        logger.info("judged\n\n%s\n", format_success(content["success"]))
    if same:
        logger.info("at the oracle's dose\n\n%s\n", format_verdicts(content["at_oracle_alpha"]))
    logger.info("verdict\n\n%s\n", format_verdicts(found))
    return content


def compared_alphas(inputs: Inputs, rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Return persona -> condition -> the alpha at which the verdict compares.

    Where conditions have alphas of their own, searched or given, that one. Else the strongest one at which the
    oracle is within the bound of `alpha_search.max_perplexity_ratio`, by perplexity_ratio alone, or the weakest if none is.
    """
    chosen: dict[str, dict[str, float | None]] = {}
    for persona in inputs.config.persona_names:
        alphas = _alphas(rows, persona)
        if inputs.config.has_alphas_by_method(persona):
            chosen[persona] = {condition: values[0] for condition, values in alphas.items()}
            continue
        common = _strongest_coherent(inputs, rows, persona, alphas.get(ORACLE, []))
        chosen[persona] = {
            condition: common if common in values else values[0] for condition, values in alphas.items()
        }
    return chosen


def oracle_alphas(inputs: Inputs, rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Return the same with every condition at the oracle's dose, of personas whose methods have their own."""
    if ORACLE not in inputs.config.methods:
        return {}
    chosen = {}
    for persona in filter(inputs.config.has_alphas_by_method, inputs.config.persona_names):
        alphas = _alphas(rows, persona)
        chosen[persona] = {
            condition: alphas[ORACLE][0] if alphas[ORACLE][0] in values else values[0]
            for condition, values in alphas.items()
        }
    return chosen


def _alphas(rows: Sequence[Row], persona: str) -> dict[str, list[float | None]]:
    """Return condition -> its alphas, in the order of the rows."""
    alphas: dict[str, dict[float | None, None]] = {}
    for row in rows:
        if row["persona"] == persona and row["condition"] != "baseline":
            alphas.setdefault(row["condition"], {})[row["alpha"]] = None
    return {condition: list(found) for condition, found in alphas.items()}


def _strongest_coherent(
    inputs: Inputs, rows: Sequence[Row], persona: str, alphas: Sequence[float | None]
) -> float | None:
    coherent = [
        alpha
        for alpha in alphas
        if (ratio := perplexity_ratio(rows, persona, ORACLE, alpha)) is not None
        and ratio <= inputs.config.alpha_search.max_perplexity_ratio
    ]
    if coherent:
        return max(coherent, key=abs)
    return min(alphas, key=abs) if alphas else None


def closing_notes(inputs: Inputs, folder: RunFolder, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a run is to end with: failed checks, a lambda at the edge, weak classifiers.

    table: what `evaluation.aggregate` returns.
    """
    name = "preflight.json"
    done = folder.left(name, preflight_fingerprint(inputs), expected(name, inputs))
    checks = done["checks"] if done else []
    name = "cv_results.json"
    results = folder.left(name, mapping_fingerprint(inputs), expected(name, inputs))
    checks = [*checks, asdict(preflight.check_lambda(inputs.config.lambda_values, results))]
    aucs = {entry["persona"]: entry["classifier_auc"] for entry in table}
    return [*preflight.failures(checks), *auc_notes(aucs)]


def perplexity_ratio(rows: Sequence[Row], persona: str, condition: str, alpha: float | None) -> float | None:
    """Return the geometric mean of the independent perplexity over the unsteered texts', or None."""
    means = []
    for cell in ((persona, condition, alpha), (persona, "baseline", None)):
        values = [
            row["independent_perplexity"]
            for row in rows
            if (row["persona"], row["condition"], row["alpha"]) == cell and row["independent_perplexity"]
        ]
        if not values:
            return None
        means.append(statistics.fmean(map(math.log, values)))
    return math.exp(means[0] - means[1])


def results_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return a row for each text and persona, with all scores."""
    flat = []
    for row in rows:
        scores = row.get("trait_probabilities") or {}
        plain = {key: value for key, value in row.items() if key != "trait_probabilities"}
        flat.append({**plain, **{f"scored_as_{name}": value for name, value in scores.items()}})
    return pd.DataFrame(flat)


def effects_frame(verdict: Mapping[str, Any], rows: Sequence[Row]) -> pd.DataFrame:
    """Return a row for each persona, scorer and condition: effect, interval, recovery, p and perplexity_ratio.

    verdict: what `verdict.json` holds. dose: `judged`, or `the oracle's` where it was tried beside it.
    perplexity_ratio: perplexity_ratio to the texts. plain_perplexity_ratio: to reading plain text, see `side_effects`.
    rate_raw, share, share_low, share_high: of texts that show the trait, as the scorer sees it, and
    corrected for its errors.
    """
    table = []
    for dose, key in (("judged", "personas"), ("the oracle's", "at_oracle_alpha")):
        for persona, of_persona in verdict.get(key, {}).items():
            for scorer, decided in of_persona["scorers"].items():
                for condition in decided["effects"]:
                    plain = verdict.get("side_effects", {}).get(persona, {}).get(condition)
                    row = _effects_row(persona, of_persona, scorer, condition, rows)
                    table.append(
                        {
                            **row,
                            "alpha_search": dose,
                            "plain_perplexity_ratio": plain if dose == "judged" else None,
                        }
                    )
    return pd.DataFrame(table)


def _effects_row(
    persona: str, of_persona: Mapping[str, Any], scorer: str, condition: str, rows: Sequence[Row]
) -> dict[str, Any]:
    decided, alpha = of_persona["scorers"][scorer], of_persona["alphas"][condition]
    effect = decided["effects"][condition]
    recovered = (decided.get("recovery") or {}) if condition == MAPPED else {}
    share = decided.get("shares", {}).get(condition, {})
    corrected = share.get("corrected") or {}
    return {
        "persona": persona,
        "scorer": scorer,
        "is_validated": decided["is_validated"],
        "condition": condition,
        "alpha": alpha,
        "n_prompts": decided["n_prompts"],
        "effect": effect["estimate"],
        "low": effect["low"],
        "high": effect["high"],
        "anti_steered": effect["anti_steered"],
        "p_mapped_over_it": effect["p_mapped_over_it"],
        "recovery": recovered.get("estimate"),
        "recovery_low": recovered.get("low"),
        "recovery_high": recovered.get("high"),
        "rate_raw": share.get("seen"),
        "share": corrected.get("estimate"),
        "share_low": corrected.get("low"),
        "share_high": corrected.get("high"),
        "perplexity_ratio": perplexity_ratio(rows, persona, condition, alpha),
        "verdict": of_persona["verdict"],
    }


def strength_curves(
    rows: Sequence[Row], personas: Sequence[str]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return persona -> condition -> points {alpha, perplexity_ratio, effect, low, high} by dose, by the classifier.

    Conditions that were steered at two alphas or more, with the mapped vector and the oracle to compare them
    with, and points with both numbers.
    """
    by_cell = {(each["persona"], each["condition"], each["alpha"]): each for each in aggregate(rows)}
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for persona in personas:
        by_condition = _alphas(rows, persona)
        shown = {condition for condition, alphas in by_condition.items() if len(alphas) > 1}
        for condition, alphas in by_condition.items():
            if condition not in shown and not (shown and condition in (MAPPED, ORACLE)):
                continue
            points = []
            for alpha in sorted(alphas, key=abs):
                change = by_cell[persona, condition, alpha]["trait_change"]
                cost = perplexity_ratio(rows, persona, condition, alpha)
                if cost is not None and change["mean"] is not None:
                    ends = {end: change[end] for end in ("low", "high")}
                    points.append(
                        {"alpha": alpha, "perplexity_ratio": cost, "effect": change["mean"], **ends}
                    )
            if points:
                curves.setdefault(persona, {})[condition] = points
    return curves


def off_target(
    rows: Sequence[Row], alphas: Mapping[str, Mapping[str, float | None]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return method -> persona steered for -> persona scored as -> mean change against unsteered.

    For `ridge_mapped` and `oracle`, by the classifiers; personas without one are left out.
    """
    means: dict[tuple, list[dict[str, float | None]]] = {}
    for row in rows:
        means.setdefault((row["persona"], row["condition"], row["alpha"]), []).append(
            row.get("trait_probabilities") or {}
        )

    def mean(cell: tuple, scored: str) -> float | None:
        values = [found[scored] for found in means.get(cell, []) if found.get(scored) is not None]
        return statistics.fmean(values) if values else None

    table: dict[str, dict[str, dict[str, float]]] = {}
    for method in (MAPPED, ORACLE):
        for persona, of_persona in alphas.items():
            if method not in of_persona:
                continue
            for scored in alphas:
                steered = mean((persona, method, of_persona[method]), scored)
                unsteered = mean((persona, "baseline", None), scored)
                if steered is not None and unsteered is not None:
                    table.setdefault(method, {}).setdefault(persona, {})[scored] = steered - unsteered
    return table


def main() -> None:
    """Check perplexity_ratio and the table of effects on made-up rows."""
    common = {"persona": "check", "alpha": None, "independent_perplexity": 10.0}
    rows = [{**common, "condition": "baseline"}]
    rows += [{**common, "condition": ORACLE, "alpha": 1.0, "independent_perplexity": 20.0}]
    assert math.isclose(perplexity_ratio(rows, "check", ORACLE, 1.0), 2)
    print("outcome OK: twice the perplexity is twice the perplexity_ratio")


if __name__ == "__main__":
    main()

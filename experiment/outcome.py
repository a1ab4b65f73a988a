"""What a run comes to: licences of the scorers, the verdict, tables for other programs (phase 5)."""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pandas as pd

from experiment.development import write_development
from experiment.figures import off_target_figure, recovery_figure, save_figure
from experiment.grid import UNSTEERED, Cell, Row, licences_fingerprint, personas_fingerprint
from experiment.inputs import Inputs
from experiment.journalled import asked_judge
from experiment.structures import expected
from experiment.success import format_success, success
from experiment.transfers import SteeringVectors
from experiment.verdict import ORACLE, format_verdicts, verdicts
from scoring.examination import Sets, at_most, examination_sets, examine
from scoring.gpt_judge import trait_prompt
from scoring.paid_once import PaidOnce
from support.artifacts import fingerprint, save_text
from support.run_folder import RunFolder
from support.vocabulary import RANDOM_DRAWS, random_name
from texts.personas import Persona, load_prompts

logger = logging.getLogger(__name__)

BRIEF = {"is_licensed": True, "problems": [], "measure": "length, which needs no licence"}
N_SEEDS = 2  # unsteered texts to a development prompt, for the examination
JUDGED_A_SIDE = 24  # texts of a set that a judge is examined on
JUDGE_DECIDES = 0.4999  # of its scale as 0 to 1: 3, "clearly present in parts", is the trait
TOO_STRONG = 3.0  # times the strongest dose, at which random directions break text


def conclude(
    inputs: Inputs, folder: RunFolder, executor: Any, rows: Sequence[Row], made_from: str
) -> dict[str, Any]:
    """Return what `verdict.json` holds, and write it with its tables and figures.

    rows: of `eval_results.json`. made_from: their fingerprint.
    """
    licences = examined_scorers(inputs, folder, executor, rows)
    doses = judged_doses(inputs, rows)
    found = verdicts(rows, doses, licences)
    content = {"personas": found, "licences": licences, "success": success(rows, doses)}
    folder.save("verdict.json", fingerprint(made_from, licences), content)
    save_text(folder.path / "results.csv", results_frame(rows).to_csv(index=False))
    save_text(folder.path / "effects.csv", effects_frame(found, rows).to_csv(index=False))
    save_figure(recovery_figure(found), folder.path / "recovery.png", made_from)
    matrix = off_target(rows, doses)
    if matrix:
        save_figure(off_target_figure(matrix), folder.path / "off_target.png", made_from)
    logger.info("scorers\n\n%s\n", format_licences(licences))
    if content["success"]:
        logger.info("judged\n\n%s\n", format_success(content["success"]))
    logger.info("verdict\n\n%s\n", format_verdicts(found))
    return content


def examined_scorers(
    inputs: Inputs, folder: RunFolder, executor: Any, rows: Sequence[Row]
) -> dict[str, dict[str, Any]]:
    """Return persona -> scorer -> what its examination found, unless an earlier run has."""
    name, made_from = "scorer_licences.json", licences_fingerprint(inputs)
    content = folder.current(name, made_from, expected(name, inputs))
    if content is None:
        judge = asked_judge(inputs, folder)
        has_scorers = inputs.classifiers or inputs.likelihood_ratios or judge
        unsteered, steered = _development_texts(inputs, folder, executor, rows) if has_scorers else ([], [])
        ordinary = load_prompts("ordinary_examination")
        found: dict[str, dict[str, Any]] = {}
        for persona in inputs.personas:
            others = [other for other in inputs.labelled_personas if other.name != persona.name]
            sets = examination_sets(persona, others, ordinary, unsteered, steered)
            scorers = {
                "classifier": inputs.classifiers.get(persona.name),
                "likelihood_ratio": inputs.likelihood_ratios.get(persona.name),
            }
            found[persona.name] = {
                kind: examine(scorer.score, sets, scorer.decision_point)
                for kind, scorer in scorers.items()
                if scorer
            }
            if judge:
                found[persona.name]["judge"] = _examined_judge(judge, persona, at_most(sets, JUDGED_A_SIDE))
        content = folder.save(name, made_from, {"personas": found})
    licences = content["personas"]
    return {
        persona.name: {
            **licences.get(persona.name, {}),
            **({"brevity": BRIEF} if persona.direct_measure == "brevity" and inputs.asks_questions else {}),
        }
        for persona in inputs.personas
    }


def _examined_judge(judge: PaidOnce, persona: Persona, sets: Sets) -> dict[str, Any]:
    """Return what a judge's examination found, and by how much its second word on a text differs."""

    def asked(text: str) -> str:
        return trait_prompt(persona.name, persona.description, persona.eval_prompt, "", text)

    def score(texts: Sequence[str]) -> list[float | None]:
        judged = judge.judge(list(map(asked, texts)))
        return [None if each.score is None else (each.score - 1) / 4 for each in judged]

    examined = examine(score, sets, JUDGE_DECIDES)
    whole = [asked(text) for sides in islice(sets.values(), 1) for side in sides for text in side[:10]]
    return {**examined, "repeat_noise": judge.repeat_noise(whole)}


def _development_texts(
    inputs: Inputs, folder: RunFolder, executor: Any, rows: Sequence[Row]
) -> tuple[list[str], list[str]]:
    """Return texts on development prompts: unsteered, and steered by random directions far too strong."""
    name = "persona_vectors.pt"
    made_from = personas_fingerprint(inputs)
    steering = SteeringVectors.from_content(folder.required(name, made_from, 3, expected(name, inputs)))
    alpha = TOO_STRONG * max((abs(row["alpha"]) for row in rows if row["alpha"] is not None), default=1.0)
    persona = inputs.personas[0].name
    cells = [
        Cell(random_name(draw), persona, alpha, fingerprint("random", made_from, draw))
        for draw in range(RANDOM_DRAWS)
    ]
    unsteered = write_development(
        inputs, folder, executor, [UNSTEERED], steering.vectors, steering.medians, N_SEEDS
    )[0]
    by_cell = write_development(inputs, folder, executor, cells, steering.vectors, steering.medians)
    steered = [row for number, rows in enumerate(by_cell) for row in rows[number::RANDOM_DRAWS]]
    return [row["output"] for row in unsteered], [row["output"] for row in steered]


def judged_doses(inputs: Inputs, rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Return persona -> condition -> the alpha at which the verdict compares.

    Where doses were searched, each condition's own. Else the strongest one at which the oracle is within
    the bound of `dose.max_perplexity_ratio`, by harm alone, or the weakest if none is.
    """
    chosen: dict[str, dict[str, float | None]] = {}
    for persona in inputs.config.persona_names:
        alphas: dict[str, list[float | None]] = {}
        for row in rows:
            if row["persona"] == persona and row["condition"] != "baseline":
                of_condition = alphas.setdefault(row["condition"], [])
                if row["alpha"] not in of_condition:
                    of_condition.append(row["alpha"])
        common = _strongest_coherent(inputs, rows, persona, alphas.get(ORACLE, []))
        chosen[persona] = {
            condition: common if common in values else values[0] for condition, values in alphas.items()
        }
    return chosen


def _strongest_coherent(
    inputs: Inputs, rows: Sequence[Row], persona: str, alphas: Sequence[float | None]
) -> float | None:
    coherent = [
        alpha
        for alpha in alphas
        if (ratio := harm(rows, persona, ORACLE, alpha)) is not None
        and ratio <= inputs.config.dose.max_perplexity_ratio
    ]
    if coherent:
        return max(coherent, key=abs)
    return min(alphas, key=abs) if alphas else None


def harm(rows: Sequence[Row], persona: str, condition: str, alpha: float | None) -> float | None:
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


def effects_frame(found: Mapping[str, Any], rows: Sequence[Row]) -> pd.DataFrame:
    """Return a row for each persona, scorer and condition: effect, interval, recovery, p and harm."""
    table = []
    for persona, of_persona in found.items():
        for scorer, decided in of_persona["scorers"].items():
            recovered = decided.get("recovery") or {}
            for condition, effect in decided["effects"].items():
                alpha = of_persona["doses"][condition]
                is_mapped = condition == "ridge_mapped"
                table.append(
                    {
                        "persona": persona,
                        "scorer": scorer,
                        "is_licensed": decided["is_licensed"],
                        "condition": condition,
                        "alpha": alpha,
                        "n_prompts": decided["n_prompts"],
                        "effect": effect["estimate"],
                        "low": effect["low"],
                        "high": effect["high"],
                        "wrong_way": effect["wrong_way"],
                        "p_mapped_over_it": effect["p_mapped_over_it"],
                        "recovery": recovered.get("estimate") if is_mapped else None,
                        "recovery_low": recovered.get("low") if is_mapped else None,
                        "recovery_high": recovered.get("high") if is_mapped else None,
                        "perplexity_ratio": harm(rows, persona, condition, alpha),
                        "verdict": of_persona["verdict"],
                    }
                )
    return pd.DataFrame(table)


def off_target(
    rows: Sequence[Row], doses: Mapping[str, Mapping[str, float | None]]
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
    for method in ("ridge_mapped", ORACLE):
        for persona, of_persona in doses.items():
            if method not in of_persona:
                continue
            for scored in doses:
                steered = mean((persona, method, of_persona[method]), scored)
                unsteered = mean((persona, "baseline", None), scored)
                if steered is not None and unsteered is not None:
                    table.setdefault(method, {}).setdefault(persona, {})[scored] = steered - unsteered
    return table


def format_licences(licences: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a line for each scorer of each persona: its licence, or what costs it."""
    lines = []
    for persona, by_scorer in licences.items():
        for scorer, found in by_scorer.items():
            if found.get("auc"):
                lowest = min(found["auc"], key=found["auc"].get)
                rates = [found[name]["n_right"] / found[name]["n"] for name in ("sensitivity", "specificity")]
                detail = f"lowest AUC {found['auc'][lowest]:.2f} ({lowest}), sensitivity {rates[0]:.0%}, "
                detail += f"specificity {rates[1]:.0%}"
                if found.get("repeat_noise") is not None:
                    detail += f", a second draw differs by {found['repeat_noise']:.2f} of 1 to 5"
            else:
                detail = found.get("measure", "not examined")
            word = "licensed" if found["is_licensed"] else f"UNLICENSED ({'; '.join(found['problems'])})"
            lines.append(f"{persona}, {scorer}: {word}; {detail}")
        if not by_scorer:
            lines.append(f"{persona}: no scorer")
    return "\n".join(lines)


def main() -> None:
    """Check harm and the table of effects on made-up rows."""
    common = {"persona": "check", "alpha": None, "independent_perplexity": 10.0}
    rows = [{**common, "condition": "baseline"}]
    rows += [{**common, "condition": ORACLE, "alpha": 1.0, "independent_perplexity": 20.0}]
    assert math.isclose(harm(rows, "check", ORACLE, 1.0), 2)
    print("outcome OK: twice the perplexity is twice the harm")


if __name__ == "__main__":
    main()

"""Write `report.html`: a finished run as one page that opens from disk and asks nothing of a network.

It is made from the artifacts of the output directory alone, after phase 5 or by `--report FOLDER`. All text
of models, personas and files is escaped; the page's policy forbids it to load anything.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.results_table import cell_perplexity_ratio, results_table, worst_draws
from experiment.conditions import MAPPED, ORACLE, SCORERS, UNSTEERED, drawn_name, label_of
from reporting.tables import (
    COVERED,
    alone,
    capability_rows,
    cosine_rows,
    detection_rows,
    detection_sentence,
    interval,
    lowest_auc,
    maps_rows,
    number,
    p_value,
    percent,
    protocol_rows,
    recovery_rows,
    spread_rows,
    strength_tables,
    turn_tables,
    verdict_sentence,
)
from support.artifacts import load_json, load_tensors, save_text
from support.run_folder import load_finished
from support.vocabulary import model_name

FIRST_SHOWN = (UNSTEERED, MAPPED, ORACLE)
NEEDED = ("config.json", "eval_results.json", "verdict.json", "preflight.json", "protocol.json")
VECTORS, SPREAD = "persona_vectors.pt", "extraction_spread.json"
CAPABILITY, DETECTION = "capability.json", "detection.json"
# The licences of what is fetched from packages; for other models, see their cards.
LICENCES = {
    "smollm2-135m-instruct": "Apache 2.0",
    "gemma-3-270m": "Gemma terms of use",
    "wikipedia-sample": "CC BY-SA",
}


Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header, rows


def write_report(folder: Path) -> Path:
    """Write the report of a finished run into its folder and return its path.

    Raises InputError: a folder without the artifacts of a finished run.
    """
    config, results, verdict, checked, protocol = load_finished(folder, *NEEDED, others=(VECTORS,))
    rows, vectors = results["rows"], load_tensors(folder / VECTORS)
    has_spread = config.get("extraction_resamples") and (folder / SPREAD).is_file()
    capability = load_capability(folder, config)
    detection = load_json(folder / DETECTION)["personas"] if (folder / DETECTION).is_file() else {}
    page = render_page(
        "report.html.j2",
        config=config,
        n_prompts=len({row["prompt_idx"] for row in rows}),
        n_seeds=len({row["seed"] for row in rows}),
        n_texts=len(rows),
        covered=COVERED,
        verdicts=verdict["personas"],
        note=alone,
        why=verdict_sentence,
        recoveries=_recoveries(verdict["personas"]),
        recovered=recovery_rows(verdict["personas"]),
        strengths=strength_tables(verdict["strength_curve"]),
        detected=detection_rows(detection),
        detection=detection_sentence(detection),
        turns=turn_tables(verdict.get("turns", {})),
        protocol=protocol_rows(protocol),
        figures={path.stem: encoded(path) for path in folder.glob("*.png")},
        effects=_effects_tables(verdict, rows),
        capability=capability_rows(capability) if capability else None,
        n_questions=capability.get("n_questions"),
        maps=maps_rows([*load_json(folder / "cv_results.json")["maps"], *vectors["control_maps"]]),
        cosines=cosine_rows(vectors["personas"]),
        layers=_layers_table(folder, vectors["layer_pairs"]),
        spread=spread_rows(load_json(folder / SPREAD)["personas"]) if has_spread else None,
        validation=_validation_table(verdict["validation"]),
        checks=_checks_table(checked["checks"]),
        provenance=_provenance(folder, config, checked["environment"]),
        configuration=json.dumps(config, indent=2, ensure_ascii=False),
        texts=texts_data(rows),
    )
    path = folder / "report.html"
    save_text(path, page)
    return path


def render_page(template: str, **content: Any) -> str:
    """Return a page of a template of this folder, in which all text of the content is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template(template).render(content)


def encoded(path: Path) -> str:
    """Return a file in the letters in which a page holds it."""
    return b64encode(path.read_bytes()).decode()


def load_capability(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `capability.json` holds; empty where a run has asked no questions."""
    is_asked = config.get("n_capability_questions") and (folder / CAPABILITY).is_file()
    return load_json(folder / CAPABILITY) if is_asked else {}


def texts_data(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the text browser reads: cells, places (prompt and seed), and their texts."""
    personas = list(dict.fromkeys(row["persona"] for row in rows))
    prompts = {row["prompt_idx"]: row["prompt"] for row in rows}
    indices = sorted(prompts)
    places = sorted({(indices.index(row["prompt_idx"]), row["seed"]) for row in rows})
    cells: dict[tuple, list[dict[str, Any] | None]] = {}
    for row in rows:
        # An unsteered text has a row for each persona, with the same scores in all of them.
        persona = None if row["condition"] == UNSTEERED else personas.index(row["persona"])
        name = drawn_name(row["condition"], row.get("draw"))
        texts = cells.setdefault((name, persona, row["alpha"]), [None] * len(places))
        traits = [row["trait_probabilities"].get(name) for name in personas]
        perplexity = row["independent_perplexity"]
        texts[places.index((indices.index(row["prompt_idx"]), row["seed"]))] = {
            "output": row["output"],
            "traits": [None if trait is None else round(trait, 4) for trait in traits],
            "perplexity": row["perplexity"] if perplexity is None else perplexity,
        }
    listed = [
        {
            "condition": name,
            "persona": persona,
            "label": label_of(name) + ("" if alpha is None else f" (α {alpha:.3g})"),
            "first": position * len(places),
        }
        for position, (name, persona, alpha) in enumerate(cells)
    ]
    return {
        "personas": personas,
        "prompts": [prompts[index] for index in indices],
        "places": places,
        "cells": listed,
        "texts": [text for texts in cells.values() for text in texts],
        "first": FIRST_SHOWN,
    }


def _recoveries(personas: Mapping[str, Any]) -> str:
    recoveries = [
        f"{persona} {percent(decided['recovery'])} by {SCORERS[scorer].label}"
        for persona, found in personas.items()
        for scorer, decided in found["scorers"].items()
        if decided["recovery"]
    ]
    return "; ".join(recoveries) or "no persona has one"


def _effects_tables(verdict: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    table, tables = results_table(rows), {}
    for persona, found in verdict["personas"].items():
        scorers, plain = found["scorers"], verdict["plain_text_perplexity_ratios"].get(persona, {})
        names = [SCORERS[name].label + ("" if scorers[name]["is_validated"] else " *") for name in scorers]
        header = ("condition", "α", *names, "anti-steered", "p", "perplexity ratio", "on plain text")
        lines = []
        known = next(filter(None, (scorer["effects"] for scorer in scorers.values())), {})
        worst = worst_draws({name: effect["estimate"] for name, effect in known.items()})
        for condition, alpha in found["alphas"].items():
            drawn = worst.get(condition, condition)
            effects = [scorer["effects"].get(drawn) for scorer in scorers.values()]
            first = next(filter(None, effects), {})
            line = (
                number(alpha, ".3g"),
                *map(interval, effects),
                number(first.get("anti_steered"), ".0%"),
                p_value(first.get("p_mapped_over_it")),
                number(cell_perplexity_ratio(table, persona, drawn, alpha)),
                number(plain.get(condition)),
            )
            lines.append((label_of(drawn), *line))
        tables[persona] = header, lines
    return tables


def _layers_table(folder: Path, pairs: Sequence[Sequence[int]]) -> Table:
    rows = []
    for position, (source, target) in enumerate(pairs):
        # The middle pair of a band lies on top.
        place = folder if position == len(pairs) // 2 else folder / "layers" / f"{source}_{target}"
        cv = load_json(place / "cv_results.json")
        r2 = [number(cv[key], ".3f") for key in ("best_r2", "best_r2_median_dimension", "shuffled_r2")]
        rows.append((f"{source} → {target}", f"{cv['best_lambda']:g}", *r2))
    return ("source → target layer", "λ", "R²", "median dimension", "shuffled pairs"), rows


def _validation_table(validation: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    rows = [
        (
            persona,
            SCORERS[scorer].label,
            "validated" if found["is_validated"] else "NOT VALIDATED",
            lowest_auc(found),
            *(
                f"{rate['n_right']} of {rate['n']}" if (rate := found.get(name)) else "–"
                for name in ("sensitivity", "specificity")
            ),
            "; ".join(found["problems"]) or found.get("measure", ""),
        )
        for persona, by_scorer in validation.items()
        for scorer, found in by_scorer.items()
    ]
    return ("persona", "scorer", "validation", "lowest AUC", "sensitivity", "specificity", "problems"), rows


def _checks_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    header = ("name", "status", "detail", "remedy")
    ordered = sorted(checks, key=lambda check: ("fail", "pending", "pass").index(check["status"]))
    rows = [[check[name] for name in header] for check in ordered]
    return ("check", *header[1:]), rows


def _provenance(folder: Path, config: Mapping[str, Any], environment: Mapping[str, str]) -> Table:
    rows = [(name, str(value), "") for name, value in environment.items()]
    keys = "source_model", "target_model", "neutral_text"
    names = [(key, model_name(config[key])) for key in keys]
    rows += [(key, name, LICENCES.get(name, "see its source")) for key, name in names]
    for path in sorted(folder.glob("*.json")):
        cache_key = load_json(path).get("fingerprint") if path.name != "config.json" else None
        if cache_key:
            rows.append((path.name, cache_key, ""))
    return ("what", "version, name or fingerprint", "licence"), rows

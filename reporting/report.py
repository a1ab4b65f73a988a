"""Write `report.html`: a finished run as one page that opens from disk and asks nothing of a network.

It is made from the artifacts of the output directory alone, after phase 5 or by `--report FOLDER`. All text
of models, personas and files is escaped; the page's policy forbids it to load anything.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.results_table import cell_perplexity_ratio, results_table
from experiment.conditions import CONDITIONS, MAPPED, ORACLE, SCORERS, UNSTEERED
from reporting.tables import alone, interval, maps_rows, number, percent, verdict_sentence
from support.artifacts import load_json, load_tensors, save_text
from support.errors import InputError

NAME = "report.html"
TEMPLATE = "report.html.j2"
FIRST_SHOWN = (UNSTEERED, MAPPED, ORACLE)
COLOURS = {
    "equivalent to native": "good",
    "transferred": "good",
    "partial": "some",
    "inconclusive": "some",
    "not transferred": "bad",
    "native steering ineffective": "bad",
}
NEEDED = ("config.json", "eval_results.json", "verdict.json", "preflight.json")
VECTORS = "persona_vectors.pt"
# The licences of what is fetched from packages; for other models, see their cards.
LICENCES = {
    "smollm2-135m-instruct": "Apache 2.0",
    "gemma-3-270m": "Gemma terms of use",
    "wikipedia-sample": "CC BY-SA",
}


@dataclass(frozen=True)
class Table:
    """A table of the page.

    wrapped: indices of the columns with long text.
    """

    id: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    wrapped: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A figure of the page: base64 of a PNG, what it shows in words, and what to look for in it."""

    data: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    id: str
    title: str
    text: str = ""
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = field(default_factory=tuple)


def write_report(folder: Path) -> Path:
    """Write the report of a finished run into its folder and return its path.

    Raises InputError: a folder without the artifacts of a finished run.
    """
    missing = [name for name in (*NEEDED, VECTORS) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} is no finished run: {missing[0]} is missing; name the output_dir of a run whose five "
            "phases are done"
        )
    config, results, verdict, checked = (load_json(folder / name) for name in NEEDED)
    rows = results["rows"]
    parts = [
        _effects_part(folder, verdict, rows),
        _strength_part(folder, rows),
        _map_part(folder),
        _scorers_part(verdict["validation"]),
        _preflight_part(checked),
    ]
    parts = [part for part in parts if part.figures or part.tables]
    sections = [("verdict", "Verdict"), *((part.id, part.title) for part in parts)]
    sections += [("texts", "Texts"), ("configuration", "Configuration")]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template(TEMPLATE).render(
        source=config["source_model"],
        target=config["target_model"],
        subtitle=_subtitle(config, rows),
        sections=sections,
        verdicts=[
            {
                "persona": persona,
                "verdict": found["verdict"],
                "note": alone(found),
                "why": verdict_sentence(found),
                "colour": COLOURS[found["verdict"]],
            }
            for persona, found in verdict["personas"].items()
        ],
        parts=parts,
        provenance=_provenance(folder, config, checked["environment"]),
        configuration=json.dumps(config, indent=2, ensure_ascii=False),
        texts=Markup(_script_data(texts_data(rows))),
    )
    path = folder / NAME
    save_text(path, page)
    return path


def texts_data(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the text browser reads: cells, places (prompt and seed), and their texts."""
    personas = list(dict.fromkeys(row["persona"] for row in rows))
    prompts: dict[int, str] = {row["prompt_idx"]: row["prompt"] for row in rows}
    ranks = {prompt: rank for rank, prompt in enumerate(sorted(prompts))}
    places = sorted({(ranks[row["prompt_idx"]], row["seed"]) for row in rows})
    place_of = {place: position for position, place in enumerate(places)}
    cells: dict[tuple, dict[int, dict[str, Any]]] = {}
    for row in rows:
        persona = None if row["condition"] == UNSTEERED else row["persona"]
        of_cell = cells.setdefault((row["condition"], persona, row["alpha"]), {})
        place = place_of[ranks[row["prompt_idx"]], row["seed"]]
        text = of_cell.setdefault(place, {"output": row["output"], "traits": [None] * len(personas)})
        perplexity = row["independent_perplexity"]
        text["perplexity"] = row["perplexity"] if perplexity is None else perplexity
        scores = {row["persona"]: row["trait_probability"], **(row.get("trait_probabilities") or {})}
        for position, name in enumerate(personas):
            if scores.get(name) is not None:
                text["traits"][position] = round(scores[name], 4)
    listed = [
        {
            "condition": condition,
            "persona": None if persona is None else personas.index(persona),
            "label": CONDITIONS[condition].label + ("" if alpha is None else f" (α {alpha:.3g})"),
            "first": position * len(places),
        }
        for position, (condition, persona, alpha) in enumerate(cells)
    ]
    texts = [of_cell.get(place) for of_cell in cells.values() for place in range(len(places))]
    return {
        "personas": personas,
        "prompts": [prompts[prompt] for prompt in sorted(prompts)],
        "places": places,
        "cells": listed,
        "texts": texts,
        "first": FIRST_SHOWN,
    }


def _script_data(content: Any) -> str:
    """Return JSON that a script element can hold: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _subtitle(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    n_prompts = len({row["prompt_idx"] for row in rows})
    n_seeds = len({row["seed"] for row in rows})
    return (
        f"{n_prompts} test prompts × {n_seeds} seed{'s' * (n_seeds > 1)}, at most {config['max_new_tokens']} "
        f"tokens, {len(rows)} scored texts. Effects are changes of the trait's score against "
        "unsteered text of the same prompt, with 95 % intervals over prompts."
    )


def _pictures(folder: Path, **shown: tuple[str, str]) -> list[Picture]:
    """Return the figures that the run has. shown: name -> (alternative text, caption)."""
    paths = {name: folder / f"{name}.png" for name in shown}
    return [
        Picture(base64.b64encode(path.read_bytes()).decode(), *shown[name])
        for name, path in paths.items()
        if path.is_file()
    ]


def _effects_part(folder: Path, verdict: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Part:
    recoveries = [
        f"{persona} {percent(decided['recovery'])} by {SCORERS[scorer].label}"
        for persona, found in verdict["personas"].items()
        for scorer, decided in found["scorers"].items()
        if decided["recovery"]
    ]
    recovery = (
        "Recovery of the native effect: " + ("; ".join(recoveries) or "no persona has one") + ".",
        "How much of the native vector's effect the mapped vector recovers. Hollow points are of scorers "
        "that are not validated.",
    )
    table, plain = results_table(rows), verdict["plain_text_perplexity_ratios"]
    tables = []
    for position, (persona, found) in enumerate(verdict["personas"].items()):
        scorers = found["scorers"]
        names = [SCORERS[name].label + ("" if scorers[name]["is_validated"] else " *") for name in scorers]
        header = ("condition", "α", *names, "anti-steered", "Holm p", "perplexity ratio", "on plain text")
        lines = []
        for condition, alpha in found["alphas"].items():
            effects = [scorer["effects"].get(condition) for scorer in scorers.values()]
            first = next(filter(None, effects), {})
            lines.append(
                (
                    CONDITIONS[condition].label,
                    number(alpha, ".3g"),
                    *map(interval, effects),
                    number(first.get("anti_steered"), ".0%"),
                    number(first.get("p_mapped_over_it"), ".3f"),
                    number(cell_perplexity_ratio(table, persona, condition, alpha)),
                    number(plain.get(persona, {}).get(condition)),
                )
            )
        tables.append(Table(f"effects-{position}", f"{persona}: effect by scorer", header, lines))
    text = (
        "* marks a scorer that is not validated for the persona; no verdict rests on it. Anti-steered: the "
        "share of prompts on which the trait's score falls. Holm p: of the mapped vector doing no more than "
        "the condition. Both are by the first scorer that has effects. Perplexity ratio: of written texts to "
        "unsteered ones of the same prompt and seed; on plain text: of neutral passages that are read under "
        "the steering."
    )
    return Part("effects", "Effects", text, _pictures(folder, recovery=recovery), tables)


def _strength_part(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Part:
    n_cells = len({(row["condition"], row["persona"], row["alpha"]) for row in rows})
    figures = _pictures(
        folder,
        figure1=(
            f"Trait strength over coherence for {n_cells} conditions, a panel for each persona; the tables "
            "above have the numbers.",
            "Up: more of the trait. Right: more fluent. Dotted lines go through the unsteered text.",
        ),
        effect_perplexity=(
            "Change of the trait over the perplexity ratio by alpha, a panel for each persona.",
            "How much of the trait an alpha gives, and at which perplexity; the strongest is drawn largest.",
        ),
        alpha_search=(
            "Perplexity ratio over alpha for each persona and method, with the bound.",
            "The search for alphas on development prompts.",
        ),
        off_target=(
            "Matrix of the change of every persona's score under each persona's vector.",
            "What else a vector moves: the diagonal is what it is for.",
        ),
    )
    return Part("alphas", "Steering strength and side effects", figures=figures)


def _map_part(folder: Path) -> Part:
    figures = _pictures(
        folder,
        mapping_analysis=(
            "Cross-validation, degrees of freedom, R² by dimension and axis, spectrum, and maps compared.",
            "What the map knows; of a band, the map of its middle layer pair.",
        ),
        layer_search=(
            "Heat maps of R² and agreement over all layer pairs; the best pair is marked.",
            "The search for a layer pair.",
        ),
    )
    found = _cross_validations(folder)
    if not found:
        return Part("map", "The map", figures=figures)
    header, compared = maps_rows(list(found.values())[len(found) // 2]["maps"])
    tables = [Table("maps", "Maps compared on held-out documents", header, compared)]
    if len(found) > 1:
        layers = [
            (
                f"{source_layer} → {target_layer}",
                f"{cv['best_lambda']:g}",
                f"{cv['best_r2']:.3f}",
                f"{cv['best_r2_median_dimension']:.3f}",
                number(cv["shuffled_r2"], ".3f"),
            )
            for (source_layer, target_layer), cv in found.items()
        ]
        header = ("source → target layer", "λ", "R²", "median dimension", "shuffled pairs")
        tables.append(Table("layers", "Held-out R² by layer pair", header, layers))
    return Part("map", "The map", figures=figures, tables=tables)


def _cross_validations(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the run's layer pairs -> `cv_results.json`, which lies on top for the middle pair of a band."""
    pairs = [tuple(pair) for pair in load_tensors(folder / VECTORS)["layer_pairs"]]
    middle = pairs[len(pairs) // 2]
    paths = {
        pair: (folder if pair == middle else folder / "layers" / "_".join(map(str, pair))) / "cv_results.json"
        for pair in pairs
    }
    return {pair: load_json(path) for pair, path in paths.items() if path.is_file()}


def _scorers_part(validation: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Part:
    table = []
    for persona, by_scorer in validation.items():
        for scorer, found in by_scorer.items():
            lowest = min(found["auc"], key=found["auc"].get) if found.get("auc") else None
            rates = [found.get(name) for name in ("sensitivity", "specificity")]
            table.append(
                (
                    persona,
                    SCORERS[scorer].label,
                    "validated" if found["is_validated"] else "NOT VALIDATED",
                    "–" if lowest is None else f"{found['auc'][lowest]:.2f} ({lowest})",
                    *("–" if not rate else f"{rate['n_right']} of {rate['n']}" for rate in rates),
                    "; ".join(found["problems"]) or found.get("measure", ""),
                )
            )
    header = ("persona", "scorer", "validation", "lowest AUC", "sensitivity", "specificity", "problems")
    text = (
        "Each scorer was validated on texts unlike its training: other words, genres and lengths, the "
        "target's own unsteered texts, other personas, and degenerate text. It needs an AUC of 0.90 on every "
        "set and at most 5 % false positives on unsteered and degenerate text."
    )
    tables = [Table("validation", "Validation of the scorers", header, table, (6,))]
    return Part("scorers", "Can the scorers be trusted?", text, tables=tables)


def _preflight_part(checked: Mapping[str, Any]) -> Part:
    order = {"fail": 0, "warn": 1, "pass": 2}
    ordered = sorted(checked["checks"], key=lambda check: order.get(check["status"], 1))
    table = [(check["name"], check["status"], check["detail"], check["remedy"]) for check in ordered]
    header = ("check", "status", "detail", "remedy")
    return Part("preflight", "Preflight", tables=[Table("checks", "Failures first", header, table, (2, 3))])


def _provenance(folder: Path, config: Mapping[str, Any], environment: Mapping[str, str]) -> Table:
    rows = [(name, str(value), "") for name, value in environment.items()]
    for key in ("source_model", "target_model", "neutral_text"):
        name = config[key]
        rows.append((key, name, LICENCES.get(name, "see its source")))
    for path in sorted(folder.glob("*.json")):
        cache_key = load_json(path).get("fingerprint") if path.name != "config.json" else None
        if cache_key:
            rows.append((path.name, cache_key, ""))
    header = ("what", "version, name or fingerprint", "licence")
    return Table("provenance", "Versions, fingerprints and licences", header, rows)

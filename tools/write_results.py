"""Write the results of finished runs as one Markdown page, on which no number is typed by hand.

    python -m tools.write_results results/gemma_to_smol --out docs/results.md

Everything comes from the runs' artifacts; the minutes come from their logs.
"""

import argparse
import html
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.results_table import cell, prompt_means
from experiment.command_line import exit_status
from experiment.conditions import (
    DECIDING_CONTROLS,
    LEXICAL_CONTROLS,
    MAPPED,
    ORACLE,
    PROMPTED,
    SCORERS,
    UNSTEERED,
    label_of,
)
from reporting.figures_headline import DecidedPersona
from reporting.report import load_capability
from reporting.tables import (
    format_capability,
    format_detection,
    format_headed,
    format_maps,
    format_recoveries,
    format_validation,
    format_verdicts,
    interval,
    markdown_table,
    number,
    percent,
    protocol_rows,
    recovery_rows,
    strength_tables,
    turn_tables,
)
from support.artifacts import load_json, save_text
from support.run_folder import load_finished
from tools.finished_run import FinishedRun, short_name

CAPABILITY_NOTE = (
    "Of {n_questions} short questions with one right continuation of four, by the mean log-likelihood of a "
    "token; changes are in points, paired by question. Lexical is the stronger lexical control, random the "
    "first random direction."
)
DETECTION = "detection.json"
ABOUT_DETECTION = (
    "AUROC of projections by which the target tells texts with the trait from texts without, at the middle "
    "block: 0.5 is chance. No strength is chosen and no scorer trusted. Of a control, the largest draw."
)
N_SHOWN = 3  # prompts whose texts stand side by side
# Column -> the conditions of which the one with the largest effect is shown.
EFFECTS = {
    label_of(PROMPTED): (PROMPTED,),
    **{label_of(name): (name,) for name in DECIDING_CONTROLS if name not in LEXICAL_CONTROLS},
    "lexical control": LEXICAL_CONTROLS,
    label_of(MAPPED): (MAPPED,),
    label_of(ORACLE): (ORACLE,),
}
STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ")
PHASE = re.compile(r"(phase \d): (\w[\w ]*)$")
DONE = re.compile(r"(phase \d) done in (\d+) s$")
PAUSE = timedelta(minutes=3)  # a run logs a line every minute, so that a longer gap lies between two starts
# What Markdown, a table or HTML may take for markup.
MARKUP = re.compile(r"[\\`*_\[\]~|$@#]")
INTRODUCTION = """# Results

`python -m tools.write_results` makes this page from the artifacts of finished runs; no number on it is typed.
[METHODOLOGY.md](../METHODOLOGY.md) says what the words mean.

Effects are changes of the trait's score, from 0 to 1, against unsteered text of the same prompt and seed,
with 95 % intervals over prompts. They are by the scorer that decides the verdict; \\* marks a scorer that is
not validated. A control of several vectors is shown by the one with the largest effect. The lexical control
is the stronger of the two vectors that know little but the source's words."""


def write_results(folders: Sequence[Path], out: Path) -> Path:
    """Write a page with a section for each run, and return its path.

    Raises InputError: a folder that is no finished run; then nothing is written.
    """
    sections = [INTRODUCTION, *(part for folder in folders for part in run_section(folder))]
    save_text(out, "\n\n".join(sections) + "\n")
    return out


def run_section(folder: Path) -> list[str]:
    """Return the paragraphs, tables and texts of one run. Raises InputError: no finished run."""
    run = FinishedRun.load(folder)
    (cv,) = load_finished(folder, "cv_results.json")
    protocol, verdict, table, decided = run.protocol, run.verdict, run.table, run.decided
    names, sizes = zip(*(_model(protocol["models"][side]) for side in ("source", "target")), strict=True)
    test = protocol["test"]
    parts = [
        f"## {' → '.join(names)}",
        f"{len(test['prompts'])} test prompts, {len(test['seeds'])} seeds, {len(table)} scored texts of at "
        f"most {run.config['max_new_tokens']} tokens. {' → '.join(sizes)}.",
        _effects_table(decided, table),
        "\n".join(f"- {line}" for line in format_verdicts(verdict["personas"]).splitlines()),
        "### Perplexity ratio",
        "How many times as perplexing the texts of the table are to the source model as unsteered texts.",
        _ratios_table(run),
    ]
    if recovery_rows(verdict["personas"])[1]:
        parts += ["### Recovery by every scorer", format_recoveries(verdict["personas"])]
    if curves := verdict["strength_curve"]:
        parts += ["### Over strengths", format_headed(strength_tables(curves))]
    if capability := load_capability(folder, run.config):
        parts += ["### Questions answered right", CAPABILITY_NOTE.format(**capability)]
        parts.append(format_capability(capability))
    if (detection := folder / DETECTION).is_file():
        parts += ["### Reading", ABOUT_DETECTION, format_detection(load_json(detection)["personas"])]
    if turns := verdict.get("turns"):
        parts += ["### Over turns", format_headed(turn_tables(turns))]
    parts += [
        "### Scorers",
        "\n".join(f"- {line}" for line in format_validation(verdict["validation"]).splitlines()),
        "### What was chosen before the first test text",
        markdown_table(*protocol_rows(protocol), left=("what", "chosen", "by")),
        "### The map",
        "Of a layer band, the map of the middle layer pair; R² and retrieval on held-out documents.",
        format_maps(cv["maps"]),
    ]
    if (log := folder / "experiment.log").is_file() and (minutes := minutes_by_phase(log)):
        rows = [(name, f"{each:.1f}") for name, each in minutes.items()]
        parts += ["### Minutes", markdown_table(("part", "minutes"), rows)]
    parts += ["### Texts", f"The first {N_SHOWN} prompts, first seed; below each text its score."]
    for each in decided:
        parts += [f"#### {plain(each.persona)}: {each.found['verdict']}", _texts_table(each, table)]
    return parts


def _model(found: Mapping[str, Any]) -> tuple[str, str]:
    """Return a model's name, of a path its last part, and a phrase with its size."""
    name = short_name(found["name"])
    return name, f"{name} ({found['model_type']}): {found['n_blocks']} blocks of width {found['d_model']}"


def _effects_table(decided: Sequence[DecidedPersona], table: pd.DataFrame) -> str:
    rows = []
    for each in decided:
        unsteered = None
        if each.scorer:
            texts = cell(table, each.persona, UNSTEERED, None)
            unsteered = prompt_means(texts, SCORERS[each.scorer].column).mean().get(UNSTEERED)
        shares = (each.numbers.get(share) for share in ("recovery", "beyond_lexical"))
        rows.append(
            (
                each.persona,
                each.found["verdict"],
                each.label,
                number(unsteered),
                *(_effect(each, conditions) for conditions in EFFECTS.values()),
                *(percent(share, "") if share else "–" for share in shares),
            )
        )
    header = ("persona", "verdict", "scorer", "unsteered", *EFFECTS, "recovery (%)", "beyond lexical (%)")
    return markdown_table(header, rows, left=("persona", "verdict", "scorer"))


def _effect(decided: DecidedPersona, conditions: Sequence[str]) -> str:
    """Return an effect with its interval, and its condition's label where several could be shown."""
    name = decided.largest(conditions)
    said = interval(decided.numbers["effects"][name]) if name else "–"
    return f"{said} ({label_of(name)})" if name and len(conditions) > 1 else said


def _ratios_table(run: FinishedRun) -> str:
    rows = []
    for each in run.decided:
        names = [each.largest(conditions) for conditions in EFFECTS.values()]
        ratios = [run.perplexity_ratio(each, name) for name in names]
        rows.append((each.persona, number(each.found["alphas"].get(MAPPED), ".4g"), *map(number, ratios)))
    return markdown_table(("persona", "α", *EFFECTS), rows)


def _texts_table(decided: DecidedPersona, table: pd.DataFrame) -> str:
    """Return the texts of the first prompts under four conditions side by side, with their scores."""
    columns = decided.boxes(table)
    prompts = table.drop_duplicates("prompt_idx").set_index("prompt_idx")["prompt"].sort_index()[:N_SHOWN]
    rows = [
        (plain(prompt), *(_text(texts, index, decided.scorer) for texts in columns.values()))
        for index, prompt in prompts.items()
    ]
    header = ("prompt", *map(label_of, columns))
    return markdown_table(header, rows, left=header)


def _text(texts: pd.DataFrame, prompt: int, scorer: str | None) -> str:
    if prompt not in texts.index:
        return "–"
    row = texts.loc[prompt]
    score = row[SCORERS[scorer].column] if scorer else None
    return plain(row["output"]) + ("" if score is None or pd.isna(score) else f"<br>({score:.2f})")


def plain(text: str) -> str:
    """Return a text for a cell of a Markdown table, in which nothing of it is markup.

    Lines are parted by `<br>`; an invisible character is named.
    """
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "<br>".join(filter(None, map(_escaped, lines)))


def _escaped(line: str) -> str:
    named = "".join(each if each.isprintable() else f"⟨U+{ord(each):04X}⟩" for each in line)
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", html.escape(named, quote=False))


def minutes_by_phase(log: Path) -> dict[str, float]:
    """Return phase -> minutes, over all starts of a run, the rest and the sum; empty if no phase is done.

    The rest is what precedes phase 1 (choices, responses), and phases that were stopped.
    """
    names: dict[str, str] = {}
    seconds: dict[str, float] = {}
    stamps = []
    for stamp, line in _stamped(log):
        stamps.append(stamp)
        if found := PHASE.search(line):
            names[found[1]] = f"{found[1]}, {found[2]}"
        elif (found := DONE.search(line)) and found[1] in names:
            seconds[names[found[1]]] = seconds.get(names[found[1]], 0.0) + int(found[2])
    if not seconds:
        return {}
    gaps = [later - earlier for earlier, later in pairwise(stamps)]
    whole = sum((gap for gap in gaps if timedelta() <= gap < PAUSE), timedelta()).total_seconds()
    whole = max(whole, sum(seconds.values()))
    rest = {"before phase 1, and stopped phases": whole - sum(seconds.values()), "in all": whole}
    return {name: each / 60 for name, each in (dict(sorted(seconds.items())) | rest).items()}


def _stamped(log: Path) -> Iterator[tuple[datetime, str]]:
    """Yield time and text of each line of a log that has a time."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if found := STAMP.match(line):
            yield datetime.fromisoformat(found[1]), line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tools.write_results", description=about)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output_dir of a finished run")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write")
    options = parser.parse_args(arguments)
    return exit_status(lambda: write_results(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())

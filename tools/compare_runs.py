"""Put finished runs side by side as matrices of source, target and persona.

    python -m tools.compare_runs results/gemma_to_smol results/smol_to_gemma --out results/matrix

Writes `matrix.csv`, `matrix.png` and `index.html`, which links the runs' reports. Every number is of the
scorer that decides the verdict. Runs of different protocols are put apart: a matrix holds those alone that
asked as much, compared with the same controls and decided by the same bounds.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from experiment.command_line import exit_status
from experiment.conditions import CONDITIONS, LEXICAL_CONTROLS, MAPPED, label_of
from reporting.figures_headline import DecidedPersona
from reporting.figures_matrix import NO_LEXICAL, Cell, matrix_axes, matrix_figure
from reporting.report import encoded, render_page
from reporting.style import save_figure
from reporting.tables import number, percent
from support.artifacts import fingerprint, load_json, save_text
from support.errors import InputError
from support.vocabulary import model_name
from tools.finished_run import FinishedRun, short_name

REPORT, DETECTION = "report.html", "detection.json"
NO_RECOVERY = "no recovery"
INTERVALS = ("native", "mapped", "recovery", "beyond_lexical")
# Keys of a configuration that decide which numbers can be compared, as they stand there.
CONFIGURED = (
    *("n_training_samples", "persona_position", "alpha_unit", "system_prompt", "quantization", "probe"),
    *("prompt_format", "source_prompt_format", "target_prompt_format"),
)


def compare_runs(folders: Sequence[Path], out: Path) -> Path:
    """Write the matrices of these runs into a folder and return the path of the page.

    Raises InputError: a folder that is no finished run, or two runs with the same source, target and persona
    under one protocol; then nothing is written.
    """
    runs = []
    for folder in folders:
        with _of_this_version(folder):
            runs.append(FinishedRun.load(folder, others=(REPORT,)))
    names, settings, cells = model_labels(runs), [], []
    for run in runs:
        with _of_this_version(run.folder):
            settings.append(protocol_settings(run))
            cells.append(run_cells(run, names))
    matrices = put_apart(settings, cells)
    for of_one in matrices.values():
        _check_once(of_one)
    out.mkdir(parents=True, exist_ok=True)
    table = matrix_table(matrices, out)
    save_text(out / "matrix.csv", table.to_csv(index=False))
    save_figure(matrix_figure(matrices), out / "matrix.png", fingerprint(table.to_csv()))
    page = render_page(
        "matrix.html.j2",
        groups=[_for_page(title, of_one, out) for title, of_one in matrices.items()],
        figure=encoded(out / "matrix.png"),
    )
    save_text(out / "index.html", page)
    return out / "index.html"


@contextmanager
def _of_this_version(folder: Path) -> Iterator[None]:
    """Raise InputError where an artifact of the folder lacks what is read of it in the body."""
    try:
        yield
    except KeyError as error:
        raise InputError(
            f"{folder} is of another version: its artifacts have no {error}; run it again"
        ) from error


def put_apart(
    settings: Sequence[Mapping[str, str]], cells: Sequence[Sequence[Cell]]
) -> dict[str, list[Cell]]:
    """Return the cells of the runs of each protocol, by a title that says in what it differs from the others.

    settings, cells: of each run, from `protocol_settings` and `run_cells`. One protocol has an empty title.
    """
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    apart: dict[str, list[Cell]] = {}
    for each, of_run in zip(settings, cells, strict=True):
        title = "; ".join(f"{key}: {each.get(key, 'not known')}" for key in differing)
        apart.setdefault(title, []).extend(of_run)
    return apart


def protocol_settings(run: FinishedRun) -> dict[str, str]:
    """Return what has to be equal in two runs whose numbers are compared, as words.

    What a run chooses by evidence may differ: layers, kinds of vector, λ, α. So may what follows from the
    target alone: one that is asked questions is asked the questions named, and the map learns from its
    responses; another one continues text prefixes, and the map learns from passages.
    """
    config, protocol = run.config, run.protocol
    test, alpha = protocol["test"], protocol["alpha"]
    is_asked = protocol["prompt_format"]["chosen"]["target"] == "chat"
    map_text = protocol["mapping_data"]["chosen"]
    by_target = map_text == ("styled_responses" if is_asked else "neutral_text")
    named = config["test_prompts"] if test["chosen"] != "given" else f"given ({_short(test['prompts'])})"
    controls = [name for name in CONDITIONS if CONDITIONS[name].role == "control"]
    settings = {
        "prompts": f"{len(test['prompts'])} of {named}",
        "seeds": len(test["seeds"]),
        "controls": [label_of(name) for name in controls if name in protocol["conditions"]],
        "disjoint_texts": protocol["disjoint_texts"],
        "layers": f"by {protocol['layers']['by']}",
        "mapping_data": "as the target asks for" if by_target else map_text,
        "neutral_text": short_name(config["neutral_text"]),
        "extraction": protocol["extraction"]["by"],
        "extraction.by_persona": [
            f"{name} {kind}" for name, kind in config["extraction"]["by_persona"].items()
        ],
        "own personas": _short(config["persona_datasets"]) if config["persona_datasets"] else "none",
        "vectors": list(config["vectors"]),
        "alpha_values": "searched" if alpha["given"] == "auto" else "listed",
        "alpha_search.bound": config["alpha_search"]["bound"],
        "judge": model_name(config["judge"]["model"]) if config["use_gpt4"] else "none",
        **{key: config.get(key) for key in CONFIGURED},
        **protocol["generation"],
        **alpha["bound"],
        **protocol["verdict_bounds"],
    }
    return {key: _said(value) for key, value in settings.items()}


def _short(content: Any) -> str:
    return fingerprint(content)[:8]


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def model_labels(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Return model -> its short name, or its whole one where two models share the short one."""
    models = {run.protocol["models"][side]["name"] for run in runs for side in ("source", "target")}
    short = {name: short_name(name) for name in models}
    taken = list(short.values())
    return {name: label if taken.count(label) == 1 else name for name, label in short.items()}


def run_cells(run: FinishedRun, names: Mapping[str, str]) -> list[Cell]:
    """Return a cell for each persona of a run, as `reporting.figures_matrix` reads it, with more numbers.

    names: from `model_labels`. Intervals and numbers are None where they are not known.
    """
    source, target = (names[run.protocol["models"][side]["name"]] for side in ("source", "target"))
    cells = []
    for each in run.decided:
        intervals = {name: _known(each.numbers.get(name)) for name in INTERVALS}
        cells.append(
            {
                "source": source,
                "target": target,
                "persona": each.persona,
                "prompts": run.protocol["test"]["chosen"].replace("_", " "),
                "verdict": each.found["verdict"],
                "scorer": each.label,
                "is_validated": each.numbers.get("is_validated", False),
                **intervals,
                "lexical_control": each.numbers.get("lexical_control"),
                "missing": None if intervals["beyond_lexical"] else _why_missing(each),
                "detector_auroc": detector_auroc(run.folder, each.persona),
                "perplexity_ratio": run.perplexity_ratio(each, MAPPED),
                "folder": run.folder,
            }
        )
    return cells


def _known(found: Mapping[str, float | None] | None) -> Mapping[str, float | None] | None:
    return found if found and found["estimate"] is not None else None


def _why_missing(decided: DecidedPersona) -> str:
    """Return why the recovery beyond the lexical control is not known."""
    if not any(name in decided.found["alphas"] for name in LEXICAL_CONTROLS):
        return NO_LEXICAL
    if not decided.numbers.get("recovery"):
        return NO_RECOVERY
    return (
        "native not surely above it" if decided.numbers["lexical_control"] else "lexical control has no score"
    )


def detector_auroc(folder: Path, persona: str) -> float | None:
    """Return the AUROC of a persona's mapped vector on its labelled texts, at the middle block.

    None where a run has not measured it.
    """
    if not (folder / DETECTION).is_file():
        return None
    found = load_json(folder / DETECTION).get("personas", {}).get(persona, {}).get("labelled", {})
    blocks = found.get("auroc", {}).get(MAPPED)
    return blocks[len(blocks) // 2]["estimate"] if blocks else None


def _check_once(cells: Sequence[Cell]) -> None:
    """Raise InputError where two cells have the same place."""
    seen: dict[tuple[str, ...], Path] = {}
    for cell in cells:
        place = tuple(cell[name] for name in ("source", "target", "persona"))
        if place in seen:
            raise InputError(
                f"{seen[place]} and {cell['folder']} are both of {place[2]} from {place[0]} to {place[1]}, "
                "under one protocol; name one of them"
            )
        seen[place] = cell["folder"]


def matrix_table(matrices: Mapping[str, Sequence[Cell]], out: Path) -> pd.DataFrame:
    """Return a row for each cell, as `matrix.csv` holds it; a number that is not known is missing.

    matrix: which one, from 1. Of an interval there are three columns: its name, `_low`, `_high`. report: the
    path of the run's report from the folder `out`.
    """
    rows = []
    for position, cells in enumerate(matrices.values(), start=1):
        for cell in cells:
            row: dict[str, Any] = {"matrix": position}
            for name, value in cell.items():
                if name in INTERVALS:
                    ends = value or {}
                    columns = {name: "estimate", f"{name}_low": "low", f"{name}_high": "high"}
                    row |= {column: ends.get(end) for column, end in columns.items()}
                elif name != "folder":
                    row[name] = value
            rows.append({**row, "report": _report(cell, out)})
    return pd.DataFrame(rows)


def _report(cell: Cell, out: Path) -> str:
    path = os.path.relpath((cell["folder"] / REPORT).resolve(), out.resolve())
    return Path(path).as_posix()


def _for_page(title: str, cells: Sequence[Cell], out: Path) -> dict[str, Any]:
    """Return what the page says of one matrix."""
    sources, targets = matrix_axes(cells)
    prompts = {cell["target"]: cell["prompts"] for cell in cells}
    personas: dict[str, dict[tuple[str, str], Any]] = {}
    for cell in cells:
        shares = [percent(cell[name]) if cell[name] else "–" for name in ("recovery", "beyond_lexical")]
        said = {
            "recovers": shares[0],
            "beyond words": shares[1] if cell["missing"] in (None, NO_RECOVERY) else cell["missing"],
            "detects": number(cell["detector_auroc"]),
            "perplexity": f"×{number(cell['perplexity_ratio'])}",
        }
        shown = {"verdict": cell["verdict"], "scorer": cell["scorer"], "numbers": said}
        shown["link"] = quote(_report(cell, out))
        personas.setdefault(cell["persona"], {})[cell["source"], cell["target"]] = shown
    shown_targets = {name: prompts[name] for name in targets}
    return {"title": title, "sources": sources, "targets": shown_targets, "personas": personas}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tools.compare_runs", description=about)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output_dir of a finished run")
    parser.add_argument("--out", type=Path, default=Path("results/matrix"), help="folder to write into")
    options = parser.parse_args(arguments)
    return exit_status(lambda: compare_runs(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())

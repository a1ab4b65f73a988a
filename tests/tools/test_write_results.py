"""The page of results says what the artifacts say, and nothing of a text becomes markup."""

import re
import shutil
from statistics import fmean

import pytest
from made_up_scores import NOT_VALIDATED, VALIDATED, detection, save_scores, scored_run
from tiny_runs import error_lines

from support.artifacts import load_json, save_json, sealed
from tools import write_results

HOSTILE = "a | b\n# <b>bold</b> [link](http://example.com) `x` \\ *y* \u202ez"
SCORERS = {"classifier": VALIDATED, "probe": NOT_VALIDATED}


@pytest.fixture
def scored(finished, tmp_path):
    """A finished run with made-up scores and their verdicts; nothing is validated for one persona."""
    folder = shutil.copytree(finished, tmp_path / "run")
    rows = [row for name in ("loud", "numeric") for row in scored_run(0.5, 0.6, persona=name)]
    for row in rows:
        if row["condition"] == "first_block":
            row["trait_probability"] += 0.2
            row["independent_perplexity"] = 25.0
            row["output"] = HOSTILE
    validation = {"loud": SCORERS, "numeric": {"probe": NOT_VALIDATED}}
    return save_scores(folder, rows, validation)


def written(*folders, out):
    assert write_results.main([*map(str, folders), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def table_under(page, heading):
    """Return row name -> column -> cell of the first table after a heading."""
    lines = page[page.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([each.strip() for each in line.strip("|").split(" | ")])
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_effects_are_those_of_the_deciding_scorer_with_their_intervals(scored, tmp_path):
    rows = table_under(written(scored, out=tmp_path / "page.md"), "## ")
    found = load_json(scored / "verdict.json")["personas"]["loud"]
    decided = found["scorers"]["classifier"]
    assert (rows["loud"]["verdict"], rows["loud"]["scorer"]) == (found["verdict"], "classifier")
    for column, name in (("mapped", "ridge_mapped"), ("native (oracle)", "oracle")):
        effect = decided["effects"][name]
        said = f"{effect['estimate']:+.2f} [{effect['low']:+.2f}, {effect['high']:+.2f}]"
        assert rows["loud"][column] == said
    assert rows["loud"]["lexical control"].endswith("(first source block)")
    assert rows["loud"]["lexical control"].startswith(f"{decided['effects']['first_block']['estimate']:+.2f}")
    assert rows["loud"]["recovery (%)"].startswith(f"{decided['recovery']['estimate']:.0%}"[:-1])
    own = [row for row in load_json(scored / "eval_results.json")["rows"] if row["persona"] == "loud"]
    unsteered = [row["trait_probability"] for row in own if row["condition"] == "baseline"]
    assert rows["loud"]["unsteered"] == f"{fmean(unsteered):.2f}"
    assert rows["loud"]["prompting baseline"] == "–"  # was not run
    assert rows["numeric"]["scorer"] == "language-model probe *"


def test_ratios_choices_and_minutes_come_from_the_artifacts(scored, tmp_path):
    log = scored / "experiment.log"
    stamp = "2026-01-31 10:{},000 INFO run_experiment: {}"
    lines = [("00:00", "start"), ("01:00", "phase 1: setup"), ("03:00", "phase 1 done in 120 s")]
    lines += [("59:00", "phase 1: setup"), ("59:30", "phase 1 done in 30 s")]
    log.write_text("\n".join(stamp.format(*line) for line in lines))
    page = written(scored, out=tmp_path / "page.md")
    ratios = table_under(page, "### Perplexity ratio")["loud"]
    assert (ratios["lexical control"], ratios["mapped"], ratios["α"]) == ("2.50", "1.00", "1")
    right = table_under(page, "### Questions answered right")
    steered = [f"{name}: {vector}" for name in ("loud", "numeric") for vector in ("native", "mapped")]
    assert list(right) == ["unsteered", *steered]
    chosen = table_under(page, "### What was chosen")["λ of the map"]["chosen"]
    assert float(chosen) == load_json(scored / "protocol.json")["maps"][0]["best_lambda"]
    minutes = {name: row["minutes"] for name, row in table_under(page, "### Minutes").items()}
    assert minutes["phase 1, setup"] == "2.5"  # both starts
    assert minutes["in all"] == "3.5"  # without the pause between them
    assert minutes["before phase 1, and stopped phases"] == "1.0"


def test_detectors_have_a_table_where_a_run_has_them(scored, tmp_path):
    save_json(scored / "detection.json", sealed({"personas": detection(["loud", "numeric"])}))
    page = written(scored, out=tmp_path / "page.md")
    row = table_under(page, "### Reading")["loud, responses"]
    assert (row["native"], row["lexical"], row["mapped − lexical"]) == (
        "0.99",
        "0.81",
        "+0.13 [+0.06, +0.20]",
    )
    (scored / "detection.json").unlink()
    assert "### Reading" not in written(scored, out=tmp_path / "page.md")


def test_nothing_of_a_text_is_markup(scored, tmp_path):
    page = written(scored, out=tmp_path / "page.md")
    texts = table_under(page, "#### loud")
    assert list(texts) == [f"Question {number}?" for number in range(write_results.N_SHOWN)]
    columns = ["prompt", "unsteered", "first source block", "mapped", "native (oracle)"]
    assert list(texts["Question 0?"]) == columns
    shown = texts["Question 0?"]["first source block"]
    assert re.fullmatch(r".*<br>.*<br>\(0\.\d\d\)", shown)
    assert not re.search(r"[|`*\[\]\\#\u202e]|<b>", shown.replace("&#", ""))
    assert "⟨U+202E⟩" in shown


def test_a_whole_run_of_few_prompts_has_a_page_without_a_path_of_the_machine(finished, tmp_path):
    page = written(finished, finished, out=tmp_path / "page.md")
    assert page.count("## source → target\n") == 2
    assert str(finished.parent) not in page
    texts = table_under(page, "#### loud")
    outputs = {row["output"] for row in load_json(finished / "eval_results.json")["rows"]}
    shown = {cell for row in texts.values() for cell in list(row.values())[1:]}
    assert {write_results.plain(output) for output in outputs} & {
        each.partition("<br>(")[0] for each in shown
    }
    assert "in all" in table_under(page, "### Minutes")


def test_a_folder_that_is_no_finished_run_is_one_line_and_writes_nothing(finished, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "page.md"
    assert write_results.main([str(finished), str(tmp_path / "empty"), "--out", str(out)]) == 2
    (line,) = error_lines(capsys)
    assert "empty is no finished run: config.json is missing; name the output_dir" in line
    assert not out.exists()

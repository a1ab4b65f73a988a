"""A matrix of runs says what their verdicts say, under its protocol, and leads to their reports."""

import html
import math
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
from made_up_scores import COMPARED, NOT_VALIDATED, VALIDATED, change, save_scores, scored_run
from matplotlib.axes import Axes
from tiny_runs import error_lines

from experiment.conditions import LEXICAL_CONTROLS
from experiment.config import load_config
from reporting.figures_matrix import matrix_figure
from support.artifacts import load_json, save_json, sealed
from tools import compare_runs
from tools.finished_run import FinishedRun

ROOT = Path(__file__).parents[2]
VALIDATION = {"loud": {"classifier": VALIDATED}, "numeric": {"classifier": NOT_VALIDATED}}
PAIRS = [("big", "small"), ("small", "big"), ("big", "big"), ("small", "small")]


@pytest.fixture
def make(finished, tmp_path):
    """Return a function that makes a finished run of two models with made-up scores."""

    def made(source, target, mapped=0.5, without=(), **protocol):
        folder = shutil.copytree(finished, tmp_path / f"run #{len(list(tmp_path.iterdir()))}")
        rows = [row for name in VALIDATION for row in scored_run(mapped, 0.6, persona=name)]
        alphas = {name: alpha for name, alpha in COMPARED.items() if name not in without}
        save_scores(folder, [row for row in rows if row["condition"] not in without], VALIDATION, alphas)
        models = load_json(folder / "protocol.json")["models"]
        names = {"source": source, "target": target}
        models = {side: {**models[side], "name": name} for side, name in names.items()}
        change(folder / "protocol.json", models=models, **protocol)
        return folder

    return made


def compared(*folders, out):
    assert compare_runs.main([*map(str, folders), "--out", str(out)]) == 0
    return pd.read_csv(out / "matrix.csv"), (out / "index.html").read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_verdicts(make, tmp_path):
    folders = {pair: make(*pair, mapped=0.3 + 0.1 * number) for number, pair in enumerate(PAIRS)}
    table, page = compared(*folders.values(), out=tmp_path / "matrix")
    table = table.set_index(["source", "target", "persona"])
    assert len(table) == len(PAIRS) * len(VALIDATION)
    assert set(table["matrix"]) == {1}
    for (source, target), folder in folders.items():
        for persona, found in load_json(folder / "verdict.json")["personas"].items():
            row, numbers = table.loc[source, target, persona], found["scorers"]["classifier"]
            assert row["verdict"] == found["verdict"]
            assert row["is_validated"] == numbers["is_validated"]
            assert row["lexical_control"] == numbers["lexical_control"]
            for name in ("native", "mapped", "recovery", "beyond_lexical"):
                shown = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
                assert shown == pytest.approx([numbers[name][end] for end in ("estimate", "low", "high")])
            assert row["perplexity_ratio"] == 1.0
            assert math.isnan(row["detector_auroc"])  # was not measured
    assert "stand apart" not in page
    assert page.count("classifier *</span>") == len(PAIRS)  # one persona's scorer is not validated


def test_a_model_onto_itself_lies_on_the_diagonal_and_a_missing_run_is_said(make, tmp_path):
    _, page = compared(*[make(*pair) for pair in PAIRS[1:]], out=tmp_path / "matrix")
    (of_loud, _) = re.findall(r"<tbody>(.*?)</tbody>", page, re.S)
    rows = [re.findall(r"<td.*?</td>", row, re.S) for row in of_loud.split("</tr>")[:-1]]
    assert re.findall(r'<th scope="row">(\w+)</th>', of_loud) == ["small", "big"]
    assert [["no run" in cell for cell in row] for row in rows] == [[False, False], [True, False]]


def test_runs_of_two_protocols_are_put_apart_by_what_differs(make, finished, tmp_path):
    test = load_json(finished / "protocol.json")["test"]
    folders = [make("big", "small"), make("small", "big"), make("big", "small", test={**test, "seeds": [0]})]
    change(folders[2] / "config.json", use_gpt4=True)
    table, page = compared(*folders, out=tmp_path / "matrix")
    assert list(table["matrix"]) == [1, 1, 1, 1, 2, 2]
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:2] == ["seeds: 2; judge: none", "seeds: 1; judge: gpt-4o"]
    assert "2 matrices stand apart" in page


def test_what_follows_from_the_target_or_is_chosen_by_evidence_puts_nothing_apart(make, finished, tmp_path):
    protocol = load_json(finished / "protocol.json")
    chat = {"chosen": {"source": "raw", "target": "chat"}, "alternatives": ["raw", "chat"]}
    learnt = {**protocol["mapping_data"], "chosen": "styled_responses"}
    prompts = {**protocol["test"], "prompts": ["Why?"] * len(protocol["test"]["prompts"])}
    kinds = {**protocol["extraction"], "chosen": {"loud": "last", "numeric": "prompt"}}
    of_target = make("big", "small", prompt_format=chat, mapping_data=learnt, test=prompts, extraction=kinds)
    table, _ = compared(of_target, make("small", "big"), out=tmp_path / "matrix")
    assert set(table["matrix"]) == {1}
    of_passages = make("big", "small", prompt_format=chat, test=prompts)
    table, page = compared(of_passages, make("small", "big"), out=tmp_path / "matrix")
    assert list(table["matrix"].unique()) == [1, 2]
    assert "mapping_data: neutral_text" in page


def test_a_missing_lexical_control_is_missing_and_not_nothing(make, tmp_path):
    table, page = compared(make("big", "small", without=LEXICAL_CONTROLS), out=tmp_path / "matrix")
    row = table.set_index("persona").loc["loud"]
    assert row[["beyond_lexical", "beyond_lexical_low", "lexical_control"]].isna().all()
    assert (row["missing"], row["recovery"] > 0.5) == ("no lexical control", True)
    assert page.count("no lexical control</span>") == len(VALIDATION)
    for without, hatches in ((LEXICAL_CONTROLS, ["//"]), ((), [])):
        run = FinishedRun.load(make("big", "small", without=without))
        cells = compare_runs.run_cells(run, {"big": "big", "small": "small"})
        panel = matrix_figure({"": cells}).findobj(Axes)[0]
        assert [patch.get_hatch() for patch in panel.patches] == hatches
        has_colour = bool(panel.images[0].get_array().count())
        assert has_colour is not bool(without)


def test_links_lead_to_the_reports(make, tmp_path):
    folders = [make(*pair) for pair in PAIRS]
    out = tmp_path / "deep" / "matrix"
    table, page = compared(*folders, out=out)
    links = [unquote(html.unescape(link)) for link in re.findall(r'href="([^"]+report.html)"', page)]
    found = {(out / link).resolve() for link in links}
    assert found == {(folder / "report.html").resolve() for folder in folders}
    assert {(out / link).resolve() for link in table["report"]} == found
    assert str(tmp_path) not in page


def test_a_detector_is_read_where_a_run_has_one(make, tmp_path):
    folder = make("big", "small")
    blocks = [{"estimate": area, "low": 0.4, "high": 1.0} for area in (0.5, 0.83, 0.6)]
    personas = {
        "loud": {"labelled": {"not_measured": None, "auroc": {"ridge_mapped": blocks}}},
        "numeric": {"labelled": {"not_measured": "there are none"}},
    }
    save_json(folder / "detection.json", sealed({"personas": personas}))
    table, page = compared(folder, out=tmp_path / "matrix")
    assert table["detector_auroc"][0] == 0.83
    assert math.isnan(table["detector_auroc"][1])
    assert "0.83</span>" in page


def test_a_run_of_few_prompts_has_a_matrix_without_numbers(finished, tmp_path):
    table, page = compared(finished, out=tmp_path / "matrix")
    assert set(table["verdict"]) == {"inconclusive"}
    assert table["recovery"].isna().all()
    assert "<td" in page


def test_bad_input_is_one_line_and_writes_nothing(make, tmp_path, capsys):
    out, whole, again = tmp_path / "matrix", make("big", "small"), make("big", "small")
    (empty := tmp_path / "empty").mkdir()
    old = make("small", "small")
    protocol = load_json(old / "protocol.json")
    del protocol["disjoint_texts"]
    save_json(old / "protocol.json", sealed(protocol))
    unreported = make("big", "big")
    (unreported / "report.html").unlink()
    for folder, said in (
        (empty, "empty is no finished run: config.json is missing; name the output_dir"),
        (unreported, "is no finished run: report.html is missing"),
        (old, "is of another version: its artifacts have no 'disjoint_texts'; run it again"),
        (again, f"{whole} and {again} are both of loud from big to small, under one protocol; name one"),
    ):
        assert compare_runs.main([str(whole), str(folder), "--out", str(out)]) == 2
        (line,) = error_lines(capsys)
        assert said in line
        assert not out.exists()


def test_models_of_one_short_name_are_told_apart(make, tmp_path):
    table, _ = compared(make("/a/base", "/b/base"), make("/a/base", "small"), out=tmp_path / "matrix")
    assert set(table["source"]) == {"/a/base"}
    assert set(table["target"]) == {"/b/base", "small"}


def test_the_four_runs_of_the_packaged_models_have_one_protocol():
    script = (ROOT / "configs" / "matrix.sh").read_text(encoding="utf-8")
    paths = sorted((ROOT / "configs" / "matrix").glob("*.json"))
    configs = [load_config(path).model_dump() for path in paths]
    models, own = set(), ("source_model", "target_model", "output_dir")
    for config in configs:
        assert config["output_dir"].removeprefix("./") in script
        models.add((config["source_model"], config["target_model"]))
        assert {**config, **dict.fromkeys(own)} == {**configs[0], **dict.fromkeys(own)}
    packaged = ("gemma-3-270m", "smollm2-135m-instruct")
    assert models == {(source, target) for source in packaged for target in packaged}

"""The report of a run: text stays text, and a reader finds, sorts and searches in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from made_up_scores import COMPARED, NOT_VALIDATED, VALIDATED, detection, scored_run

from analysis.results_table import results_table
from analysis.verdict import decide_verdicts
from experiment.conditions import CONDITIONS, LEXICAL_CONTROLS
from reporting.figures_headline import headline_figure
from reporting.report import texts_data, write_report
from reporting.style import save_figure
from run_experiment import main
from support.artifacts import load_json, save_json, save_tensors, sealed
from support.errors import InputError

HOSTILE = "</script><img src='https://example.com/x.png' onerror=alert(1)>\u202eesrever <b>bold</b> & \x07"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
FLAGS += " --disable-component-update --virtual-time-budget=4000"
PERSONAS, N_PROMPTS, N_SEEDS = ("loud", "numeric"), 9, 2
PAIRS = [[2, 3], [4, 5], [6, 10]]


POINTS = [
    {"alpha": 0.1, "perplexity_ratio": 1.2, "reason": None},
    {"alpha": 0.2, "perplexity_ratio": 2.5, "reason": "perplexity, non-words"},
]
PROTOCOL = {
    "layers": {"chosen": PAIRS, "by": "band"},
    "mapping_data": {"chosen": "responses", "alternatives": ["responses", "neutral_text"]},
    "maps": [{"best_lambda": 0.01, "r2": {"0.01": 0.6, "0.1": 0.5}}] * 3,
    "prompt_maps": [{"best_lambda": 0.1, "r2": {"0.01": 0.3, "0.1": 0.44}}] * 3,
    "extraction": {"chosen": {"loud": "mean", "numeric": "responses"}},
    "extraction_numbers": {"loud": {"mean": {"native_effect": 0.3, "lexical_cosines": {"first_block": 0.7}}}},
    "split_half_cosines": {
        "source": {"loud": [0.8, 0.7], "numeric": [None]},
        "target": {"loud": [0.9], "numeric": [None]},
    },
    "alpha": {
        "bound": {"max_perplexity_ratio": 1.5},
        "trait_costs": {"loud": 1.2},
        "alphas": [{"persona": "loud", "alpha": 0.1, "curve": POINTS}],
    },
    "test": {"chosen": "fresh_questions", "prompts": ["Why?"] * N_PROMPTS, "seeds": [0, 1]},
}


CHANGE = {"accuracy": 0.65, "change": {"estimate": -0.05, "low": -0.125, "high": 0.025}}
CAPABILITY = dict.fromkeys(("oracle", "ridge_mapped", "first_block", "random_direction"), CHANGE)


def made_up_rows():
    """Judged texts of two personas, one of whose texts and prompts is hostile."""
    rows = []
    for persona in PERSONAS:
        for row in scored_run(0.5, 0.6, n=N_PROMPTS, persona=persona, judged=True):
            k, condition = row["prompt_idx"], row["condition"]
            if condition == "oracle" and k == 0:
                row["output"] = HOSTILE
            row["prompt"] = f"Then {HOSTILE}" if k == 1 else f"Question {k}?"
            rows += [{**row, "seed": seed, "perplexity": 10.0 + k + seed / 2} for seed in range(N_SEEDS)]
            rows[-1]["independent_perplexity"] = None
    return rows


def strengths():
    """What four vectors do over strengths, by a scorer that is not validated."""
    share = {"estimate": 0.9, "low": 0.7, "high": 1.1}
    missing = dict.fromkeys(share)
    point = {"multiple": 1.0, "alpha": 2.0, "perplexity_ratio": 1.3, "effect": 0.4, "low": 0.3, "high": 0.5}
    native = {"multiple": 1.0, "perplexity_ratio": 1.3, "is_reached": True, "effect": share, "recovery": None}
    mapped = {**native, "perplexity_ratio": 1.1, "is_reached": False, "recovery": share}
    vectors = {
        "oracle": {"points": [{**point, "recovery": None}] * 5, "at_native_ratio": native}
        | {"half_effect": share, "half_over_native": None},
        "ridge_mapped": {"points": [{**point, "recovery": share}] * 5, "at_native_ratio": mapped}
        | {"half_effect": {**share, "high": None}, "half_over_native": missing},
    }
    unbounded = {**point, "recovery": {**share, "low": None, "high": None}}
    for name in LEXICAL_CONTROLS:
        vectors[name] = {**vectors["ridge_mapped"], "points": [unbounded] * 5}
    return {
        "scorer": "classifier",
        "is_validated": False,
        "alpha": 2.0,
        "n_prompts": 9,
        "native_ratio": 1.3,
    } | {"vectors": vectors}


def turns():
    """What ten turns of conversations come to: intervals, too few conversations, and nothing known."""
    effect = {"estimate": -0.123, "low": -0.25, "high": -0.01, "n": 120}
    few = {**effect, "low": None, "high": None, "n": 7}
    steered = [
        {"turn": number, "trait": 0.5, "effect": found, "perplexity_ratio": 12.345}
        for number, found in enumerate((effect, few, None, *[effect] * 7), 1)
    ]
    plain = [{**turn, "effect": None, "perplexity_ratio": None} for turn in steered]
    conditions = {
        "baseline": {"turns": plain, "drift": None},
        "oracle": {"turns": steered, "drift": effect},
        "other_persona: cheerfulness": {"turns": steered, "drift": few},
    }
    return {"scorer": "probe", "is_validated": False, "alpha": 0.1234, "conditions": conditions}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of made-up numbers, on a band of three layer pairs."""
    out = tmp_path_factory.mktemp("report") / "out"
    rows = made_up_rows()
    by_scorer = {"classifier": VALIDATED, "probe": NOT_VALIDATED, "judge": VALIDATED}
    validation = dict.fromkeys(PERSONAS, by_scorer)
    verdicts = decide_verdicts(results_table(rows), dict.fromkeys(PERSONAS, COMPARED), validation)
    personas = {name: verdict.content() for name, verdict in verdicts.items()}
    personas["numeric"]["scorers"]["judge"]["recovery"]["high"] = None
    statuses = ("pass", "fail", "pending")
    checks = [{"name": status, "status": status, "detail": "", "remedy": ""} for status in statuses]
    maps = {"n": 9, "lambda": 1.0, "rank": None, "retrieval_accuracy": 0.5, "retrieval_n": 9, "map": "ridge"}
    maps |= dict.fromkeys(("r2", "r2_standardised", "r2_median_dimension"), 0.5)
    ratios = {"strength_curve": {"loud": strengths()}}
    ratios |= {"turns": {"loud": turns()}}
    ratios |= {"plain_text_perplexity_ratios": {"loud": {"oracle": 1.23}}}
    models = {"source_model": "a", "target_model": "b", "neutral_text": "wikipedia-sample"}
    files = {
        "config.json": {**models, "max_new_tokens": 6, "n_capability_questions": 120},
        "capability.json": {"n_questions": 120, "unsteered": 0.7, "personas": {"loud": CAPABILITY}},
        "eval_results.json": {"rows": rows},
        "verdict.json": {"personas": personas, "validation": validation} | ratios,
        "preflight.json": {"checks": checks, "environment": {"torch": "2.13"}},
        "protocol.json": PROTOCOL,
        "detection.json": {"personas": detection(PERSONAS)},
    }
    for source, target in [*PAIRS, [8, 9]]:  # the last is of an earlier run
        name = "" if [source, target] == PAIRS[1] else f"layers/{source}_{target}/"
        cv = {"best_lambda": 1.0, "best_r2_median_dimension": 0.4, "shuffled_r2": None, "maps": [maps]}
        files[f"{name}cv_results.json"] = {**cv, "best_r2": target / 100}
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        save_json(out / name, sealed(content))
    cosines = {"ridge_mapped": 0.5, "first_block": 0.4}
    of_persona = {
        "cosine_to_oracle": cosines,
        "cosine_without_massive": cosines,
        "oracle_energy": {"mean_r2": 0.3},
    }
    of_persona |= {"highest_cosine_to_other_oracles": 0.2, "ceiling": dict.fromkeys(("all", "kept"), 0.93)}
    vectors = {"layer_pairs": PAIRS, "vectors": {"x": torch.ones(1)}, "personas": {"loud": of_persona}}
    save_tensors(out / "persona_vectors.pt", {**vectors, "control_maps": [{**maps, "map": "first_block"}]})
    save_figure(headline_figure(personas, results_table(rows)), out / "headline.png", "key")
    assert write_report(out) == out / "report.html"
    return out


@pytest.fixture(scope="module")
def page(finished):
    return (finished / "report.html").read_text(encoding="utf-8")


def table_of(page, name):
    """Return the cells of a table of the page, row by row."""
    (body,) = re.findall(rf'<table id="{name}">.*?<tbody>(.*?)</tbody>', page, re.S)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    return [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)] for row in rows]


def test_what_was_chosen_stands_on_the_page_with_its_numbers(page):
    rows = {name: (chosen, by) for name, chosen, by in table_of(page, "choices")}
    assert rows["layers, source → target"] == ("2 → 3, 4 → 5, 6 → 10", "by band")
    assert rows["vector of loud"][0] == "texts, mean over tokens"
    assert rows["vector of loud"][1].startswith("mean: native +0.30, cosine of words 0.70; cosine of halves")
    assert rows["vector of loud"][1].endswith("at least 0.70 and 0.90 in source and target")
    tried = "0.1: ratio 1.20; 0.2: ratio 2.50 (perplexity, non-words)"
    assert rows["α of loud"] == ("0.1", f"ratio at most 1.80; {tried}")
    assert rows["test prompts"] == ("9 of fresh_questions", "2 seeds")


def test_strengths_are_a_table_and_what_is_not_reached_is_said(page):
    assert "<h3>Over strengths: loud by classifier * at α 2</h3>" in page
    rows, multiples = table_of(page, "strengths-0"), ("0.25", "0.5", "0.75", "1", "1.25")
    assert [row[:3] for row in rows[:5]] == [
        [f"effect (ratio) at {each} α", *["+0.40 (1.30)"] * 2] for each in multiples
    ]
    shares = [[f"recovery at {each} α (%)", "–", "90 [70, 110]"] for each in multiples]
    assert [row[:3] for row in rows[5:10]] == shares
    assert [row[3] for row in rows[5:10]] == ["90 [−∞, ∞]"] * 5
    rest = rows[10:]
    assert [row[1] for row in rest] == ["1.00", "1.30", "+0.90 [+0.70, +1.10]", "–", "0.90 [0.70, 1.10]", "–"]
    assert rest[0][2] == "1.00 (nearest)"
    assert [row[2] for row in rest[3:]] == ["90 [70, 110]", "0.90 [0.70, not reached]", "not reached"]


def test_turns_are_a_table_with_drift_and_few_conversations_have_no_interval(page):
    assert "<h3>Over turns: loud by language-model probe * at α 0.123</h3>" in page
    rows = table_of(page, "turns-0")
    assert rows[0] == ["unsteered", "1", "0.50", "–", "–", ""]
    assert [row[1] for row in rows[10:21]] == [*map(str, range(1, 11)), "drift"]
    assert rows[10][2:] == ["0.50", "-0.12 [-0.25, -0.01]", "12.35", "120"]
    assert rows[11][3:] == ["-0.12", "12.35", "7"]
    assert rows[12][3] == "–"
    assert rows[20] == ["native (oracle)", "drift", "", "-0.12 [-0.25, -0.01]", "", "120"]


def test_markup_in_texts_and_prompts_is_text(page):
    assert "<img src='https" not in page
    assert page.count("<script") == page.count("</script>") == 2
    held = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert HOSTILE in {each["output"] for each in held["texts"] if each}
    assert f"Then {HOSTILE}" in held["prompts"]
    assert "default-src 'none'" in page


def test_the_verdict_comes_first_and_failures_come_first_among_the_checks(finished, page):
    assert page.index('id="verdict"') < page.index('id="effects"') < page.index('id="preflight"')
    for persona, found in load_json(finished / "verdict.json")["personas"].items():
        assert f"<strong>{persona}</strong>: <b>{found['verdict']}</b>: by the {found['decided_by']}" in page
    assert [row[1] for row in table_of(page, "checks")] == ["fail", "pending", "pass"]


def test_effects_have_a_column_for_each_scorer_and_unbounded_ones_are_said(finished, page):
    header = re.search(r'<table id="effects-0">.*?<thead>(.*?)</thead>', page, re.S)[1]
    assert re.findall(r">([^<>]+)</th>", header)[2:5] == ["classifier", "language-model probe *", "judge"]
    rows = {row[0]: row for row in table_of(page, "effects-0")}
    assert set(rows) == {CONDITIONS[name].label for name in COMPARED}
    effect = load_json(finished / "verdict.json")["personas"]["loud"]["scorers"]["judge"]["effects"]["oracle"]
    oracle = rows["native (oracle)"]
    assert oracle[4] == f"{effect['estimate']:+.2f} [{effect['low']:+.2f}, {effect['high']:+.2f}]"
    assert (oracle[5], oracle[7], oracle[8]) == ("0%", "1.00", "1.23")
    assert "unbounded] by judge" in page
    validated = [row[2:5] for row in table_of(page, "validation")[:2]]
    assert validated == [[word, "0.93 (loops)", "16 of 20"] for word in ("validated", "NOT VALIDATED")]


def test_layer_pairs_of_the_run_are_listed_in_order(page):
    layers = [["2 → 3", "0.030"], ["4 → 5", "0.050"], ["6 → 10", "0.100"]]
    assert [row[:3:2] for row in table_of(page, "layers")] == layers
    assert [row[0] for row in table_of(page, "maps")] == ["ridge", "first_block"]
    assert table_of(page, "cosines") == [["loud", "0.50 / 0.50", "0.40 / 0.40", "0.93 / 0.93", "0.20", "30%"]]


def test_recovery_beyond_the_words_is_in_a_table(page, finished):
    rows = table_of(page, "recovered")
    for persona, found in load_json(finished / "verdict.json")["personas"].items():
        (row,) = (row for row in rows if row[:2] == [persona, "judge"])
        beyond = found["scorers"]["judge"]["beyond_lexical"]
        assert row[5] in ("source embeddings", "first source block")
        assert row[7].startswith(f"{beyond['estimate']:.0%}"[:-1])


def test_detectors_are_in_a_table_with_what_it_says(page):
    areas = ["0.99", "0.94", "0.81", "0.66", "0.58", "0.55", "+0.13 [+0.06, +0.20]"]
    assert table_of(page, "detectors") == [
        ["loud", *areas],
        ["loud, responses", *areas],
        ["numeric", *["–"] * 7],
    ]
    assert "Mapped is surely better than the stronger lexical control on 2 of 2 sets of texts" in page


def test_a_run_of_before_there_were_detectors_has_a_report(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "detection.json").unlink()
    assert 'id="detectors"' not in write_report(out).read_text(encoding="utf-8")


def test_every_text_is_there_once():
    rows = made_up_rows()
    data = texts_data(rows)
    assert len(data["places"]) == N_PROMPTS * N_SEEDS
    assert len(data["texts"]) == len(data["cells"]) * len(data["places"])
    cells = {(cell["condition"], cell["persona"]): cell["first"] for cell in data["cells"]}
    for row in rows:
        persona = None if row["condition"] == "baseline" else data["personas"].index(row["persona"])
        place = data["places"].index((row["prompt_idx"], row["seed"]))
        assert data["texts"][cells[row["condition"], persona] + place]["output"] == row["output"]


def test_a_folder_that_is_no_run_is_rejected(tmp_path):
    with pytest.raises(InputError, match=r"is no finished run: config.json is missing"):
        write_report(tmp_path)
    assert main(["--report", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


HELPERS = """
const set = (id, value) => { const at = document.getElementById(id); at.value = value;
  at.dispatchEvent(new Event(id === "search" ? "input" : "change")); };
const prompts = () => [...document.querySelectorAll(".prompt")].map((each) => each.textContent);
const texts = () => [...document.querySelectorAll(".text p")].map((each) => each.textContent);
"""


@pytest.fixture
def in_browser(page, tmp_path):
    """Return a function that returns what a script says of the open page."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")

    def run(script):
        told = f"<script>document.title = JSON.stringify((() => {{ {HELPERS} {script} }})());</script></body>"
        path, log = tmp_path / "page.html", tmp_path / "net.json"
        path.write_text(page.replace("</body>", told), encoding="utf-8")
        command = [
            CHROMIUM,
            *FLAGS.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={log}",
        ]
        shown = subprocess.run(
            [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        ).stdout
        asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
        assert not any("example.com" in url for url in asked), asked
        return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", shown, re.S)[1]))

    return run


def test_hostile_text_is_shown_and_does_nothing(in_browser):
    texts, prompts, n_elements = in_browser(
        'return [texts(), prompts(), document.querySelectorAll("main img[onerror], .text b").length];'
    )
    assert n_elements == 0
    shown = HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x07", "⟨U+0007⟩")
    assert shown in texts
    assert any(shown in prompt for prompt in prompts)


@pytest.mark.parametrize("name", ["strengths-0", "turns-0", "detectors", "capability"])
def test_a_table_fits_on_a_phone(name, in_browser):
    needed, shown = in_browser(f"""
document.body.style.width = "360px";
const at = document.getElementById("{name}").parentElement;
return [at.scrollWidth, at.clientWidth];
""")
    assert 200 < needed <= shown < 360


def test_a_reader_filters_searches_sorts_and_chooses(in_browser):
    n, columns, (found, marks, count), filtered, headers, n_texts, personas = in_browser("""
const all = prompts().length, columns = document.querySelectorAll(".row")[0].querySelectorAll(".text").length;
set("search", "ESREVER");
const found = [prompts(), document.querySelectorAll("mark").length,
  document.getElementById("count").textContent];
set("search", ""); set("prompt", "2");
const filtered = prompts();
set("prompt", "");
set("order", [...document.getElementById("order").options].map((each) => each.value)
  .filter((value) => value.startsWith("perplexity"))[0]);
const sorted = [...document.querySelectorAll(".row")].map((row) => row.querySelector("header").textContent);
document.querySelectorAll("#conditions input").forEach((box) => { if (box.checked) box.click(); });
return [all, columns, found, filtered, sorted, document.querySelectorAll(".text").length,
  [...document.getElementById("persona").options].map((each) => each.textContent)];
""")
    assert n == N_PROMPTS * N_SEEDS
    assert columns == 3  # unsteered, mapped and native
    assert len(found) == 2 * N_SEEDS  # the hostile prompt, and the hostile texts of another
    assert marks >= N_SEEDS
    assert count == f"{2 * N_SEEDS} of {n} prompts and seeds"
    assert filtered == [f"Question 2? (seed {seed})" for seed in range(N_SEEDS)]
    perplexities = [float(header.rsplit(" ", 1)[1]) for header in headers]
    assert len(perplexities) == n
    assert perplexities == sorted(perplexities, reverse=True)
    assert n_texts == 0
    assert personas == list(PERSONAS)

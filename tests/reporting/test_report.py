"""The report of a run: text stays text, and a reader finds, sorts and searches in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
from tiny_runs import N_PROMPTS, N_SEEDS, run, tiny_settings

from reporting.report import texts_data, write_report
from support.artifacts import load_json, save_json
from support.errors import InputError

HOSTILE = "</script><img src='https://example.com/x.png' onerror=alert(1)>\u202eesrever <b>bold</b> & \x07"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
    "--disable-component-update --virtual-time-budget=4000"
).split()


@pytest.fixture(scope="module")
def finished(model_folders, tmp_path_factory):
    """A finished run, one of whose texts and prompts is hostile."""
    folder = tmp_path_factory.mktemp("report")
    settings = tiny_settings(model_folders, folder)
    out = folder / "out"
    assert run(out, {**settings, "test_prompts": ["One day the", f"Then {HOSTILE}", "But the"]}) == 0
    assert (out / "report.html").stat().st_size > 100_000
    results = load_json(out / "eval_results.json")
    for row in results["rows"]:
        if row["condition"] == "oracle" and row["prompt_idx"] == 0:
            row["output"] = HOSTILE
    results.pop("checksum", None)
    save_json(out / "eval_results.json", results)
    assert write_report(out) == out / "report.html"
    return out


def page(finished):
    return (finished / "report.html").read_text(encoding="utf-8")


def test_markup_in_texts_and_prompts_is_text(finished):
    text = page(finished)
    assert "<img src='https" not in text
    assert text.count("<script") == text.count("</script>") == 2
    held = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert HOSTILE in {each["output"] for each in held["texts"]}
    assert f"Then {HOSTILE}" in held["prompts"]
    assert "default-src 'none'" in text


def test_the_verdict_comes_first_and_failures_come_first_among_the_checks(finished):
    text = page(finished)
    assert text.index('id="verdict"') < text.index('id="effects"') < text.index('id="preflight"')
    for persona, found in load_json(finished / "verdict.json")["personas"].items():
        assert f"<strong>{persona}</strong>: <b>{html.escape(found['verdict'], quote=True)}" in text.replace(
            "&#39;", "&#x27;"
        )
    statuses = re.findall(r"<td>(fail|warn|pass)</td>", re.sub(r' class="[^"]*"', "", text))
    assert statuses == sorted(statuses)
    assert all(f'alt="{start}' in text for start in ("Recovery of", "Trait strength over"))


def test_every_text_is_there_once(finished):
    rows = load_json(finished / "eval_results.json")["rows"]
    data = texts_data(rows)
    assert len(data["places"]) == N_PROMPTS * N_SEEDS
    assert len(data["texts"]) == len(data["cells"]) * len(data["places"])
    for row in rows:
        persona = None if row["condition"] == "baseline" else data["personas"].index(row["persona"])
        (cell,) = [
            cell
            for cell in data["cells"]
            if (cell["condition"], cell["persona"]) == (row["condition"], persona)
            and (row["alpha"] is None or f"α {row['alpha']:.3g})" in cell["label"])
        ]
        place = data["places"].index((row["prompt_idx"], row["seed"]))
        assert data["texts"][cell["first"] + place]["output"] == row["output"]


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"is no finished run: config.json is missing"):
        write_report(tmp_path)
    from run_experiment import main

    assert main(["--report", str(tmp_path)]) == 2
    assert "is no finished run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def in_browser(finished, tmp_path, script):
    """Return what a script says of the open page."""
    told = f"<script>document.title = JSON.stringify((() => {{ {script} }})());</script></body>"
    path = tmp_path / "page.html"
    path.write_text(page(finished).replace("</body>", told), encoding="utf-8")
    log = tmp_path / "net.json"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"]
    shown = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
    assert not any("example.com" in url for url in asked), asked
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", shown, re.S)[1]))


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

HELPERS = """
const set = (id, value) => { const at = document.getElementById(id); at.value = value;
  at.dispatchEvent(new Event(id === "search" ? "input" : "change")); };
const prompts = () => [...document.querySelectorAll(".prompt")].map((each) => each.textContent);
const texts = () => [...document.querySelectorAll(".text p")].map((each) => each.textContent);
"""


@needs_browser
def test_hostile_text_is_shown_and_does_nothing(finished, tmp_path):
    said = in_browser(
        finished,
        tmp_path,
        HELPERS
        + 'return [texts(), prompts(), document.querySelectorAll("main img[onerror], .text b").length];',
    )
    texts, prompts, n_elements = said
    assert n_elements == 0
    shown = HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x07", "⟨U+0007⟩")
    assert shown in texts
    assert any(shown in prompt for prompt in prompts)


@needs_browser
def test_a_reader_filters_searches_and_chooses(finished, tmp_path):
    said = in_browser(
        finished,
        tmp_path,
        HELPERS
        + """
const all = prompts().length, columns = document.querySelectorAll(".row")[0].querySelectorAll(".text").length;
set("search", "ESREVER");
const found = [prompts(), document.querySelectorAll("mark").length,
document.getElementById("count").textContent]; set("search", ""); set("prompt", "2");
const filtered = prompts();
set("prompt", "");
document.querySelectorAll("#conditions input").forEach((box) => { if (box.checked) box.click(); });
return [all, columns, found, filtered, document.querySelectorAll(".text").length,
  [...document.getElementById("persona").options].map((each) => each.textContent)];
""",
    )
    n, columns, (found, marks, count), filtered, n_texts, personas = said
    assert n == N_PROMPTS * N_SEEDS
    assert columns == 5  # unsteered, and two conditions at two alphas
    assert len(found) == 2 * N_SEEDS  # the hostile prompt, and the hostile texts of another
    assert marks >= N_SEEDS
    assert count == f"{2 * N_SEEDS} of {n} prompts and seeds"
    assert len(filtered) == N_SEEDS
    assert all(prompt.startswith("But the") for prompt in filtered)
    assert n_texts == 0
    assert personas == ["loud", "numeric"]


@needs_browser
def test_texts_are_sorted_by_what_is_shown(finished, tmp_path):
    said = in_browser(
        finished,
        tmp_path,
        HELPERS
        + """
const order = document.getElementById("order");
const keys = [...order.options].map((each) => each.value);
set("order", keys.filter((value) => value.startsWith("perplexity"))[0]);
return [...document.querySelectorAll(".row")].map((row) => row.querySelector("header").textContent);
""",
    )
    costs = [float(text.rsplit(" ", 1)[1].replace("–", "-inf")) for text in said]
    assert len(costs) == N_PROMPTS * N_SEEDS
    assert costs == sorted(costs, reverse=True)

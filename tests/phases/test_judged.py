"""A run with a judge: through phase 5 to a report, and what an interrupted or failing judge costs."""

import json
import zlib

import pytest
from chat_server import chat_server, completion, error
from tiny_runs import error_lines, rows, run

from experiment.conditions import condition_of
from experiment.config import load_config
from phases.score_texts import judge_key
from run_experiment import PersonaTransferExperiment
from support.artifacts import load_json
from support.journal import Journal

METHODS = ["ridge_mapped", "shuffled_pairs", "other_persona", "random_direction", "oracle"]
FEW = {"methods": ["oracle"], "alpha_values": [4.0]}  # of which the finished run holds the texts


@pytest.fixture(autouse=True)
def local_key(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")


def judged(settings, server, **judge):
    local = {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"}
    return {**settings, "use_gpt4": True, "judge": {**local, **judge}}


def test_a_judged_run_ends_with_the_judges_recovery_in_figure_and_report(tiny, tmp_path):
    """The judge finds the trait in most texts of the native vector, and in fewer of the mapped one."""
    out, digits = tmp_path / "out", {}
    settings = {**tiny, "methods": METHODS, "alpha_values": [4.0], "n_test_prompts": 8, "n_seeds": 1}
    settings["max_new_tokens"] = 12

    def judge(prompt):
        trait = prompt.partition('Trait "')[2].partition('"')[0]
        text = prompt.partition("\nContinuation: ")[2].removesuffix("\n\nAnswer with one digit.")
        return completion(str(digits.get((trait, text), 1)))

    with chat_server(judge) as server:
        settings = judged(settings, server)
        for phase in "1234":
            assert run(out, settings, "--phase", phase) == 0
        for row in rows(out):
            usual = {"oracle": 4, "ridge_mapped": 3}.get(row["condition"], 1)
            digits[row["persona"], row["output"]] = usual + zlib.crc32(row["output"].encode()) % 2
        assert run(out, settings) == 0
        n_asked = len(server.prompts)
        verdict, page = load_json(out / "verdict.json"), (out / "report.html").read_text()
        for persona in ("loud", "numeric"):
            found = verdict["personas"][persona]["scorers"]["judge"]
            assert found["native"]["low"] > 0.4
            assert 0.3 < found["recovery"]["estimate"] < 1
            assert set(map(condition_of, found["effects"])) == set(METHODS)
            assert f"{persona} {found['recovery']['estimate']:.0%}".replace("%", " %") in page
        assert "by judge" in page
        effects = PersonaTransferExperiment({**settings, "output_dir": str(out)}).results_frame(effects=True)
        assert set(effects[effects["scorer"] == "judge"]["condition"]) == set(METHODS)
        figure = (out / "headline.png").read_bytes()
        assert run(out, settings) == 0
    assert len(server.prompts) == n_asked
    assert load_json(out / "verdict.json") == verdict
    assert (out / "report.html").read_text() == page
    assert (out / "headline.png").read_bytes() == figure


@pytest.mark.usefixtures("no_drawing")
def test_failed_judgements_are_missing_and_asked_for_again(tiny, out):
    digit = "no idea"
    with chat_server(lambda prompt: completion(digit)) as server:
        settings = judged({**tiny, **FEW}, server)
        assert run(out, settings) == 0
        for row in rows(out, "eval_results.json"):
            assert row["gpt4_trait_score"] is None
            assert "not a digit" in row["gpt4_failure"]
        digit = "4"
        assert run(out, settings) == 0
    for row in rows(out, "eval_results.json"):
        assert row["gpt4_trait_score"] == row["gpt4_coherence_score"] == 4
        assert row["gpt4_failure"] is None


def test_a_judge_that_cannot_answer_ends_the_run_before_anything_is_made(tiny, tmp_path, capsys):
    with chat_server(lambda prompt: error("model 'local' not found", 404)) as server:
        settings = judged({**tiny, **FEW}, server)
        for flags in ([], ["--phase", "1"]):
            assert run(tmp_path / "out", settings, *flags) == 2
            (line,) = error_lines(capsys)
            assert f"the judge local at {server.base_url} does not answer: " in line
            assert "check judge.model" in line
    assert len(server.prompts) == 2
    assert not (tmp_path / "out").exists()


def test_scores_of_the_address_in_the_environment_are_filed_under_it(tiny, monkeypatch):
    config, keys = load_config({**tiny, "output_dir": "out", "use_gpt4": True}), []
    for address in ("", "http://one/v1", "http://other/v1"):
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        keys.append(judge_key(config))
    assert len({json.dumps(key) for key in keys}) == 3


@pytest.mark.usefixtures("no_drawing")
def test_a_spent_quota_leaves_a_run_that_the_next_one_completes(tiny, out, caplog):
    n_paid = 30
    no_quota = error("You exceeded your current quota.", 429, code="insufficient_quota")
    with chat_server(lambda prompt: completion("4") if len(server.prompts) <= n_paid else no_quota) as server:
        settings = judged({**tiny, **FEW}, server)
        assert run(out, settings) == 0
        assert len(server.prompts) < n_paid + 20
        failures = [row["gpt4_failure"] for row in rows(out, "eval_results.json") if row["gpt4_failure"]]
        assert f"{len(failures)} texts lack a judgement" in caplog.text
        asked, n_paid = set(server.prompts[:n_paid]), 10**6
        n_asked = len(server.prompts)
        assert run(out, settings) == 0
    assert not asked & set(server.prompts[n_asked:])
    assert {row["gpt4_trait_score"] for row in rows(out, "eval_results.json")} == {4}


@pytest.mark.usefixtures("no_drawing")
def test_a_kill_loses_no_judgement_but_those_in_flight(tiny, out, monkeypatch):
    append, n_kept = Journal.append, []

    def interrupted(journal, added):
        if journal.path.name.startswith("judgements"):
            if len(n_kept) == 20:
                raise KeyboardInterrupt
            n_kept.append(len(added))
        append(journal, added)

    with chat_server(lambda prompt: completion("4")) as server:
        settings = judged({**tiny, **FEW}, server, max_workers=1)
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", interrupted)
            assert run(out, settings) == 130
        n_asked = len(server.prompts)
        assert n_asked < 30
        assert run(out, settings) == 0
    again = set(server.prompts[:n_asked]) & set(server.prompts[n_asked:])
    assert len(again) <= n_asked - 20
    assert {row["gpt4_coherence_score"] for row in rows(out, "eval_results.json")} == {4}

"""Whole runs from the command line: what they leave, what they reject, what a dry run says, real models."""

import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    ARTIFACTS,
    LOUD,
    N_PROMPTS,
    N_SEEDS,
    artifacts,
    error_lines,
    is_close,
    rows,
    run,
    texts,
    visible_files,
)

from baseline_methods import METHODS
from experiment.config import PROTOCOL
from phases.side_effects import N_QUESTIONS
from run_experiment import PersonaTransferExperiment, main
from support import progress
from support.artifacts import load_json, load_tensors
from support.tiny_models import CONTEXT
from texts.personas import load_prompts

N_PERSONAS, N_ALPHAS = 2, 2
N_PER_CELL = N_PROMPTS * N_SEEDS
N_CELLS = len(METHODS) * N_PERSONAS * N_ALPHAS + 1
N_TEXTS = N_CELLS * N_PER_CELL
N_EVALUATIONS = (N_CELLS - 1 + N_PERSONAS) * N_PER_CELL
AUTO = {"layer_idx": "auto", "source_layer_idx": None, "target_layer_idx": None}


# A whole run


def test_a_run_leaves_every_artifact_and_nothing_else(finished):
    assert visible_files(finished) == ARTIFACTS


def test_the_grid_is_complete_and_the_unsteered_text_is_written_once(finished):
    written = rows(finished)
    places = [(prompt, seed) for prompt in range(N_PROMPTS) for seed in range(N_SEEDS)]
    expected = [
        (method, name, alpha) for method in METHODS for name in ("loud", "numeric") for alpha in (1.0, 4.0)
    ]
    cells = defaultdict(list)
    for row in written:
        cells[row["condition"], row["persona"], row["alpha"]].append((row["prompt_idx"], row["seed"]))
    assert cells == dict.fromkeys([("baseline", None, None), *expected], places)
    assert len({row["key"] for row in written}) == len(written) == N_TEXTS


def test_every_text_is_scored_and_the_unsteered_one_for_each_persona(finished):
    scored = rows(finished, "eval_results.json")
    assert len(scored) == N_EVALUATIONS
    baseline = [row for row in scored if row["condition"] == "baseline"]
    loud, numeric = (
        [row["perplexity"] for row in baseline if row["persona"] == name] for name in ("loud", "numeric")
    )
    assert len(loud) == N_PER_CELL
    assert loud == numeric
    table = load_json(finished / "aggregated_results.json")["conditions"]
    assert len(table) == N_CELLS - 1 + N_PERSONAS
    assert {entry["n"] for entry in table} == {N_PER_CELL}


def test_a_sample_of_the_pairs_is_kept_with_what_was_read(tiny, finished):
    pairs = load_tensors(finished / "training_data.pt")
    assert (pairs["H_source"].shape, pairs["H_target"].shape) == ((5000, 32), (5000, 48))
    assert len(pairs["texts"]) == len(pairs["documents"]) == 5000 < pairs["n_pairs"]
    extractor = PersonaTransferExperiment({**tiny, "output_dir": str(finished)}).inputs.target.extractor
    for row in (0, 1234, 4999):
        assert torch.allclose(extractor.extract(pairs["texts"][row]), pairs["H_target"][row], atol=1e-4)


def test_a_run_returns_the_aggregated_table_and_its_frame(tiny, out, no_drawing):
    experiment = PersonaTransferExperiment({**tiny, "output_dir": str(out)})
    assert experiment.run() == load_json(out / "aggregated_results.json")["conditions"]
    frame = experiment.results_frame()
    assert list(frame["output"]) == [row["output"] for row in rows(out, "eval_results.json")]
    assert len((out / "results.csv").read_text().splitlines()) > N_EVALUATIONS


def test_phases_one_by_one_equal_a_whole_run(tiny, finished, tmp_path, no_drawing):
    for phase in "12345":
        assert run(tmp_path / "out", tiny, "--phase", phase) == 0
    found, expected = artifacts(tmp_path / "out"), artifacts(finished)
    assert found.keys() == expected.keys()
    assert is_close(found, expected)


def test_the_log_says_how_far_a_long_phase_is(tiny, tmp_path, monkeypatch, no_drawing):
    monkeypatch.setattr(progress, "LOG_EVERY", 0.005)
    assert run(tmp_path / "out", tiny, "--phase", "2") == 0
    log = (tmp_path / "out" / "experiment.log").read_text()
    assert re.search(r"phase 2 of 5, learn mapping; reading pairs: \d+ of 60 texts done, \d+ left", log)


def test_a_written_configuration_can_be_run_again(finished, tmp_path):
    arguments = ["--config", str(finished / "config.json"), "--output-dir", str(tmp_path / "out")]
    assert main([*arguments, "--phase", "1"]) == 0
    expected = {**load_json(finished / "config.json"), "output_dir": str(tmp_path / "out")}
    assert load_json(tmp_path / "out" / "config.json") == expected
    assert load_json(tmp_path / "out" / "preflight.json") == load_json(finished / "preflight.json")


def test_layers_are_searched_and_used(tiny, tmp_path):
    auto = {**tiny, **AUTO, "search_tokens": 800, "search_source_layers": [1, 2], "alpha_values": [4.0]}
    for phase in "123":
        assert run(tmp_path / "out", auto, "--phase", phase) == 0
    search = load_json(tmp_path / "out" / "layer_search.json")
    assert search["source_layers"] == [1, 2]
    assert 800 <= search["n_tokens"]["source"] < 1200
    scores = torch.tensor(search["score"])
    row, column = divmod(int(scores.argmax()), scores.shape[1])
    assert search["best"] == [search["source_layers"][row], search["target_layers"][column]]
    assert load_tensors(tmp_path / "out" / "persona_vectors.pt")["layer_pairs"] == [search["best"]]
    assert (tmp_path / "out" / "layer_search.png").stat().st_size > 10_000


def test_a_phase_alone_searches_no_layers_and_names_the_phase_before_it(tiny, tmp_path, capsys):
    assert run(tmp_path / "out", {**tiny, **AUTO}, "--phase", "2") == 2
    assert "layer_search.json is missing" in error_lines(capsys)[0]


def test_what_failed_is_repeated_at_the_end_of_a_run(finished):
    failed = [
        check["name"]
        for check in load_json(finished / "preflight.json")["checks"]
        if check["status"] == "fail" and not check["technical"]
    ]
    closing = (finished / "experiment.log").read_text().split("report: ")[1]
    assert failed
    assert all(f"{name} failed" in closing for name in failed)


def test_ray_gives_what_this_process_gives(tiny, finished, out):
    pytest.importorskip("ray")
    for path in out.glob("generation*"):
        path.unlink()
    settings = {**tiny, "generation_batch_size": 4, "executor": {"kind": "ray", "n_workers": 1}}
    assert run(out, settings, "--phase", "4") == 0
    assert texts(out) == texts(finished)


# A dry run


@pytest.mark.parametrize("use_gpt4", [False, True])
def test_a_dry_run_counts_and_writes_nothing(use_gpt4, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_KEY", "any")
    judge = {"api_key_env": "LOCAL_KEY", "usd_per_million_tokens": 10.0}
    assert run(tmp_path / "out", {**tiny, "use_gpt4": use_gpt4, "judge": judge}, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "texts for the map: 60 neutral text" in shown
    assert f"generations: {N_TEXTS} ({N_CELLS - 1} steered cells and 1 baseline, 3 prompts x 2 seeds" in shown
    assert f"at most {N_TEXTS * 6} tokens" in shown
    assert f"evaluations: {N_EVALUATIONS}, " in shown
    n_resampled = N_PERSONAS * 2 * 3 * N_QUESTIONS
    assert f"vectors of resampled texts: {n_resampled} generations" in shown
    n_judgements = use_gpt4 * (N_TEXTS + N_EVALUATIONS + n_resampled)
    assert f"judgements: {n_judgements}, about {n_judgements * 200 * 10 / 1e6:.2f} USD" in shown


def test_a_dry_run_counts_what_a_finished_run_holds_and_leaves_it_alone(tiny, out, capsys):
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert run(out, tiny, "--dry-run") == 0
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    shown = capsys.readouterr().out
    assert f"3 prompts x 2 seeds each), {N_TEXTS} of them cached, " in shown
    assert f"evaluations: {N_EVALUATIONS}, {N_EVALUATIONS} of them cached, about 0.0 min" in shown
    assert "already mapped" in shown
    assert "preflight:" not in shown
    assert "vectors as detectors" not in shown
    assert run(out, {**tiny, "alpha_values": [1.0, 4.0, 9.0]}, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"{N_TEXTS} of them cached" in shown
    assert f"preflight: {2 * (1 + 3 * N_PERSONAS) * 24} generations" in shown


def test_a_dry_run_counts_searches_responses_and_sums_and_makes_none(band, tiny, tmp_path, capsys):
    assert run(tmp_path / "out", band, "--dry-run") == 0
    shown = capsys.readouterr().out
    n_cells, n_questions = 1 + N_PERSONAS * 3, len(load_prompts("development_questions"))
    assert f"choice of alphas: {n_questions * n_cells} generations" in shown
    n_drawn = (1 + 3) + 1  # mapped and three shuffled maps; native: all at one alpha
    assert f"generations: {N_PER_CELL * (1 + N_PERSONAS * n_drawn)} " in shown
    assert "responses that the map is learnt from: 60" in shown
    assert "responses that vectors are made from: 16" in shown
    assert "2 layer pairs with sums of " in shown
    assert run(tmp_path / "out", {**tiny, **AUTO, "search_source_layers": [1, 2]}, "--dry-run") == 0
    assert "layer search: 2 x 4 layer pairs, 50000 tokens" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# Bad input


PROMPT = "The first thing I do is"
LEAKING = {"x": {**LOUD, "negative_texts": [f"{PROMPT} a joke."]}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_ix": 3}, "did you mean 'layer_idx'"),
        ({"source_layer_idx": 4}, "layer_idx 4 is out of range: the model has 4 decoder blocks"),
        ({"source_model": "/no/such/folder"}, "/no/such/folder"),
        ({"source_block_path": "model.nowhere"}, "model.nowhere"),
        ({"device": "warp"}, "'warp'"),
        ({"use_gpt4": True, "judge": {"api_key_env": "ABSENT_KEY"}}, "ABSENT_KEY is not set"),
        ({"neutral_text": "short.txt"}, "gives 0 passages"),
        ({"n_training_samples": 1301}, "1301 are wanted; lower n_training_samples"),
        ({"persona_datasets": LEAKING, "n_test_prompts": 1, "test_prompts": [PROMPT]}, "with a test prompt"),
        ({"max_new_tokens": CONTEXT}, "max_new_tokens"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_ends_with_status_2_before_anything_is_written(
    change, named, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Too short.")
    assert run(tmp_path / "out", {**tiny, **change}) == 2
    lines = error_lines(capsys)
    assert 1 <= len(lines) <= 2, lines
    assert named in "\n".join(lines)
    assert not (tmp_path / "out").exists()


# Real models


@pytest.fixture(scope="module")
def real(all_threads, tmp_path_factory):
    """A base model that goes on with texts, much reduced, on the packaged models."""
    reduced = {
        "source_model": "smollm2-135m-instruct",
        "target_model": "gemma-3-270m",
        "source_layer_idx": 14,
        "target_layer_idx": 8,
        "neutral_text": "wikipedia-sample",
        "lambda_values": PROTOCOL["lambda_values"],
        "lambda_unit": "relative",
        "persona_position": "mean",
        "alpha_unit": "residual_norm",
        "n_seeds": 1,
        "n_training_samples": 60,
        "personas": ["formal", "cheerful"],
        "n_test_prompts": 4,
        "controls": [],
        "check_source_vectors": False,
        "alpha_values": [0.35],
        "max_new_tokens": 8,
        "probe": False,  # reads thousands of texts; tests of scoring have it
        "output_dir": str(tmp_path_factory.mktemp("real") / "out"),
    }
    experiment = PersonaTransferExperiment(reduced)
    return experiment.folder.path, experiment.run(), experiment


@pytest.mark.real_models
def test_an_experiment_runs_on_the_packaged_models(real):
    output_dir, table, _ = real
    assert visible_files(output_dir) == {*ARTIFACTS, "off_target.png"}
    technical = [check for check in load_json(output_dir / "preflight.json")["checks"] if check["technical"]]
    assert len(technical) == 8
    assert [check for check in technical if check["status"] != "pass"] == []
    assert {(entry["condition"], entry["persona"]) for entry in table} == {
        (condition, persona) for condition in ("baseline", *METHODS) for persona in ("formal", "cheerful")
    }
    for entry in table:
        assert 0 <= entry["trait_probability"]["mean"] <= 1
        assert entry["trait_probability"]["n"] + entry["trait_probability"]["missing"] == entry["n"] == 4
        assert entry["classifier_auc"] >= {"formal": 0.95, "cheerful": 0.92}[entry["persona"]]
        assert entry["perplexity"]["mean"] > 1
        assert entry["independent_perplexity"]["mean"] > 1
    validation = load_json(output_dir / "scorer_validation.json")["personas"]
    assert all(set(found) == {"classifier"} for found in validation.values())
    assert min(validation["formal"]["classifier"]["auc"].values()) >= 0.9
    verdict = load_json(output_dir / "verdict.json")["personas"]["formal"]
    scored = verdict["scorers"]["classifier"]
    assert (verdict["verdict"], scored["reason"], scored["n_prompts"]) == ("inconclusive", "few prompts", 4)
    by_condition = defaultdict(list)
    for row in rows(output_dir):
        if row["persona"] in (None, "formal"):
            by_condition[row["condition"]].append(row["output"])
    assert all(a != b for a, b in pairwise(by_condition.values()))
    assert all(output.strip() for output in by_condition["baseline"])


@pytest.mark.real_models
def test_a_real_map_predicts_held_out_pairs_and_carries_personas(real):
    cv = load_json(real[0] / "cv_results.json")
    assert cv["pairs"]["n_texts"] == 60
    assert cv["pairs"]["fraction_aligned"] > 0.85
    assert cv["n_rows"] > 30 * 60
    assert cv["best_r2_standardised"] > 0.25 > 0.05 > cv["shuffled_r2"]
    assert cv["retrieval_accuracy"] > 0.3
    naive = re.compile("zero_pad|interpolate|random_proj|shuffled_pairs_.")
    for entry in load_json(real[0] / "persona_similarities.json")["personas"].values():
        for cosines in (entry["cosine_to_oracle"], entry["cosine_without_massive"]):
            highest = max(abs(cosine) for name, cosine in cosines.items() if naive.fullmatch(name))
        assert cosines["ridge_mapped"] > 0.3 + max(highest, entry["highest_cosine_to_other_oracles"])


@pytest.mark.real_models
def test_real_pairs_equal_the_prefixes_read_alone(real):
    """Where both models tokenise the prefix as they did the passage, which is nearly everywhere."""
    output_dir, _, experiment = real
    data = load_tensors(output_dir / "training_data.pt")
    chosen = list(range(0, len(data["texts"]), len(data["texts"]) // 12))
    prefixes = [data["texts"][row] for row in chosen]
    for side in ("source", "target"):
        alone = getattr(experiment.inputs, side).extractor.extract_batch(prefixes)
        expected = data[f"H_{side}"][chosen]
        difference = (alone - expected).norm(dim=1) / expected.norm(dim=1)
        assert difference.median() < 1e-4
        assert (difference < 1e-4).sum() >= len(chosen) - 2

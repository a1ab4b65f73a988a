import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partialmethod
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch
from chat_server import chat_server, completion
from tiny_runs import (
    ARTIFACTS,
    LOUD,
    N_PROMPTS,
    N_SEEDS,
    NUMERIC,
    content,
    error_lines,
    run,
    tiny_settings,
    visible_files,
)
from transformers import BertConfig, BertLMHeadModel

from ablations.layers import _SampleRun, ablate_samples
from baseline_methods import METHODS
from decoding import loop as decoding
from decoding import output_head
from evaluation import continuation_perplexities
from experiment.ray_executor import RayExecutor
from model_loading import load_model
from phases import check_setup as preflight
from phases.choose_alphas import trait_costs
from run_experiment import PersonaTransferExperiment, main
from scoring.gpt_judge import GPTJudge
from steered_generation import SteeredGenerator
from support.artifacts import load_json, load_tensors, save_tensors
from support.errors import InputError
from support.journal import Journal
from support.tiny_models import CONTEXT, VOCAB_SIZE, tiny_tokenizer
from texts.personas import load_prompts

ROOT = Path(__file__).parent.parent
N_PERSONAS, N_ALPHAS = 2, 2
N_PER_CELL = N_PROMPTS * N_SEEDS
N_CELLS = len(METHODS) * N_PERSONAS * N_ALPHAS + 1
N_TEXTS = N_CELLS * N_PER_CELL
N_DEVELOPMENT = len(load_prompts("development")) * (1 + N_PERSONAS * N_ALPHAS)  # texts of the preflight
MAPS = ("procrustes", "reduced_rank", "shuffled_pairs_1", "shuffled_pairs_2", "shuffled_pairs_3")
N_EVALUATIONS = (N_CELLS - 1 + N_PERSONAS) * N_PER_CELL


@pytest.fixture(scope="module")
def settings(model_folders, tmp_path_factory):
    return tiny_settings(model_folders, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The output of a whole run; never changed."""
    output_dir = tmp_path_factory.mktemp("finished") / "out"
    assert run(output_dir, settings) == 0
    return output_dir


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished run, with an empty log."""
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "experiment.log").unlink()
    return tmp_path / "out"


def rows(output_dir, name="generation_results.json"):
    return load_json(output_dir / name)["rows"]


def texts(output_dir):
    """Return key -> text; keys are as stable as what they are made from."""
    return {row["key"]: row["output"] for row in rows(output_dir)}


def n_new(output_dir, phase=4):
    """Return how many texts or evaluations each run was said to make, oldest first."""
    log = (output_dir / "experiment.log").read_text()
    pattern = {4: r"phase 4 done.*: (\d+) new texts", 5: r"phase 5 done.* texts, (\d+) of them new"}[phase]
    return [int(number) for number in re.findall(pattern, log)]


def is_close(value, other):
    """Tell whether two contents are equal but for rounding, which the shapes of batches decide."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(is_close(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(is_close, value, other))
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-4, abs_tol=1e-6)
    return value == other


def assert_equal_artifacts(output_dir, other, except_for=()):
    for name in ARTIFACTS - {"experiment.log", "config.json", *except_for}:
        assert is_close(content(output_dir / name), content(other / name)), name


# A whole run


def test_run_leaves_every_artifact_and_nothing_else(finished):
    assert visible_files(finished) == ARTIFACTS


def test_grid_is_complete_and_the_baseline_is_written_once(finished):
    made = rows(finished)
    assert len(made) == len({row["key"] for row in made}) == N_TEXTS
    cells = Counter((row["condition"], row["persona"], row["alpha"]) for row in made)
    expected = [
        (method, name, alpha) for method in METHODS for name in ("loud", "numeric") for alpha in (1.0, 4.0)
    ]
    assert cells == dict.fromkeys([("baseline", None, None), *expected], N_PER_CELL)
    for cell in cells:
        pairs = {
            (row["prompt_idx"], row["seed"])
            for row in made
            if (row["condition"], row["persona"], row["alpha"]) == cell
        }
        assert pairs == {(prompt, seed) for prompt in range(N_PROMPTS) for seed in range(N_SEEDS)}


def test_every_condition_changes_some_text(finished):
    unsteered = {(row["prompt"], row["seed"]): row["output"] for row in rows(finished)[:N_PER_CELL]}
    for method in METHODS:
        steered = [row for row in rows(finished) if row["condition"] == method and row["alpha"] == 4.0]
        assert any(row["output"] != unsteered[row["prompt"], row["seed"]] for row in steered), method


@pytest.mark.parametrize("method", ["random_direction", "shuffled_pairs"])
def test_vectors_made_by_chance_take_turns_from_prompt_to_prompt(method, settings, out):
    content = load_tensors(out / "persona_vectors.pt")
    for vectors in content["vectors"].values():
        for draw in (1, 3):
            vectors[f"{method}_{draw}"].zero_()
    save_tensors(out / "persona_vectors.pt", content)
    assert run(out, {**settings, "methods": [method, "oracle"], "alpha_values": [40.0]}, "--phase", "4") == 0
    written = rows(out)
    unsteered = {(row["prompt_idx"], row["seed"]): row["output"] for row in written[:N_PER_CELL]}
    changed = {
        row["prompt_idx"]
        for row in written
        if row["condition"] == method and row["output"] != unsteered[row["prompt_idx"], row["seed"]]
    }
    assert changed == {prompt for prompt in range(N_PROMPTS) if prompt % 3 == 1}


def test_evaluation_covers_each_text_and_the_baseline_for_each_persona(finished):
    evaluated = rows(finished, "eval_results.json")
    assert len(evaluated) == N_EVALUATIONS
    baseline = [row for row in evaluated if row["condition"] == "baseline"]
    by_persona = {
        name: [row["perplexity"] for row in baseline if row["persona"] == name]
        for name in ("loud", "numeric")
    }
    assert len(by_persona["loud"]) == N_PER_CELL
    assert by_persona["loud"] == by_persona["numeric"]
    table = load_json(finished / "aggregated_results.json")["conditions"]
    assert len(table) == N_CELLS - 1 + N_PERSONAS
    assert {entry["n"] for entry in table} == {N_PER_CELL}


def test_all_vectors_have_unit_norm_and_the_targets_width(finished):
    content = load_tensors(finished / "persona_vectors.pt")
    assert set(content["vectors"]) == set(content["source_vectors"]) == {"loud", "numeric"}
    for name, vectors in content["vectors"].items():
        drawn = [
            f"{control}_{draw}" for control in ("other_persona", "random_direction") for draw in (1, 2, 3)
        ]
        assert list(vectors) == [*METHODS, *MAPS, *drawn]
        assert content["source_vectors"][name].shape == (32,)
        for vector in [*vectors.values(), content["source_vectors"][name]]:
            assert vector.norm().item() == pytest.approx(1, abs=1e-5)
        assert {tuple(vector.shape) for vector in vectors.values()} == {(48,)}


def test_training_data_are_a_sample_of_pairs_with_what_was_read(settings, finished):
    pairs = load_tensors(finished / "training_data.pt")
    assert (pairs["H_source"].shape, pairs["H_target"].shape) == ((5000, 32), (5000, 48))
    assert len(pairs["texts"]) == len(pairs["documents"]) == 5000 < pairs["n_pairs"]
    experiment = PersonaTransferExperiment({**settings, "output_dir": str(finished)})
    for row in (0, 1234, 4999):
        last = experiment.inputs.target.extractor.extract(pairs["texts"][row])
        assert torch.allclose(last, pairs["H_target"][row], atol=1e-4)


def test_pairs_of_last_tokens_alone(settings, finished, tmp_path):
    assert run(tmp_path / "out", {**settings, "positions": "last"}, "--phase", "2") == 0
    pairs = load_tensors(tmp_path / "out" / "training_data.pt")
    assert pairs["n_pairs"] == len(set(pairs["texts"])) == 60
    assert load_json(tmp_path / "out" / "cv_results.json")["n_rows"] == 60


def test_technical_checks_pass_and_the_chosen_lambda_is_checked(finished):
    checks = load_json(finished / "preflight.json")["checks"]
    assert all(check["status"] == "pass" for check in checks if check["technical"])
    log = (finished / "experiment.log").read_text()
    assert re.search(r"preflight (pass|fail) +lambda_by_cross_validation: .*held-out R2", log)


def test_texts_of_the_preflight_are_journalled(finished):
    lines = (finished / "generation_journal.jsonl").read_text().splitlines()[1:]
    development = [
        row
        for row in (json.loads(line)["row"] for line in lines)
        if row["prompt"] in load_prompts("development")
    ]
    cells = Counter((row["condition"], row["persona"], row["alpha"]) for row in development)
    steered = [("oracle", name, alpha) for name in ("loud", "numeric") for alpha in (1.0, 4.0)]
    n_prompts = len(load_prompts("development"))
    assert cells == dict.fromkeys([("baseline", None, None), *steered], n_prompts)
    assert not {row["key"] for row in development} & texts(finished).keys()


def test_log_reports_each_phase(finished):
    log = (finished / "experiment.log").read_text()
    places = [log.index(f"phase {number} done") for number in range(1, 6)]
    assert places == sorted(places)
    assert "| ridge_mapped |" in log


def test_run_returns_the_aggregated_table(settings, out):
    table = PersonaTransferExperiment({**settings, "output_dir": str(out)}).run()
    assert table == load_json(out / "aggregated_results.json")["conditions"]


def test_phases_one_by_one_equal_a_whole_run(settings, finished, tmp_path):
    for phase in range(1, 6):
        assert run(tmp_path / "out", settings, "--phase", str(phase)) == 0
    assert_equal_artifacts(tmp_path / "out", finished)


@pytest.mark.parametrize(
    ("phase", "missing", "needed"),
    [
        (3, "ridge_mapping.pt", 2),
        (4, "persona_vectors.pt", 3),
        (5, "generation_results.json", 4),
    ],
)
def test_phase_alone_names_the_phase_that_is_missing(phase, missing, needed, settings, out, capsys):
    (out / missing).unlink()
    (out / "persona_vectors.pt").unlink(missing_ok=True)
    assert run(out, settings, "--phase", str(phase)) == 2
    (line,) = error_lines(capsys)
    assert missing in line
    assert f"run phase {needed} first" in line


def test_phase_4_on_nothing_names_phase_3(settings, tmp_path, capsys):
    assert run(tmp_path / "out", settings, "--phase", "4") == 2
    assert "run phase 3 first" in capsys.readouterr().err


# A second run


def test_second_run_writes_nothing_anew(settings, finished, out):
    assert run(out, settings) == 0
    assert (n_new(out), n_new(out, 5)) == ([0], [0])
    assert_equal_artifacts(out, finished)


OTHER_LOUD = {**LOUD, "positive_texts": [text.replace(".", "!") for text in LOUD["positive_texts"]]}


@pytest.mark.parametrize(
    ("change", "n_expected", "n_kept"),
    [
        ({"alpha_values": [1.0, 2.0, 4.0]}, N_TEXTS // 2 - N_PER_CELL // 2, N_TEXTS),
        ({"alpha_values": [4.0]}, 0, N_TEXTS // 2 + N_PER_CELL // 2),
        ({"n_seeds": 3}, N_CELLS * N_PROMPTS, N_TEXTS),
        ({"n_test_prompts": 4}, N_CELLS * N_SEEDS, N_TEXTS),
        ({"methods": ["oracle", "zero_pad"]}, 0, N_PER_CELL * (2 * N_PERSONAS * N_ALPHAS + 1)),
        ({"persona_datasets": {"numeric": NUMERIC}}, 0, N_TEXTS // 2 + N_PER_CELL // 2),
        (
            {"persona_datasets": {"loud": OTHER_LOUD, "numeric": NUMERIC}},
            (N_TEXTS - N_PER_CELL) // 2,
            (N_TEXTS + N_PER_CELL) // 2,
        ),
        ({"max_new_tokens": 7}, N_TEXTS, 0),
    ],
    ids=[
        "an alpha more",
        "an alpha less",
        "a seed more",
        "a prompt more",
        "methods less",
        "a persona less",
        "texts of one persona",
        "longer texts",
    ],
)
def test_changed_setting_makes_only_what_it_touches(change, n_expected, n_kept, settings, finished, out):
    assert run(out, {**settings, **change}) == 0
    before, after = texts(finished), texts(out)
    assert n_new(out) == [n_expected]
    assert len(after) == n_expected + n_kept
    kept = before.keys() & after.keys()
    assert len(kept) == n_kept
    assert all(after[key] == before[key] for key in kept)


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"lambda_values": [0.2, 2.0, 20.0]}, {"ridge_mapped"}),
        ({"n_training_samples": 70}, {"ridge_mapped"}),
        ({"source_layer_idx": 2}, {*METHODS} - {"oracle"}),
        ({"target_layer_idx": 1}, {*METHODS}),
        ({"persona_position": "mean"}, {*METHODS}),
    ],
    ids=lambda value: "-".join(sorted(value)),
)
def test_change_touches_only_the_methods_that_depend_on_it(change, touched, settings, finished, out):
    assert run(out, {**settings, **change}) == 0
    before = texts(finished)
    assert {row["condition"] for row in rows(out) if row["key"] not in before} == touched
    assert all(row["output"] == before[row["key"]] for row in rows(out) if row["condition"] not in touched)


@pytest.mark.parametrize("name", ["ridge_mapping.pt", "training_data.pt"])
def test_persona_can_be_changed_after_an_earlier_artifact_is_lost(name, settings, out):
    (out / name).unlink()
    changed = {**settings, "persona_datasets": {"loud": OTHER_LOUD, "numeric": NUMERIC}}
    assert run(out, changed) == 0


def test_renamed_persona_keeps_its_texts_under_the_new_name(settings, finished, out):
    renamed = {**settings, "persona_datasets": {"shouting": LOUD, "numeric": NUMERIC}}
    assert run(out, renamed) == 0
    assert n_new(out) == [0]
    assert texts(out) == texts(finished)
    assert {row["persona"] for row in rows(out)} == {None, "shouting", "numeric"}
    table = load_json(out / "aggregated_results.json")["conditions"]
    assert {(entry["persona"], entry["n"]) for entry in table} == {
        ("shouting", N_PER_CELL),
        ("numeric", N_PER_CELL),
    }


def test_personas_with_equal_texts_have_cells_of_their_own(settings, finished, out):
    twins = {**settings, "persona_datasets": {"loud": LOUD, "twin": LOUD}}
    assert run(out, twins) == 0
    by_persona = {
        name: [row["output"] for row in rows(out) if row["persona"] == name] for name in ("loud", "twin")
    }
    assert by_persona["loud"] == by_persona["twin"]
    assert len(by_persona["loud"]) == (N_TEXTS - N_PER_CELL) // 2


def test_reordered_prompts_make_nothing_anew_and_stand_at_their_new_places(settings, out):
    prompts = load_prompts("test")[:N_PROMPTS][::-1]
    assert run(out, {**settings, "test_prompts": prompts}, "--phase", "4") == 0
    assert n_new(out) == [0]
    assert all(prompts[row["prompt_idx"]] == row["prompt"] for row in rows(out))


class Killed(Exception):
    pass


@pytest.mark.parametrize("n_batches", [0, 1, 8])
def test_killed_run_resumes_to_the_same_texts(n_batches, settings, finished, out, monkeypatch):
    for path in out.iterdir():
        if re.match(r"\.|generation|eval|aggregated|figure1", path.name):
            path.unlink()
    settings = {**settings, "generation_batch_size": N_PER_CELL}
    append = Journal.append
    calls = []

    def killed(self, rows):
        calls.append(len(rows))
        if len(calls) > n_batches:
            raise Killed
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", killed)
        with pytest.raises(Killed):
            run(out, settings)
    assert not (out / "generation_results.json").exists()
    assert len((out / "generation_journal.jsonl").read_text().splitlines()) == 1 + n_batches * N_PER_CELL
    assert run(out, settings, "--phase", "5") == 2
    assert run(out, settings) == 0
    assert n_new(out) == [N_TEXTS - n_batches * N_PER_CELL]
    assert_equal_artifacts(out, finished)


def test_a_stopped_run_goes_on_with_the_batches_of_one_that_was_not(settings, tmp_path, monkeypatch):
    """In bfloat16 a text depends on those that share its batch."""
    settings = {**settings, "dtype": "bfloat16", "generation_batch_size": 7}
    append, batches = Journal.append, []

    def recorded(self, rows, stop_after=math.inf):
        if self.path.name == "generation_journal.jsonl":
            if len(batches) >= stop_after:
                raise Killed
            batches.append([row["key"] for row in rows])
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", recorded)
        assert run(tmp_path / "whole", settings) == 0
        whole, batches = batches, []
        patch.setattr(Journal, "append", partialmethod(recorded, stop_after=len(whole) // 2))
        with pytest.raises(Killed):
            run(tmp_path / "stopped", settings)
        patch.setattr(Journal, "append", recorded)
        assert run(tmp_path / "stopped", settings) == 0
    assert batches == whole
    assert len(whole) > 4
    assert texts(tmp_path / "stopped") == texts(tmp_path / "whole")


KILLED_RUN = """
import sys
from run_experiment import main
sys.exit(main(["--config", sys.argv[1]]))
"""


def n_lines(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_run_killed_by_the_system_loses_no_text_that_was_written(settings, finished, tmp_path):
    out = tmp_path / "out"
    config = {**settings, "generation_batch_size": 2, "output_dir": str(out)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    journal, n_kept = out / "generation_journal.jsonl", 0
    for least in (3, N_DEVELOPMENT + 30, N_DEVELOPMENT + 80):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_RUN, tmp_path / "config.json"],
            cwd=Path(__file__).parent.parent,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 120
        while n_lines(journal) < least and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert n_lines(journal) >= max(least, n_kept)
        n_kept = n_lines(journal)
    assert run(out, settings) == 0
    # Its header and perhaps a torn line are no texts.
    assert n_new(out)[-1] <= N_TEXTS - (n_kept - 2 - N_DEVELOPMENT)
    assert texts(out) == texts(finished)


def test_second_run_in_the_same_folder_is_refused(settings, out, capsys):
    with Journal(out / "generation_journal.jsonl", "another run"):
        assert run(out, settings) == 2
    (line,) = error_lines(capsys)
    assert "generation_journal" in line


def test_other_sampling_keeps_the_journal_aside_and_takes_it_back(settings, finished, out):
    assert run(out, {**settings, "temperature": 0.5}) == 0
    assert len(list(out.glob("generation_journal.*.jsonl"))) == 1
    assert not texts(out).keys() & texts(finished).keys()
    assert run(out, settings) == 0
    assert n_new(out) == [N_TEXTS, 0]
    assert texts(out) == texts(finished)


def test_fresh_run_makes_everything_again(settings, finished, out):
    journal = out / "generation_journal.jsonl"
    cache_key = json.loads(journal.read_text().splitlines()[0])["cache_key"]
    with Journal(journal, cache_key) as tampered:
        tampered.append([{**row, "output": "tampered"} for row in tampered.rows.values()])
    assert run(out, settings, "--phase", "4") == 0
    assert set(texts(out).values()) == {"tampered"}
    assert run(out, settings, "--fresh") == 0
    assert (n_new(out), n_new(out, 5)) == ([0, N_TEXTS], [N_EVALUATIONS])
    assert_equal_artifacts(out, finished, except_for=["preflight.json"])


def test_later_phases_leave_the_preflight_alone(settings, finished, out):
    for phase in ("1", "2"):
        assert run(out, settings, "--fresh", "--phase", phase) == 0
    assert content(out / "preflight.json") == content(finished / "preflight.json")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_do_not_depend_on_batch_sizes(batch_size, settings, finished, out):
    (out / "generation_journal.jsonl").unlink()
    assert run(out, {**settings, "generation_batch_size": batch_size}, "--phase", "4") == 0
    assert texts(out) == texts(finished)


def test_written_configuration_can_be_run_again(finished, out, tmp_path):
    arguments = ["--config", str(finished / "config.json"), "--output-dir"]
    assert main([*arguments, str(out)]) == 0
    assert n_new(out) == [0]
    assert main([*arguments, str(tmp_path / "elsewhere"), "--phase", "1"]) == 0
    written = load_json(tmp_path / "elsewhere" / "config.json")
    assert written == {**load_json(finished / "config.json"), "output_dir": str(tmp_path / "elsewhere")}


# Layers and ablations


def test_auto_layers_are_searched_for_once_and_used(settings, tmp_path, caplog):
    auto = {**settings, "layer_idx": "auto", "search_tokens": 800, "search_source_layers": [1, 2]}
    del auto["source_layer_idx"], auto["target_layer_idx"]
    for _ in range(2):
        assert run(tmp_path / "out", auto) == 0
    found = load_json(tmp_path / "out" / "layer_search.json")
    assert found["source_layers"] == [1, 2]
    assert 800 <= found["n_tokens"]["source"] < 1200
    scores = torch.tensor(found["score"])
    row, column = divmod(int(scores.argmax()), scores.shape[1])
    assert found["best"] == [found["source_layers"][row], found["target_layers"][column]]
    log = (tmp_path / "out" / "experiment.log").read_text()
    assert log.count(f"source layer {found['best'][0]}, target layer {found['best'][1]}") == 2
    assert n_new(tmp_path / "out") == [N_TEXTS, 0]
    chosen = {**settings, "source_layer_idx": found["best"][0], "target_layer_idx": found["best"][1]}
    assert run(tmp_path / "chosen", chosen) == 0
    assert texts(tmp_path / "chosen") == texts(tmp_path / "out")
    assert (tmp_path / "out" / "layer_search.png").stat().st_size > 10_000


def test_phase_alone_does_not_search(settings, tmp_path, capsys):
    auto = {**settings, "layer_idx": "auto"}
    del auto["source_layer_idx"], auto["target_layer_idx"]
    assert run(tmp_path / "out", auto, "--phase", "2") == 2
    assert "layer_search.json is missing" in error_lines(capsys)[0]


def test_ablation_of_samples_needs_fast_tokenizers(settings, tmp_path, monkeypatch):
    experiment = PersonaTransferExperiment({**settings, "output_dir": str(tmp_path / "out")})
    monkeypatch.setattr(type(experiment.inputs.target.tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="needs fast tokenizers on both sides"):
        ablate_samples(experiment.inputs, experiment.folder)


def test_block_path_is_part_of_what_an_artifact_is_made_from(settings, finished, tmp_path):
    plain = PersonaTransferExperiment({**settings, "output_dir": str(finished)})
    named = PersonaTransferExperiment(
        {**settings, "output_dir": str(finished), "source_block_path": "model.layers"}
    )
    assert plain.inputs.source.fingerprint != named.inputs.source.fingerprint
    assert plain.inputs.target.fingerprint == named.inputs.target.fingerprint


@pytest.mark.parametrize("flags", [("--phase", "2"), ("--dry-run",)])
def test_ablation_beside_phases_is_refused(flags, settings, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", settings, "--ablate", "layers", *flags)


def test_dry_run_does_not_search(settings, tmp_path, capsys):
    auto = {**settings, "layer_idx": "auto", "search_source_layers": [1, 2]}
    del auto["source_layer_idx"], auto["target_layer_idx"]
    assert run(tmp_path / "out", auto, "--dry-run") == 0
    assert "layer search: 64 x 192 dimensions on 50000 tokens" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_layer_ablation_steers_at_every_pair_and_resumes(settings, tmp_path, monkeypatch):
    ablation = {
        **settings,
        "ablation_layer_pairs": [[0, 3], [2, 1]],
        "methods": ["ridge_mapped", "shuffled_pairs"],
    }
    assert run(tmp_path / "out", ablation, "--ablate", "layers") == 0
    found = load_json(tmp_path / "out" / "ablation_layers.json")["layer_pairs"]
    assert [(entry["source_layer"], entry["target_layer"]) for entry in found] == [(0, 3), (2, 1)]
    for entry in found:
        conditions = {(row["condition"], row["alpha"]) for row in entry["conditions"]}
        assert conditions == {("baseline", None), ("ridge_mapped", 1.0), ("shuffled_pairs", 1.0)}
    folder = tmp_path / "out" / "ablation_layers"
    assert {row["prompt"] for row in rows(folder / "2_1")} == set(load_prompts("development"))
    texts_before = texts(folder / "2_1")
    monkeypatch.setattr("ablations.layers.collect_in_chunks", None)
    assert run(tmp_path / "out", ablation, "--ablate", "layers") == 0
    assert texts(folder / "2_1") == texts_before
    assert (tmp_path / "out" / "experiment.log").read_text().count(": 0 new texts") == 2


def test_sample_ablation_resumes_to_the_same_numbers(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("ablations.layers.N_HELD_OUT", 20)
    ablation = {**settings, "ablation_samples": [30, 60, 90]}
    assert run(tmp_path / "whole", ablation, "--ablate", "samples") == 0
    whole = load_json(tmp_path / "whole" / "ablation_samples.json")
    assert [(p["positions"], p["n_texts"]) for p in whole["points"]] == [
        (positions, n) for n in (30, 60, 90) for positions in ("last", "aligned")
    ]
    assert [point["n_pairs"] for point in whole["points"]][::2] == [30, 60, 90]

    saved = _SampleRun.save
    monkeypatch.setattr(_SampleRun, "save", lambda self, state: saved(self, state) or _stop_at(state, 60))
    assert run(tmp_path / "stopped", ablation, "--ablate", "samples") == 130
    monkeypatch.setattr(_SampleRun, "save", saved)
    monkeypatch.setattr(_SampleRun, "start", None)
    assert run(tmp_path / "stopped", ablation, "--ablate", "samples") == 0
    again = load_json(tmp_path / "stopped" / "ablation_samples.json")
    for point, other in zip(again["points"], whole["points"], strict=True):
        assert point.pop("positions") == other.pop("positions")
        for tested, expected in other.pop("held_out").items():
            assert point["held_out"][tested] == pytest.approx(expected, rel=1e-6)
        del point["held_out"]
        assert point == pytest.approx(other, rel=1e-6)
    assert (tmp_path / "stopped" / "figure3.png").stat().st_size > 10_000


def _stop_at(state, n_texts):
    if state["n_texts"] == n_texts:
        raise KeyboardInterrupt


# Strength


def test_residual_norm_is_the_unit_of_alpha(settings, finished, out):
    norm = load_json(finished / "persona_similarities.json")["residual_norm"]["median"]
    alphas = [alpha / norm for alpha in settings["alpha_values"]]
    assert run(out, {**settings, "alpha_values": alphas, "alpha_unit": "residual_norm"}) == 0
    assert [row["output"] for row in rows(out)] == [row["output"] for row in rows(finished)]


def test_texts_are_those_of_the_stored_vectors(settings, finished):
    vectors = load_tensors(finished / "persona_vectors.pt")["vectors"]
    experiment = PersonaTransferExperiment({**settings, "output_dir": str(finished)})
    chosen = [
        row for row in rows(finished) if row["condition"] == "ridge_mapped" and row["persona"] == "numeric"
    ]
    target = experiment.inputs.target
    for row in chosen[:: N_PER_CELL // 2]:
        with SteeredGenerator(target.model, target.tokenizer) as generator:
            generator.register_steering(2, vectors["numeric"]["ridge_mapped"], row["alpha"])
            assert generator.generate(row["prompt"], 6, seed=row["seed"]) == row["output"]


def test_steering_generated_positions_alone_writes_other_texts(settings, finished, out):
    assert run(out, {**settings, "steer_positions": "response"}, "--phase", "4") == 0
    everywhere, generated = ([row["output"] for row in rows(folder)] for folder in (finished, out))
    assert generated[:N_PER_CELL] == everywhere[:N_PER_CELL]
    assert generated != everywhere


def test_wrong_persona_is_steered_with_the_others_mapped_vector(settings, tmp_path):
    methods = ["other_persona", "ridge_mapped"]
    assert (
        run(
            tmp_path / "out",
            {**settings, "methods": methods, "alpha_values": {"loud": [4.0], "numeric": [1.0, 4.0]}},
        )
        == 0
    )
    vectors = load_tensors(tmp_path / "out" / "persona_vectors.pt")["vectors"]
    for name, other in (("loud", "numeric"), ("numeric", "loud")):
        for draw in (1, 2, 3):
            assert torch.equal(vectors[name][f"wrong_persona_{draw}"], vectors[other]["ridge_mapped"])
    cells = {}
    for row in rows(tmp_path / "out"):
        cells.setdefault((row["persona"], row["condition"], row["alpha"]), []).append(row["output"])
    assert set(cells) == {
        (None, "baseline", None),
        *(
            (name, method, alpha)
            for method in methods
            for name, alpha in (("loud", 4.0), ("numeric", 1.0), ("numeric", 4.0))
        ),
    }
    for name, other in (("loud", "numeric"), ("numeric", "loud")):
        assert cells[name, "other_persona", 4.0] == cells[other, "ridge_mapped", 4.0]
    assert cells["loud", "other_persona", 4.0] != cells["loud", "ridge_mapped", 4.0]


def test_doses_by_method_are_judged_each_at_its_own_and_all_at_the_oracles(settings, tmp_path):
    alphas = {"loud": {"oracle": 4.0, "ridge_mapped": 2.0}, "numeric": [1.0, 4.0]}
    methods = ["zero_pad", "ridge_mapped", "oracle"]
    assert run(tmp_path / "out", {**settings, "methods": methods, "alpha_values": alphas}) == 0
    cells = {(row["condition"], row["alpha"]) for row in rows(tmp_path / "out") if row["persona"] == "loud"}
    assert cells == {("zero_pad", 4.0), ("ridge_mapped", 2.0), ("ridge_mapped", 4.0), ("oracle", 4.0)}
    verdict = load_json(tmp_path / "out" / "verdict.json")
    assert verdict["personas"]["loud"]["alphas"] == {"zero_pad": 4.0, "ridge_mapped": 2.0, "oracle": 4.0}
    assert set(verdict["at_oracle_alpha"]) == {"loud"}
    assert set(verdict["at_oracle_alpha"]["loud"]["alphas"].values()) == {4.0}
    assert len(set(verdict["personas"]["numeric"]["alphas"].values())) == 1


def test_what_a_trait_costs_is_the_perplexity_of_its_labelled_texts(settings, tmp_path):
    labelled = {
        "labelled_positive_texts": [
            f"{number} {text}" for number in range(5) for text in LOUD["positive_texts"]
        ],
        "labelled_negative_texts": [
            f"{number} {text}" for number in range(5) for text in LOUD["negative_texts"]
        ],
    }
    datasets = {"loud": {**LOUD, **labelled}, "numeric": NUMERIC}
    experiment = PersonaTransferExperiment(
        {**settings, "persona_datasets": datasets, "output_dir": str(tmp_path / "out")}
    )
    inputs = experiment.inputs
    found = trait_costs(inputs, experiment.executor)
    assert set(found) == {"loud"}
    means = [
        fmean(
            math.log(value)
            for value in continuation_perplexities(
                inputs.source.model, inputs.source.tokenizer, [""] * 20, texts
            )
        )
        for texts in labelled.values()
    ]
    assert found["loud"] == pytest.approx(math.exp(means[0] - means[1]), rel=1e-4)


def test_ablation_of_blocks_searches_a_dose_for_each_band(settings, tmp_path, caplog):
    ablation = {
        **settings,
        "methods": ["shuffled_pairs", "oracle"],
        "alpha_unit": "residual_norm",
        "alpha_search": {
            "n_evaluations": 2,
            "n_seeds": 1,
            "max_perplexity_ratio": 1e6,
            "max_repetition_increase": 1,
        },
    }
    caplog.set_level(logging.INFO)
    assert run(tmp_path / "out", ablation, "--ablate", "blocks") == 0
    points = load_json(tmp_path / "out" / "ablation_blocks.json")["points"]
    bands = [[1], [0, 1, 2], [0, 1, 2, 3]]
    cells = [(name, method) for name in ("loud", "numeric") for method in ("shuffled_pairs", "oracle")]
    assert [(p["persona"], p["method"], p["target_layers"]) for p in points] == [
        (*cell, band) for band in bands for cell in cells
    ]
    # No bound is broken, so that every dose is the strongest: that of one block, shared among the band.
    for point in points:
        assert point["alpha"] == pytest.approx(2.0 / len(point["target_layers"]))
        assert point["perplexity_ratio"] > 0
    assert (tmp_path / "out" / "figure4.png").stat().st_size > 10_000
    before = (tmp_path / "out" / "ablation_blocks.json").read_bytes()
    caplog.clear()
    assert run(tmp_path / "out", ablation, "--ablate", "blocks") == 0
    assert "24 generations, 24 of them already there" in caplog.text
    assert (tmp_path / "out" / "ablation_blocks.json").read_bytes() == before


# A dose for each condition


@pytest.fixture(scope="module")
def auto(settings):
    dose = {"n_evaluations": 3, "bracket": [0.1, 2.0], "max_perplexity_ratio": 1.05}
    return {**settings, "alpha_values": "auto", "alpha_search": dose, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def finished_auto(auto, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("auto") / "out"
    assert run(output_dir, auto) == 0
    return output_dir


def test_reading_plain_text_costs_what_steering_adds(finished):
    content = load_json(finished / "side_effects.json")["personas"]
    verdict = load_json(finished / "verdict.json")
    assert content == verdict["side_effects"]
    assert {name: set(found) for name, found in content.items()} == {
        name: set(METHODS) for name in ("loud", "numeric")
    }
    ratios = [ratio for found in content.values() for ratio in found.values()]
    assert all(0.2 < ratio < 50 for ratio in ratios)
    assert len({round(ratio, 6) for ratio in ratios}) == len(ratios)


def test_every_condition_is_tested_at_the_dose_that_was_found(finished_auto):
    alphas = {
        (entry["persona"], entry["method"]): entry
        for entry in load_json(finished_auto / "alpha_search.json")["alphas"]
    }
    assert set(alphas) == {(name, method) for name in ("loud", "numeric") for method in METHODS}
    norm = load_json(finished_auto / "persona_similarities.json")["residual_norm"]["median"]
    for entry in alphas.values():
        alphas = [point["alpha"] for point in entry["curve"]]
        assert len(alphas) <= 3
        assert all(0.1 * norm <= alpha <= 2.0 * norm * 1.0001 for alpha in alphas)
        chosen = next(point for point in entry["curve"] if point["alpha"] == entry["alpha"])
        assert chosen["is_coherent"] is entry["is_coherent"]
        assert not any(point["is_coherent"] for point in entry["curve"] if point["alpha"] > entry["alpha"])
    assert len({entry["alpha"] for entry in alphas.values()}) > 1
    cells = {(row["persona"], row["condition"], row["alpha"]) for row in rows(finished_auto)}
    expected = {(*condition, entry["alpha"]) for condition, entry in alphas.items()}
    beside = {(name, method, alphas[name, "oracle"]["alpha"]) for name, method in alphas}
    assert cells == {(None, "baseline", None), *expected, *beside}
    verdict = load_json(finished_auto / "verdict.json")
    for name, method in alphas:
        assert verdict["personas"][name]["alphas"][method] == alphas[name, method]["alpha"]
        assert verdict["at_oracle_alpha"][name]["alphas"][method] == alphas[name, "oracle"]["alpha"]
    assert (finished_auto / "alpha_search.png").stat().st_size > 10_000


def test_doses_are_measured_on_development_prompts_alone(finished_auto):
    lines = (finished_auto / "generation_journal.jsonl").read_text().splitlines()[1:]
    prompts = {json.loads(line)["row"]["prompt"] for line in lines}
    tested = {row["prompt"] for row in rows(finished_auto)}
    assert prompts - tested == set(load_prompts("development"))
    assert not tested & set(load_prompts("development"))


def test_ratio_of_a_dose_is_that_of_its_texts(finished_auto):
    evaluated = {}
    for line in (finished_auto / "evaluation_journal.jsonl").read_text().splitlines()[1:]:
        row = json.loads(line)["row"]
        if row["prompt"] in load_prompts("development"):
            text = (row["prompt"], row["seed"])
            evaluated[row["condition"], row["persona"], row["alpha"], text] = row
    unsteered = {
        key[3]: row["independent_perplexity"] for key, row in evaluated.items() if key[0] == "baseline"
    }
    entry = load_json(finished_auto / "alpha_search.json")["alphas"][0]
    for point in entry["curve"]:
        logs = [
            math.log(row["independent_perplexity"] / unsteered[text])
            for (method, persona, alpha, text), row in evaluated.items()
            if (method, persona, alpha) == (entry["method"], entry["persona"], point["alpha"])
            and None not in (row["independent_perplexity"], unsteered[text])
        ]
        assert len(logs) == point["n_pairs"] > 0
        assert math.exp(sum(logs) / len(logs)) == pytest.approx(point["perplexity_ratio"])


def test_second_run_with_doses_writes_nothing_anew(auto, finished_auto, tmp_path):
    out = shutil.copytree(finished_auto, tmp_path / "out")
    assert run(out, auto) == 0
    assert n_new(out)[-1] == 0
    assert_equal_artifacts(out, finished_auto)
    (out / "alpha_search.json").unlink()
    before = (out / "generation_journal.jsonl").read_bytes()
    assert run(out, auto) == 0
    assert (out / "generation_journal.jsonl").read_bytes() == before
    assert content(out / "alpha_search.json") == content(finished_auto / "alpha_search.json")


def test_phase_5_alone_needs_the_doses(auto, finished_auto, tmp_path, capsys):
    out = shutil.copytree(finished_auto, tmp_path / "out")
    (out / "alpha_search.json").unlink()
    assert run(out, auto, "--phase", "5") == 2
    (line,) = error_lines(capsys)
    assert "alpha_search.json" in line
    assert "run phase 4 first" in line


def test_doses_at_the_ends_of_the_bracket_are_noted(auto, tmp_path):
    dose = {"n_evaluations": 2, "max_perplexity_ratio": 1e9, "max_repetition_increase": 1.0}
    assert run(tmp_path / "high", {**auto, "methods": ["oracle"], "alpha_search": dose}) == 0
    assert "strongest dose tried" in (tmp_path / "high" / "experiment.log").read_text()


def test_dry_run_counts_the_texts_of_a_dose_search(auto, tmp_path, capsys):
    assert run(tmp_path / "out", auto, "--dry-run") == 0
    n_texts = 2 * len(load_prompts("development")) * (1 + N_PERSONAS * len(METHODS) * 3)  # two seeds
    shown = capsys.readouterr().out
    assert f"dose search: {n_texts} generations" in shown
    n_cells = 1 + N_PERSONAS * (2 * len(METHODS) - 1)  # each method's own dose, and the oracle's
    assert f"generations: {N_PER_CELL * n_cells} " in shown


# A Ray cluster


def kill_a_worker():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"_Host" in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
                return


def test_ray_gives_what_this_process_gives(settings, finished, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    kills, losses = [], []

    def killing(self, method, chunks):
        for number, result in run_chunks(self, method, chunks):
            if method == "write" and number == 10 and not kills:
                kills.append(kill_a_worker())
            yield number, result
        losses.append(self.n_lost)

    run_chunks = RayExecutor.run
    monkeypatch.setattr(RayExecutor, "run", killing)
    config = {**settings, "generation_batch_size": 4, "executor": {"kind": "ray", "n_workers": 2}}
    out = tmp_path / "out"
    assert run(out, config) == 0
    assert losses[-1] == 1
    assert texts(out) == texts(finished)
    assert_equal_artifacts(out, finished, except_for=["preflight.json"])


def test_ray_without_ray_is_refused_before_anything_is_written(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(tmp_path / "out", {**settings, "executor": {"kind": "ray"}}) == 2
    (line,) = error_lines(capsys)
    assert "requirements-ray.txt" in line
    assert not (tmp_path / "out").exists()


# Preflight


def test_failed_technical_preflight_stops_the_run(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "EXACT_TOLERANCE", {torch.float32: 0.0})
    assert run(tmp_path / "out", settings) == 1
    (line,) = error_lines(capsys)
    assert line.startswith("error: preflight failed: source_extraction")
    assert visible_files(tmp_path / "out") == {"config.json", "preflight.json", "experiment.log"}


def test_failed_technical_preflight_is_checked_again(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "EXACT_TOLERANCE", {torch.float32: 0.0})
        assert run(tmp_path / "out", settings, "--phase", "1") == 1
    assert run(tmp_path / "out", settings, "--phase", "1") == 0


def test_failed_premises_are_noted_at_the_end(finished):
    failed = [
        check["name"]
        for check in load_json(finished / "preflight.json")["checks"]
        if check["status"] == "fail" and not check["technical"]
    ]
    closing = (finished / "experiment.log").read_text().split("phase 5 done")[1]
    assert failed
    assert all(f"note: preflight: {name} failed" in closing for name in failed)


# A dry run


@pytest.mark.parametrize("use_gpt4", [False, True])
def test_dry_run_counts_and_writes_nothing(use_gpt4, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_KEY", "any")
    judge = {"api_key_env": "LOCAL_KEY", "usd_per_million_tokens": 10.0}
    assert run(tmp_path / "out", {**settings, "use_gpt4": use_gpt4, "judge": judge}, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "texts for the map: 60 passages, " in shown
    assert f"generations: {N_TEXTS} ({N_CELLS - 1} steered cells and 1 baseline, 3 prompts x 2 seeds" in shown
    assert f"at most {N_TEXTS * 6} tokens" in shown
    assert f"evaluations: {N_EVALUATIONS}, " in shown
    n_judgements = use_gpt4 * (N_TEXTS + N_EVALUATIONS)
    assert f"judgements: {n_judgements}, about {n_judgements * 200 * 10 / 1e6:.2f} USD" in shown


def test_dry_run_leaves_a_finished_run_alone(settings, out):
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert run(out, settings, "--dry-run") == 0
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_dry_run_counts_what_the_journals_hold(settings, out, capsys):
    assert run(out, settings, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"3 prompts x 2 seeds each), {N_TEXTS} of them already there, " in shown
    assert f"evaluations: {N_EVALUATIONS}, {N_EVALUATIONS} of them already there, about 0.0 min" in shown
    assert "target tokens, already mapped, about 0.0 min" in shown
    assert "preflight:" not in shown
    assert run(out, {**settings, "alpha_values": [1.0, 4.0, 9.0]}, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"{N_TEXTS} of them already there" in shown
    assert "preflight: 168 generations" in shown


# A judge


def judged(settings, server, **judge):
    local = {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"}
    return {**settings, "use_gpt4": True, "judge": {**local, **judge}}


@pytest.fixture
def local_key(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")


@pytest.mark.usefixtures("local_key")
def test_failed_judgements_are_asked_for_again(settings, out):
    state = {"answer": "no idea"}
    with chat_server(lambda prompt: completion(state["answer"])) as server:
        assert run(out, judged(settings, server), "--phase", "5") == 0
        failed = load_json(out / "aggregated_results.json")["conditions"]
        state["answer"] = "4"
        assert run(out, judged(settings, server), "--phase", "5") == 0
        asked = len(server.prompts)
        assert run(out, judged(settings, server), "--phase", "5") == 0
    assert len(server.prompts) == asked
    assert all(entry["gpt4_trait_score"]["missing"] == entry["n"] for entry in failed)
    assert (
        "texts lack a judgement (first reason: the answer is not a digit"
        in (out / "experiment.log").read_text()
    )
    for entry in load_json(out / "aggregated_results.json")["conditions"]:
        assert entry["gpt4_trait_score"]["mean"] == entry["gpt4_coherence_score"]["mean"] == 4


@pytest.mark.usefixtures("local_key")
@pytest.mark.parametrize(
    ("change", "judge", "is_asked"),
    [
        ({"persona_datasets": {"loud": {**LOUD, "description": "Shouts."}, "numeric": NUMERIC}}, {}, True),
        ({}, {"model": "other"}, True),
        ({}, {"max_answer_tokens": 500}, True),
        ({}, {"max_answer_tokens": 1}, False),
        ({}, {"max_workers": 2}, False),
        ({}, {"usd_per_million_tokens": 9.0}, False),
    ],
    ids=["description", "model", "length", "default length", "workers", "price"],
)
def test_judge_is_asked_again_when_its_answer_may_change(change, judge, is_asked, settings, out):
    with chat_server(lambda prompt: completion("4")) as server:
        assert run(out, judged(settings, server), "--phase", "5") == 0
        asked = len(server.prompts)
        assert run(out, judged({**settings, **change}, server, **judge), "--phase", "5") == 0
        assert (len(server.prompts) > asked) is is_asked


@pytest.mark.usefixtures("local_key")
def test_a_kill_loses_no_judgement_but_those_in_flight(settings, out, monkeypatch):
    ask, n_answered = GPTJudge._ask, 41

    def interrupted(judge, prompt):
        if len(server.prompts) == n_answered:
            raise KeyboardInterrupt
        return ask(judge, prompt)

    with chat_server(lambda prompt: completion("4")) as server:
        config = judged(settings, server, max_workers=1)
        monkeypatch.setattr(GPTJudge, "_ask", interrupted)
        assert run(out, config, "--phase", "5") == 130
        monkeypatch.setattr(GPTJudge, "_ask", ask)
        assert len(server.prompts) == n_answered
        assert run(out, config, "--phase", "5") == 0
    assert len(server.prompts) - len(set(server.prompts)) <= 2
    assert {row["gpt4_coherence_score"] for row in rows(out, "eval_results.json")} == {4}


# Bad input


@pytest.fixture(scope="module")
def bad_paths(tmp_path_factory):
    """Paths of things that cannot be used; {name} in a test's change stands for one."""
    folder = tmp_path_factory.mktemp("bad")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    # Weights large enough for a token to matter to its neighbours.
    bert = BertLMHeadModel(BertConfig(vocab_size=VOCAB_SIZE, initializer_range=0.5, **sizes))
    bert.save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    (folder / "empty").mkdir()
    (folder / "file").write_text("a regular file")
    (folder / "short.txt").write_text("Too short.")
    return {path.name: str(path) for path in folder.iterdir()}


def assert_refused(output_dir, status, named, capsys):
    lines = error_lines(capsys)
    assert status == 2
    assert 1 <= len(lines) <= 2, lines
    assert named in "\n".join(lines)
    assert not output_dir.exists()


ONE_SIDED = {"x": {"positive_texts": ["YES"], "negative_texts": []}}
PROMPT = "The first thing I do is"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_ix": 3}, "did you mean 'layer_idx'"),
        ({"layer_idx": "auto"}, "leave out source_layer_idx"),
        ({"layer_idx": "deep"}, "0 to 10000, or 'auto'"),
        ({"search_target_layers": [1]}, 'of use with "layer_idx": "auto" alone'),
        ({"source_layer_idx": 4}, "layer_idx 4 is out of range: the model has 4 decoder blocks"),
        ({"target_layer_idx": 99}, "layer_idx 99 is out of range"),
        ({"persona_datasets": ONE_SIDED}, "'x' has no negative texts"),
        ({"personas": ["sardonic"]}, "'sardonic' is neither shipped"),
        ({"target_model": "{bert}"}, "not a causal language model"),
        ({"source_model": "{empty}"}, "no config.json"),
        ({"source_model": "/no/such/folder"}, "/no/such/folder"),
        ({"source_block_path": "model.nowhere"}, "model.nowhere"),
        ({"device": "warp"}, "'warp'"),
        ({"use_gpt4": True, "judge": {"api_key_env": "ABSENT_KEY"}}, "ABSENT_KEY is not set"),
        ({"neutral_text": "/no/such/file.txt"}, "/no/such/file.txt"),
        ({"neutral_text": "{short.txt}"}, "gives 0 passages"),
        ({"n_training_samples": 1301}, "1301 are wanted; lower n_training_samples"),
        ({"n_test_prompts": 61}, "there are 60 prompts"),
        ({"test_prompts": [PROMPT] * 3}, "holds a prompt twice"),
        (
            {
                "persona_datasets": {"x": {**LOUD, "negative_texts": [f"{PROMPT} a joke."]}},
                "n_test_prompts": 1,
                "test_prompts": [PROMPT],
            },
            "share words with a test prompt",
        ),
    ],
    ids=[
        "unknown key",
        "auto and a layer",
        "layer of another name",
        "search without auto",
        "source layer",
        "target layer",
        "empty side",
        "unknown persona",
        "not causal",
        "no model",
        "no folder",
        "block path",
        "device",
        "judge key",
        "no neutral file",
        "short neutral file",
        "few paragraphs",
        "few prompts",
        "equal prompts",
        "leaking prompt",
    ],
)
def test_bad_input_ends_with_status_2_and_writes_nothing(
    change, named, settings, bad_paths, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    change = {
        key: bad_paths[value[1:-1]] if isinstance(value, str) and value.startswith("{") else value
        for key, value in change.items()
    }
    status = run(tmp_path / "out", {**settings, **change})
    assert_refused(tmp_path / "out", status, named, capsys)


LABELLED = {f"labelled_{side}_texts": [f"{side} {i}" for i in range(9)] for side in ("positive", "negative")}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_new_tokens": CONTEXT}, "max_new_tokens"),
        ({"test_prompts": ["word " * CONTEXT], "n_test_prompts": 1}, "prompt"),
        ({"test_prompts": ["  "], "n_test_prompts": 1}, "prompt"),
        ({"n_folds": 61}, "n_folds"),
        ({"persona_datasets": {"x": {**LOUD, **LABELLED}}}, "9 labelled texts"),
        ({"seed": 2**70}, "seed"),
    ],
    ids=["long texts", "long prompt", "blank prompt", "more folds than documents", "few labelled", "seed"],
)
def test_input_that_a_later_phase_cannot_use_is_refused_before_the_first(
    change, named, settings, tmp_path, capsys
):
    status = run(tmp_path / "out", {**settings, **change})
    assert_refused(tmp_path / "out", status, named, capsys)


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--phase", "3"]], ids=str)
def test_output_below_a_regular_file_is_refused(flags, settings, bad_paths, tmp_path, capsys):
    output_dir = Path(bad_paths["file"]) / "below" / "out"
    (tmp_path / "config.json").write_text(json.dumps({**settings, "output_dir": str(output_dir)}))
    status = main(["--config", str(tmp_path / "config.json"), *flags])
    assert_refused(output_dir, status, "cannot be written", capsys)
    assert Path(bad_paths["file"]).read_text() == "a regular file"


@pytest.mark.parametrize("content", [None, "{half", "[]", "{}"], ids=["missing", "half", "list", "empty"])
def test_unusable_configuration_file_is_refused(content, tmp_path, capsys):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    status = main(["--config", str(path), "--output-dir", str(tmp_path / "out")])
    assert_refused(tmp_path / "out", status, "configuration", capsys)


# Real models


@pytest.fixture(scope="module")
def real(all_threads, tmp_path_factory):
    """A base model that goes on with texts, much reduced, on the packaged models."""
    reduced = {
        "n_training_samples": 60,
        "personas": ["formal", "cheerful"],
        "n_test_prompts": 4,
        "alpha_values": [0.35],
        "max_new_tokens": 8,
        "output_dir": str(tmp_path_factory.mktemp("real") / "out"),
    }
    experiment = PersonaTransferExperiment({**load_json(ROOT / "configs/smol_to_gemma.json"), **reduced})
    return experiment.folder.path, experiment.run(), experiment


@pytest.mark.real_models
def test_experiment_runs_on_the_packaged_models(real):
    output_dir, table, _ = real
    assert visible_files(output_dir) == {*ARTIFACTS, "off_target.png"}
    checks = load_json(output_dir / "preflight.json")["checks"]
    technical = [check for check in checks if check["technical"]]
    assert len(technical) == 8
    assert [check for check in technical if check["status"] != "pass"] == []

    assert {(entry["condition"], entry["persona"]) for entry in table} == {
        (condition, persona) for condition in ("baseline", *METHODS) for persona in ("formal", "cheerful")
    }
    for entry in table:
        assert 0 <= entry["trait_probability"]["mean"] <= 1
        assert entry["trait_probability"]["n"] + entry["trait_probability"]["missing"] == entry["n"] == 4
        assert entry["classifier_auc"] >= {"formal": 0.95, "cheerful": 0.92}[entry["persona"]]
        assert entry["perplexity"]["median"] > 1
        assert entry["independent_perplexity"]["median"] > 1
    validation = load_json(output_dir / "scorer_validation.json")["personas"]
    assert set(validation) == {"formal", "cheerful"}
    assert all(set(found) == {"classifier", "likelihood_ratio"} for found in validation.values())
    assert min(validation["formal"]["classifier"]["auc"].values()) >= 0.9
    verdict = load_json(output_dir / "verdict.json")["personas"]["formal"]
    scored = verdict["scorers"]["classifier"]
    assert (verdict["verdict"], scored["verdict"], scored["n_prompts"]) == ("inconclusive", "inconclusive", 4)
    assert "4 prompts have scores, an interval needs 8" in scored["why"]


@pytest.mark.real_models
@pytest.mark.parametrize("persona", ["formal", "cheerful"])
def test_mapped_vector_is_nearer_to_its_oracle_than_naive_ones(persona, real):
    entry = load_json(real[0] / "persona_similarities.json")["personas"][persona]
    controls = (
        "zero_pad",
        "interpolate",
        "random_proj",
        "shuffled_pairs_1",
        "shuffled_pairs_2",
        "shuffled_pairs_3",
    )
    for cosines in (entry["cosine_to_oracle"], entry["cosine_without_massive"]):
        assert set(cosines) == {*METHODS, *MAPS} - {"oracle"}
    assert cosines["ridge_mapped"] > 0.3 + max(abs(cosines[control]) for control in controls)
    assert cosines["ridge_mapped"] > entry["highest_cosine_to_other_oracles"] + 0.3


@pytest.mark.real_models
def test_real_pairs_equal_the_prefixes_read_alone(real):
    """Where both models tokenise the prefix as they did the passage, which is nearly everywhere."""
    output_dir, _, experiment = real
    data = load_tensors(output_dir / "training_data.pt")
    rows = list(range(0, len(data["texts"]), len(data["texts"]) // 12))
    prefixes = [data["texts"][row] for row in rows]
    for side in ("source", "target"):
        alone = getattr(experiment.inputs, side).extractor.extract_batch(prefixes)
        expected = data[f"H_{side}"][rows]
        difference = (alone - expected).norm(dim=1) / expected.norm(dim=1)
        assert difference.median() < 1e-4
        assert (difference < 1e-4).sum() >= len(rows) - 2


@pytest.mark.real_models
def test_real_map_predicts_held_out_pairs(real):
    cv = load_json(real[0] / "cv_results.json")
    assert cv["pairs"]["n_texts"] == 60
    assert cv["pairs"]["fraction_aligned"] > 0.85
    assert cv["n_rows"] > 30 * 60
    assert cv["best_r2_standardised"] > 0.25 > 0.05 > cv["shuffled_r2"]
    assert cv["retrieval_accuracy"] > 0.3


@pytest.mark.real_models
def test_leaving_logits_out_changes_no_real_text(real, monkeypatch):
    target = real[2].inputs.target
    vector = torch.randn(640, generator=torch.Generator().manual_seed(0))
    seen, screen = [], output_head.NarrowedHead.screen
    monkeypatch.setattr(decoding, "SCREENED_ROW_STEPS", 0)
    monkeypatch.setattr(
        output_head.NarrowedHead, "screen", lambda *args: seen.append(screen(*args)) or seen[-1]
    )
    texts = []
    for capabilities in ({}, {"avx512_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        with SteeredGenerator(target.model, target.tokenizer) as generator:
            generator.register_steering(8, vector / vector.norm(), 150.0)
            texts.append(generator.generate_batch(load_prompts("test")[:8], 12, seeds=list(range(8))))
    assert seen == [False, True]
    assert texts[0] == texts[1]


@pytest.mark.real_models
def test_real_texts_differ_between_conditions(real):
    by_condition = {}
    for row in rows(real[0]):
        if row["persona"] in (None, "formal"):
            by_condition.setdefault(row["condition"], []).append(row["output"])
    assert set(by_condition) == {"baseline", *METHODS}
    assert all(a != b for a, b in pairwise(by_condition.values()))
    assert all(output.strip() for output in by_condition["baseline"])


BAND = {
    "source_layer_idx": [0, 2],
    "target_layer_idx": [1, 3],
    "methods": ["ridge_mapped", "shuffled_pairs", "oracle"],
}


@pytest.fixture(scope="module")
def band(settings, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("band") / "out"
    assert run(output_dir, {**settings, **BAND}) == 0
    return output_dir


def test_the_dry_run_of_a_band_says_what_its_sums_take(settings, tmp_path, capsys):
    assert run(tmp_path / "out", {**settings, **BAND}, "--dry-run") == 0
    assert "band: 2 layer pairs from one pass over the texts" in capsys.readouterr().out


def test_a_band_has_the_vectors_of_its_layer_pairs(band, settings, tmp_path):
    content = load_tensors(band / "persona_vectors.pt")
    assert content["layer_pairs"] == [[0, 1], [2, 3]]
    for source, target in ((0, 1), (2, 3)):
        alone = {**settings, **BAND, "source_layer_idx": source, "target_layer_idx": target}
        for phase in ("1", "2", "3"):
            assert run(tmp_path / f"{target}", alone, "--phase", phase) == 0
        single = load_tensors(tmp_path / f"{target}" / "persona_vectors.pt")
        for name, by_method in single["vectors"].items():
            for method, vector in by_method.items():
                assert torch.allclose(content["vectors"][name][method][target], vector, atol=1e-5)
            assert torch.allclose(content["source_vectors"][name][source], single["source_vectors"][name])
        norm = content["residual_norms"][target]["median"]
        assert norm == pytest.approx(single["residual_norm"]["median"], rel=1e-5)


def test_texts_of_a_band_are_steered_at_all_its_blocks(band, settings):
    content, seen = load_tensors(band / "persona_vectors.pt"), 0
    model, tokenizer = load_model(settings["target_model"])
    with SteeredGenerator(model, tokenizer) as generator:
        for row in rows(band):
            if row["condition"] == "baseline" or row["seed"]:
                continue
            turn = f"_{row['prompt_idx'] % 3 + 1}" if row["condition"] == "shuffled_pairs" else ""
            for layer, vector in content["vectors"][row["persona"]][row["condition"] + turn].items():
                generator.register_steering(layer, vector, row["alpha"])
            assert generator.generate(row["prompt"], settings["max_new_tokens"]) == row["output"]
            seen += 1
    assert seen == 3 * N_PERSONAS * N_ALPHAS * N_PROMPTS


def test_a_band_is_made_once_and_a_lost_map_alone_is_made_again(band, settings, tmp_path, caplog):
    shutil.copytree(band, tmp_path / "out")
    before = (tmp_path / "out" / "aggregated_results.json").read_bytes()
    changed = tmp_path / "out" / "layers" / "0_1" / "ridge_mapping.pt"
    kept = (tmp_path / "out" / "layers" / "2_3" / "ridge_mapping.pt").stat().st_mtime_ns
    changed.unlink()
    (tmp_path / "out" / "persona_vectors.pt").unlink()
    assert run(tmp_path / "out", {**settings, **BAND}) == 0
    assert changed.exists()
    assert (tmp_path / "out" / "layers" / "2_3" / "ridge_mapping.pt").stat().st_mtime_ns == kept
    assert "0 new texts" in (tmp_path / "out" / "experiment.log").read_text()
    assert (tmp_path / "out" / "aggregated_results.json").read_bytes() == before


def test_a_chosen_band_needs_enough_blocks_and_a_searched_dose_serves_all_of_it(settings, tmp_path):
    chosen = {name: value for name, value in settings.items() if not name.endswith("layer_idx")}
    auto = {
        **chosen,
        "layer_idx": "band",
        "alpha_values": "auto",
        "methods": ["oracle"],
        "alpha_search": {"n_evaluations": 2},
    }
    assert run(tmp_path / "out", {**auto, "alpha_unit": "residual_norm"}) == 0
    content = load_tensors(tmp_path / "out" / "persona_vectors.pt")
    assert content["layer_pairs"] == [[0, 0], [1, 1], [2, 2]]
    assert {row["condition"] for row in rows(tmp_path / "out")} == {"baseline", "oracle"}

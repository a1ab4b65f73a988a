"""Kills, signals, damage, obstacles, full disks: a run goes on from whole files, or says why in one line."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from chat_server import chat_server, completion
from damage import delete, empty, flip, halve
from filelock import FileLock
from tiny_runs import ARTIFACTS, LOUD, content, error_lines, run, visible_files

import run_experiment
from experiment.executor import Worker
from experiment.inputs import load_inputs
from model_loading import load_model
from run_experiment import PersonaTransferExperiment
from support.artifacts import load_json
from support.package_cache import CACHE_VARIABLE
from support.run_folder import RunFolder
from support.signals import unwind_on_signals

ROOT = Path(__file__).parent.parent.parent
KEPT = sorted(ARTIFACTS - {"experiment.log", "config.json", "report.html"})  # these show the configuration
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork a process")


@pytest.fixture(scope="module")
def settings(tiny):
    few = {"persona_datasets": {"loud": LOUD}, "methods": ["ridge_mapped", "oracle"], "alpha_values": [2.0]}
    return {**tiny, **few, "max_new_tokens": 4}


@pytest.fixture(scope="module", autouse=True)
def loaded(settings):
    """The inputs of every run here are loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        inputs = load_inputs(PersonaTransferExperiment({**settings, "output_dir": "unused"}).config)
        patch.setattr(run_experiment, "load_inputs", lambda config, loaded: replace(inputs, config=config))
        yield inputs


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("finished") / "out"
    assert run(output_dir, settings) == 0
    return output_dir


def run_from(folder, settings, output_dir):
    """Run with the configuration in a file of the folder."""
    (folder / "config.json").write_text(json.dumps({**settings, "output_dir": str(output_dir)}))
    return run_experiment.main(["--config", str(folder / "config.json")])


def assert_same_bytes(output_dir, other):
    """Journals hold rows in the order in which they were made; everything else is equal to the last bit."""
    assert visible_files(output_dir) == ARTIFACTS
    for name in KEPT:
        if name.endswith(".jsonl"):
            assert content(output_dir / name) == content(other / name), name
        else:
            assert (output_dir / name).read_bytes() == (other / name).read_bytes(), name


@contextmanager
def child(work):
    """Run `work` in a copy of this process, which ends with the status that it returns or is killed."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(work()))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


# Kills


@needs_fork
def test_kills_at_any_time_leave_the_bytes_of_a_run_without(settings, finished, tmp_path):
    out, generator, n_kills, n_finished = tmp_path / "out", random.Random(0), 0, 0
    settings = {**settings, "generation_batch_size": 4}
    started = time.monotonic()
    with child(lambda: run(tmp_path / "timed", settings)) as process:
        process.join(60)
        assert process.exitcode == 0
    whole = time.monotonic() - started
    while n_kills < 12:
        with child(lambda: run(out, settings)) as process:
            process.join(generator.uniform(0.02, 1.0) * whole / 2)
            ended = process.exitcode
        if ended is None:
            n_kills += 1
        else:  # start anew, so that early phases are killed too
            assert ended == 0
            n_finished += 1
            assert_same_bytes(out, finished)
            shutil.rmtree(out)
    assert run(out, settings) == 0
    assert n_finished < 12
    assert_same_bytes(out, finished)
    assert {path.name for path in out.iterdir()} - ARTIFACTS == {".run.lock"}


def test_offload_folders_are_removed_when_their_owner_is_dead(model_folders, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    for name in ("dead", "alive", "unknown"):
        (tmp_path / f"offload-{name}").mkdir()
    (tmp_path / "offload-dead.lock").touch()
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu")
    with FileLock(tmp_path / "offload-alive.lock"):
        for _ in range(2):
            load_model(model_folders["source"], "cpu", device_map={**places, "model.layers": "disk"})
        left = {path.name for path in tmp_path.glob("offload-*/")}
    assert left > {"offload-alive", "offload-unknown"}
    assert "offload-dead" not in left
    assert len(left) == 4


# The lock


@needs_fork
def test_a_second_run_changes_nothing_until_the_first_is_killed(settings, out, tmp_path, capsys):
    held, before = tmp_path / "held", (out / "config.json").read_bytes()

    def hold():
        folder = RunFolder(out)
        folder.lock()
        held.touch()
        time.sleep(60)

    with child(hold) as process:
        while not held.exists():
            time.sleep(0.01)
        assert run(out, {**settings, "seed": 5}) == 2
        (line,) = error_lines(capsys)
        assert f"{out} is in use by process {process.pid}" in line
        assert (out / "config.json").read_bytes() == before
    assert process.exitcode == -signal.SIGKILL
    assert run(out, settings) == 0


# Damage


@pytest.mark.parametrize(
    ("damage", "names"),
    [(halve, KEPT), (empty, KEPT), (flip, KEPT), (delete, KEPT[::2]), (delete, KEPT[1::2])],
    ids=["halve", "empty", "flip", "delete even", "delete odd"],
)
def test_damaged_artifacts_are_recomputed_to_the_same_results(damage, names, settings, finished, out):
    for name in names:
        damage(out / name)
    assert run(out, settings) == 0
    for other in KEPT:
        assert content(out / other) == content(finished / other), other


def cut_last_rows(journal, n_rows=2):
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-n_rows]))


def test_seed_that_is_added_later_is_all_that_is_read(settings, finished, out, monkeypatch):
    read, perplexities = [], Worker.perplexities

    def noted(worker, prompts, outputs, *rest):
        read.extend(outputs)
        return perplexities(worker, prompts, outputs, *rest)

    monkeypatch.setattr(Worker, "perplexities", noted)
    more = {**settings, "n_seeds": settings["n_seeds"] + 1}
    assert run(out, more) == 0
    known = {row["key"] for row in load_json(finished / "eval_results.json")["rows"]}
    grown = load_json(out / "eval_results.json")["rows"]
    assert Counter(read) == Counter(row["output"] for row in grown if row["key"] not in known)
    cut_last_rows(out / "evaluation_journal.jsonl", len(known) // 2)
    assert run(out, more) == 0
    assert load_json(out / "eval_results.json")["rows"] == grown


def test_judge_that_is_added_later_costs_no_perplexity_and_is_asked_once(
    settings, finished, out, monkeypatch
):
    monkeypatch.setenv("LOCAL_KEY", "any")
    monkeypatch.setattr(run_experiment, "load_inputs", load_inputs)
    with chat_server(lambda prompt: completion("4")) as server:
        judge = {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"}
        settings = {**settings, "use_gpt4": True, "judge": judge}
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "perplexities", None)
            assert run(out, settings) == 0
        asked = len(server.prompts)
        before, after = (load_json(folder / "eval_results.json")["rows"] for folder in (finished, out))
        assert [row["perplexity"] for row in after] == [row["perplexity"] for row in before]
        assert {row["gpt4_coherence_score"] for row in after} == {4}
        cut_last_rows(out / "evaluation_journal.jsonl")
        cut_last_rows(out / "judgements_journal.jsonl")
        assert run(out, settings) == 0
    assert asked < len(server.prompts) <= asked + 2  # the judgements' own journal holds what else was lost


# Obstacles


@pytest.mark.parametrize(
    "name",
    "preflight.json mapping_analysis.png generation_journal.jsonl results.csv experiment.log".split(),
)
def test_folder_in_the_place_of_a_file_is_named(name, settings, out, capsys):
    (out / name).unlink()
    (out / name).mkdir()
    assert run(out, settings) == 2
    (line,) = error_lines(capsys)
    assert re.fullmatch(rf"error: {out / name}: Is a directory; a file should be there: move the .*", line)


def test_dangling_links_in_the_place_of_files_are_replaced(settings, finished, out):
    for name in KEPT:
        (out / name).unlink()
        (out / name).symlink_to(out / f"no_{name}")
    assert run(out, settings) == 0
    assert_same_bytes(out, finished)


@pytest.mark.parametrize(
    ("name", "said"),
    [("a\ud800b", "a lone surrogate"), ("x" * 300, "name too long"), ("dangling", "a link to nothing")],
    ids=["surrogate", "long", "dangling"],
)
def test_output_directory_that_cannot_be_is_one_line(name, said, settings, tmp_path, capsys):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert run_from(tmp_path, settings, f"{tmp_path}/{name}") == 2
    (line,) = error_lines(capsys)
    assert re.search(said, line)


@pytest.mark.parametrize("name", ["cv_results.json", "generation_journal.jsonl", "experiment.log"])
def test_immutable_file_is_named(name, settings, out, capsys):
    change = ["chattr", "+i", out / name]
    if shutil.which("chattr") is None or subprocess.run(change, capture_output=True, check=False).returncode:
        pytest.skip("files cannot be made immutable here")
    try:
        assert run(out, settings, "--fresh") == 2
    finally:
        subprocess.run(["chattr", "-i", out / name], check=True)
    (line,) = error_lines(capsys)
    assert re.fullmatch(rf"error: {out / name}: Operation not permitted; make it changeable .*", line)


@pytest.fixture
def small_disk(tmp_path):
    """A function from a size to a folder of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")

    def resized(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
        return folder

    yield resized
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_is_one_line_and_the_run_goes_on_with_more_room(
    settings, finished, small_disk, tmp_path, capsys
):
    for size in ("8k", "64k", "500k", "2500k"):
        out = small_disk(size) / "out"
        assert run_from(tmp_path, settings, out) == 2, size
        (line,) = error_lines(capsys)
        assert re.match(rf"error: (output_dir ')?{out}.*No space left on device", line), line
        assert "choose another" in line
    small_disk("50m")
    assert run_from(tmp_path, settings, out) == 0
    assert_same_bytes(out, finished)


# Signals

STOPPED = "stopped: every text written so far is kept; run the same command again to go on\n"


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_run_with_one_line_and_it_goes_on(number, settings, finished, tmp_path, monkeypatch):
    out, started, printed = tmp_path / "out", tmp_path / "started", tmp_path / "printed"
    generate = Worker.generate

    def slowly(*arguments):
        if started.exists():  # the first texts have been written
            time.sleep(60)
        started.touch()
        return generate(*arguments)

    def work():
        sys.stderr = open(printed, "w", buffering=1)  # noqa: SIM115 (the process ends soon)
        monkeypatch.setattr(Worker, "generate", slowly)
        signal.signal(number, signal.SIG_DFL)  # a shell ignores SIGINT for what it starts in the background
        unwind_on_signals()
        return run(out, {**settings, "generation_batch_size": 4})

    with child(work) as process:
        while not started.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(process.pid, number)
        process.join(10)
        assert process.exitcode == 128 + number
    assert printed.read_text().endswith(STOPPED)
    assert "Traceback" not in printed.read_text()
    assert not (out / ".run_owner.json").exists()
    assert run(out, settings) == 0
    assert_same_bytes(out, finished)


def test_signal_while_modules_are_imported():
    command = [sys.executable, "-v", "run_experiment.py", "--config", "example_config.json", "--dry-run"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("import 'torch.nn"):
                break
        process.send_signal(signal.SIGTERM)
        printed = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert STOPPED in printed
    assert "Traceback" not in printed

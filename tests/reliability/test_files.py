"""Kills, signals, damage, obstacles, full disks: a run goes on from whole files, or says why in one line."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from chat_server import chat_server, completion
from filelock import FileLock
from tiny_runs import ARTIFACTS, LOUD, content, error_lines, run, tiny_settings, visible_files

import model_loading
import run_experiment
from experiment.executor import Worker
from experiment.inputs import load_inputs
from run_experiment import PersonaTransferExperiment
from support.artifacts import load_json, save_json
from support.package_cache import CACHE_VARIABLE
from support.run_folder import RunFolder
from support.signals import unwind_on_signals

ROOT = Path(__file__).parent.parent.parent
KEPT = sorted(ARTIFACTS - {"experiment.log", "config.json", "report.html"})  # these show the configuration
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork a process")


@pytest.fixture(scope="module")
def settings(model_folders, tmp_path_factory):
    few = {"persona_datasets": {"loud": LOUD}, "methods": ["ridge_mapped", "oracle"], "alpha_values": [2.0]}
    return {**tiny_settings(model_folders, tmp_path_factory.mktemp("text")), **few, "max_new_tokens": 4}


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


@pytest.fixture
def out(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def judged(settings, monkeypatch):
    """Settings of a run with a judge, and the server that is asked."""
    monkeypatch.setenv("LOCAL_KEY", "any")
    monkeypatch.setattr(run_experiment, "load_inputs", load_inputs)
    with chat_server(lambda prompt: completion("4")) as server:
        judge = {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"}
        yield {**settings, "use_gpt4": True, "judge": judge}, server


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
    """Run `work` in a copy of this process, which ends with the status that it returns; yields its id."""
    number = os.fork()
    if number == 0:
        status = 70
        try:
            status = work()
            threading._shutdown()  # waits for threads, as at the end of a program
        finally:
            os._exit(status)
    try:
        yield number
    finally:
        with suppress(ChildProcessError):  # it has ended, and `wait` knows how
            if os.waitpid(number, os.WNOHANG) == (0, 0):
                os.kill(number, signal.SIGKILL)
                os.waitpid(number, 0)


def wait(number, seconds):
    """Return the exit status of a child, negative for a signal; None if it does not end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


# Kills


@needs_fork
def test_kills_at_any_time_leave_the_bytes_of_a_run_without(settings, finished, tmp_path):
    out, generator, n_kills, n_finished = tmp_path / "out", random.Random(0), 0, 0
    settings = {**settings, "generation_batch_size": 4}
    started = time.monotonic()
    with child(lambda: run(tmp_path / "timed", settings)) as number:
        assert wait(number, 60) == 0
    whole = time.monotonic() - started
    while n_kills < 12:
        with child(lambda: run(out, settings)) as number:
            ended = wait(number, generator.uniform(0.02, 1.0) * whole / 2)
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


def test_offload_folders_are_removed_when_their_owner_is_dead(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    dead, alive, unknown = (tmp_path / f"offload-{name}" for name in ("dead", "alive", "unknown"))
    for folder in (dead, alive, unknown):
        folder.mkdir()
    (tmp_path / "offload-dead.lock").touch()
    with FileLock(tmp_path / "offload-alive.lock"):
        first, second = model_loading._new_offload_folder(), model_loading._new_offload_folder()
        assert Path(first).is_dir()
        assert Path(second).is_dir()
        assert not dead.exists()
        assert alive.exists()
        assert unknown.exists()


# The lock


def test_second_run_ends_with_one_line_and_changes_nothing(settings, out, capsys):
    before = (out / "config.json").read_bytes()
    held = RunFolder(out)
    held.lock()
    assert run(out, {**settings, "seed": 5}) == 2
    (line,) = error_lines(capsys)
    assert f"{out} is in use by this process" in line
    assert (out / "config.json").read_bytes() == before
    held.close()
    assert run(out, settings) == 0


@needs_fork
def test_lock_of_a_killed_process_is_free(out, settings):
    def hold():
        RunFolder(out).lock()
        (out / "held").touch()
        time.sleep(60)

    with child(hold) as number:
        while not (out / "held").exists():
            time.sleep(0.01)
        os.kill(number, signal.SIGKILL)
        assert wait(number, 5) == -signal.SIGKILL
        (out / "held").unlink()
        assert run(out, settings) == 0


# Damage


def delete(path):
    path.unlink()


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(bytes(whole))


DAMAGES = (delete, halve, empty, flip)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("names", [KEPT, KEPT[::2], KEPT[1::2]], ids=["all", "even", "odd"])
def test_damaged_artifacts_are_recomputed_to_the_same_results(damage, names, settings, finished, out):
    for name in names:
        damage(out / name)
    assert run(out, settings) == 0
    for other in KEPT:
        assert content(out / other) == content(finished / other), other


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cv_results.json", lambda whole: whole | {"best_r2": 0.99}),
        ("generation_results.json", lambda whole: whole | {"rows": whole["rows"][::-1]}),
    ],
)
def test_changed_json_is_noticed_by_its_checksum(name, change, settings, finished, out, capsys):
    save_json(out / name, change(json.loads((out / name).read_text())))
    if name == "generation_results.json":  # phase 4 writes it anew, phase 5 requires it
        assert run(out, settings, "--phase", "5") == 2
        (line,) = error_lines(capsys)
        assert re.search(r"generation_results\.json is damaged \(.* checksum\); run phase 4 first", line)
    assert run(out, settings) == 0
    if name != "generation_results.json":
        log = (out / "experiment.log").read_text()
        assert re.search(rf"{name} is damaged \(.* checksum\); recomputing", log)
    assert content(out / name) == content(finished / name)


def cut_last_rows(journal, n_rows=2):
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-n_rows]))


def test_seed_that_is_added_later_is_all_that_is_read(settings, finished, out, monkeypatch):
    read: list[str] = []
    perplexities = Worker.perplexities

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


def test_judge_that_is_added_later_costs_no_perplexity_and_is_asked_once(judged, finished, out, monkeypatch):
    settings, server = judged
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "perplexities", None)
        assert run(out, settings) == 0
    before, after = (load_json(folder / "eval_results.json")["rows"] for folder in (finished, out))
    assert [row["perplexity"] for row in after] == [row["perplexity"] for row in before]
    assert {row["gpt4_coherence_score"] for row in after} == {4}
    asked = len(server.prompts)
    cut_last_rows(out / "evaluation_journal.jsonl")
    assert run(out, settings) == 0
    assert len(server.prompts) == asked  # the judgements' own journal holds the lost ones
    cut_last_rows(out / "evaluation_journal.jsonl")
    cut_last_rows(out / "judgements_journal.jsonl")
    assert run(out, settings) == 0
    assert asked < len(server.prompts) <= asked + 4


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
    ("output_dir", "said"),
    [
        ("{}/a\0b", "holds a NUL "),
        ("{}/a\ud800b", "holds a lone surrogate"),
        ("{}/" + "x" * 300, "File name too long"),
        ("{}/dangling", "a link to nothing"),
        ("{}/file/below", "cannot be written"),
    ],
    ids=["NUL", "surrogate", "long", "dangling", "below a file"],
)
def test_output_directory_that_cannot_be_is_one_line(output_dir, said, settings, tmp_path, capsys):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    config = {**settings, "output_dir": output_dir.format(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_experiment.main(["--config", str(tmp_path / "config.json")]) == 2
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


def test_full_disk_is_one_line_and_the_run_goes_on_with_more_room(settings, finished, small_disk, capsys):
    for size in ("8k", "64k", "500k", "2500k"):
        out = small_disk(size) / "out"
        assert run_on_disk(out, settings) == 2, size
        (line,) = error_lines(capsys)
        assert re.match(rf"error: (output_dir ')?{out}.*No space left on device", line), line
        assert "choose another" in line
    small_disk("50m")
    assert run_on_disk(out, settings) == 0
    assert_same_bytes(out, finished)


def run_on_disk(out, settings):
    """Run with the configuration in a file on another disk."""
    path = out.parent.parent / "config.json"
    path.write_text(json.dumps({**settings, "output_dir": str(out)}))
    return run_experiment.main(["--config", str(path)])


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
        unwind_on_signals()
        return run(out, {**settings, "generation_batch_size": 4})

    with child(work) as process:
        while not started.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(process, number)
        assert wait(process, 10) == 128 + number
    assert printed.read_text().endswith(STOPPED)
    assert "Traceback" not in printed.read_text()
    assert not (out / ".run_owner.json").exists()
    assert run(out, settings) == 0
    assert_same_bytes(out, finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_modules_are_imported(number, settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**settings, "output_dir": str(tmp_path / "out")}))
    command = [sys.executable, "-v", "run_experiment.py", "--config", str(tmp_path / "config.json")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("import 'torch.nn"):
                break
        process.send_signal(number)
        printed = process.stderr.read()
    assert process.returncode == 128 + number
    assert STOPPED in printed
    assert "Traceback" not in printed

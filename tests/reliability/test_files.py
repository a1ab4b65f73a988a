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
import torch
from chat_server import chat_server, completion
from filelock import FileLock
from PIL import Image
from tiny_runs import ARTIFACTS, LOUD, content, error_lines, run, tiny_settings, visible_files

import model_loading
import run_experiment
from experiment.executor import Worker
from experiment.inputs import load_inputs
from run_experiment import PersonaTransferExperiment
from support import package_cache
from support import signals as stopping
from support.artifacts import load_json, load_tensors, save_json, save_tensors, sealed
from support.errors import InputError
from support.run_folder import RunFolder

ROOT = Path(__file__).parent.parent.parent
KEPT = ARTIFACTS - {"experiment.log", "config.json", "report.html"}  # these show the configuration
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


def assert_same_bytes(output_dir, other):
    """Journals hold rows in the order in which they were made; everything else is equal to the last bit."""
    assert visible_files(output_dir) == ARTIFACTS
    for name in sorted(KEPT):
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
            threading._shutdown()  # as at the end of a program: waits for threads
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
def test_twenty_kills_at_any_time_leave_the_bytes_of_a_run_without(settings, finished, tmp_path):
    out, generator, n_kills, n_finished = tmp_path / "out", random.Random(0), 0, 0
    settings = {**settings, "generation_batch_size": 4}
    started = time.monotonic()
    with child(lambda: run(tmp_path / "timed", settings)) as number:
        assert wait(number, 60) == 0
    whole = time.monotonic() - started
    while n_kills < 20:
        pid = os.fork()
        if pid == 0:
            os._exit(run(out, settings))
        time.sleep(generator.uniform(0.02, 1.0) * whole / 2)
        os.kill(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended in (0, -signal.SIGKILL)
        if ended == 0:  # start anew, so that early phases are killed too
            n_finished += 1
            assert_same_bytes(out, finished)
            shutil.rmtree(out)
        else:
            n_kills += 1
    assert run(out, settings) == 0
    assert n_finished < 20
    assert_same_bytes(out, finished)
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} == {
        ".run.lock",
        ".generation_journal.jsonl.lock",
        ".evaluation_journal.jsonl.lock",
    }


def test_temporary_files_of_killed_runs_are_removed_and_no_others(settings, out):
    left = [out / name for name in (".cv_results.json.ab3_x9yz", ".figure1.png.abcdefgh")]
    others = [out / name for name in (".notes.txt", "mine.json.abcdefgh", ".generation_journal.jsonl.lock")]
    for path in [*left, *others]:
        path.write_text("something")
    assert run(out, settings) == 0
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_half_built_cache_entries_are_removed_by_the_next_builder(tmp_path, monkeypatch):
    monkeypatch.setenv(package_cache.CACHE_VARIABLE, str(tmp_path))
    mine, other = tmp_path / "models" / ".building-a-12345678", tmp_path / "models" / ".building-b-12345678"
    for folder in (mine, other):
        folder.mkdir(parents=True)
    package_cache.build_once("models/a", lambda folder: (folder / "file").write_text("built"))
    assert (tmp_path / "models" / "a" / "file").read_text() == "built"
    assert not mine.exists()
    assert other.exists()  # somebody may be building it


def test_offload_folders_are_removed_when_their_owner_is_dead(tmp_path, monkeypatch):
    monkeypatch.setenv(package_cache.CACHE_VARIABLE, str(tmp_path))
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


def test_second_run_is_told_who_holds_the_folder(settings, out, capsys):
    before = (out / "config.json").read_bytes()
    with RunFolder(out).logged():
        pass
    held = RunFolder(out)
    held.lock()
    owner = load_json(out / ".run_owner.json")
    save_json(out / ".run_owner.json", {**owner, "host": "node7", "process": 4321})
    assert run(out, {**settings, "seed": 5}) == 2
    (line,) = error_lines(capsys)
    assert f"{out} is in use by process 4321 on node7 since {owner['since']}; wait until it ends" in line
    assert (out / "config.json").read_bytes() == before
    held.close()
    assert run(out, settings) == 0
    assert not (out / ".run_owner.json").exists()


def test_two_objects_on_one_folder_and_close(settings, loaded, tmp_path):
    config = {**settings, "output_dir": str(tmp_path / "out")}
    first, second = (PersonaTransferExperiment(config, inputs=loaded) for _ in range(2))
    first.setup()
    for call in (second.setup, second.run):
        with pytest.raises(InputError, match="in use by this process, through another object"):
            call()
    first.learn_mapping()
    first.close()
    second.setup()
    second.close()
    second.close()


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


def replace_content(path):
    """Write what can be read, bears the right fingerprint and is not what was there."""
    if path.suffix == ".json":
        whole = json.loads(path.read_text())
        save_json(path, {"fingerprint": whole.get("fingerprint"), "checks": [], "maps": [], "rows": []})
    elif path.suffix == ".pt":
        save_tensors(path, {"fingerprint": load_tensors(path)["fingerprint"], "maps": {}, "vectors": {}})
    elif path.suffix == ".png":
        Image.new("RGB", (4, 4)).save(path)
    else:
        path.write_text('{"journal": 1, "cache_key": "other"}\n{"row": {"key": "a"}, "crc": 1}\n')


REWRITTEN = (
    "config.json persona_similarities.json eval_results.json aggregated_results.json figure1.png".split()
)


@pytest.mark.parametrize("damage", [delete, halve, empty, flip, replace_content])
@pytest.mark.parametrize("name", [*sorted(KEPT - set(REWRITTEN)), "what every run writes"])
def test_damaged_artifact_gives_the_same_results(name, damage, settings, finished, out):
    for each in REWRITTEN if name not in KEPT else [name]:
        damage(out / each)
    assert run(out, settings) == 0
    for other in sorted(KEPT):
        assert content(out / other) == content(finished / other), other
    assert load_json(out / "config.json")["seed"] == 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cv_results.json", lambda whole: whole | {"best_r2": 0.99}),
        ("cv_results.json", lambda whole: whole | {"maps": whole["maps"][:1]}),
        ("preflight.json", lambda whole: whole | {"checks": whole["checks"][:-1]}),
        ("preflight.json", lambda whole: whole | {"checks": [{**whole["checks"][0], "detail": "x"}]}),
        ("generation_results.json", lambda whole: whole | {"rows": whole["rows"][::-1]}),
    ],
)
def test_changed_number_is_noticed_by_the_checksum(name, change, settings, finished, out, caplog):
    whole = json.loads((out / name).read_text())
    save_json(out / name, change(whole))
    if name == "generation_results.json":
        assert run(out, settings, "--phase", "5") == 2
    assert run(out, settings) == 0
    assert f"{name} is damaged (wrong checksum)" in caplog.text
    assert content(out / name) == content(finished / name)


WRONG = {
    "no norm": ("cv_results.json", {"target_residual_norm": {}}, "median is missing"),
    "an empty row": ("cv_results.json", {"maps": [{}]}, "maps[0].map is missing"),
    "no row": ("cv_results.json", {"maps": []}, "maps has 0 items, expected one or more"),
    "no list": ("preflight.json", {"checks": {}}, "checks is a dict, expected a list"),
    "a number": ("preflight.json", {"checks": [3]}, "checks[0] is a int, expected a dictionary"),
    "no maps": ("comparison_maps.pt", {"maps": {}}, "maps.procrustes is missing"),
    "turned": ("ridge_mapping.pt", {"W": torch.ones(48, 32)}, "W has shape (48, 32), expected (32, 48)"),
    "infinite": ("ridge_mapping.pt", {"W": torch.ones(32, 48) / 0}, "W holds numbers that are not finite"),
    "no cv": ("ridge_mapping.pt", {"cv": None}, "cv is a NoneType"),
    "no sums": ("pair_statistics.pt", {"statistics": {}}, "statistics.d_source is missing"),
    "no vectors": ("persona_vectors.pt", {"vectors": {}}, "vectors.loud is missing"),
    "no tensor": ("training_data.pt", {"H_source": [1.0]}, "H_source is a list, expected a tensor"),
}


@pytest.mark.parametrize(("name", "change", "problem"), WRONG.values(), ids=WRONG)
def test_wrong_structure_is_made_again_and_named(name, change, problem, settings, finished, out, caplog):
    """Of an artifact without a checksum, as earlier versions wrote them."""
    load, save = (load_tensors, save_tensors) if name.endswith(".pt") else (load_json, save_json)
    save(out / name, load(out / name) | change)
    assert run(out, settings) == 0
    assert re.search(
        rf"{name} is not as it was written \(.*{re.escape(problem)}.*making it again", caplog.text
    )
    assert content(out / name) == content(finished / name)


def test_artifacts_without_checksum_are_current(settings, finished, out):
    names = [name for name in KEPT if name.endswith(".json")]
    for name in names:
        save_json(out / name, load_json(out / name))
    before = {name: (out / name).stat().st_mtime_ns for name in ("cv_results.json", "preflight.json")}
    assert run(out, settings) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    log = (out / "experiment.log").read_text().split("source layer")[-1]
    assert "0 new texts" in log
    assert ", 0 of them new" in log


def test_rows_that_contradict_their_fingerprint_are_refused(settings, out, capsys):
    whole = load_json(out / "generation_results.json")
    save_json(out / "generation_results.json", sealed(whole | {"rows": whole["rows"][1:]}))
    assert run(out, settings, "--phase", "5") == 2
    (line,) = error_lines(capsys)
    assert "generation_results.json holds other rows than it says; delete it and run phase 4 again" in line


def test_lost_evaluations_come_back_to_the_last_bit(settings, finished, out):
    journal = out / "evaluation_journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(rows := lines[1:])
    journal.write_bytes(lines[0] + b"".join(rows[: len(rows) // 2]))
    assert run(out, settings) == 0
    assert_same_bytes(out, finished)


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


def test_judge_that_is_added_later_costs_no_perplexity(settings, finished, out, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    monkeypatch.setattr(Worker, "perplexities", None)
    monkeypatch.setattr(run_experiment, "load_inputs", load_inputs)
    with chat_server(lambda prompt: completion("4")) as server:
        judge = {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"}
        assert run(out, {**settings, "use_gpt4": True, "judge": judge}) == 0
    before, after = (load_json(folder / "eval_results.json")["rows"] for folder in (finished, out))
    assert [row["perplexity"] for row in after] == [row["perplexity"] for row in before]
    assert {row["gpt4_coherence_score"] for row in after} == {4}


def cut_last_rows(journal, n_rows=2):
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-n_rows]))


def test_judge_is_asked_about_missing_rows_alone(settings, loaded, out, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    with chat_server(lambda prompt: completion("4")) as server:
        judge = {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"}
        monkeypatch.setattr(run_experiment, "load_inputs", load_inputs)
        judged = {**settings, "use_gpt4": True, "judge": judge}
        assert run(out, judged) == 0
        asked = len(server.prompts)
        cut_last_rows(out / "evaluation_journal.jsonl")
        assert run(out, judged) == 0
        assert len(server.prompts) == asked  # what was judged is held by the judgements' own journal
        cut_last_rows(out / "evaluation_journal.jsonl")
        cut_last_rows(out / "judgements_journal.jsonl")
        assert run(out, judged) == 0
        assert asked < len(server.prompts) <= asked + 4


# Obstacles


@pytest.mark.parametrize("name", sorted(ARTIFACTS - {"config.json"}))
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
        ("{}/new/" + "x" * 300, "File name too long"),
        ("{}/dangling", "a link to nothing"),
        ("{}/dangling/below", "cannot be written|exists"),
        ("{}/file/below", "cannot be written"),
    ],
    ids=["NUL", "surrogate", "long", "long below new", "dangling", "below dangling", "below a file"],
)
def test_output_directory_that_cannot_be_is_one_line(output_dir, said, settings, tmp_path, capsys):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    config = {**settings, "output_dir": output_dir.format(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_experiment.main(["--config", str(tmp_path / "config.json")]) == 2
    (line,) = error_lines(capsys)
    assert re.search(said, line)


@contextmanager
def immutable(path):
    if shutil.which("chattr") is None:
        pytest.skip("files cannot be made immutable here")
    if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
        pytest.skip("files cannot be made immutable here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@pytest.mark.parametrize("name", ["cv_results.json", "generation_journal.jsonl", "experiment.log"])
def test_immutable_file_is_named(name, settings, out, capsys):
    with immutable(out / name):
        assert run(out, settings, "--fresh") == 2
    (line,) = error_lines(capsys)
    assert re.fullmatch(rf"error: {out / name}: Operation not permitted; make it changeable .*", line)


def test_unreadable_file_is_named(settings, out, capsys, monkeypatch):
    read = Path.read_text

    def refused(path, *args, **kwargs):
        if path.name == "cv_results.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    assert run(out, settings) == 2
    (line,) = error_lines(capsys)
    assert "cv_results.json: Permission denied; give this user the right" in line


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
    path = tmp_path / "config.json"
    for size in ("8k", "64k", "500k", "2500k", "3200k"):
        out = small_disk(size) / "out"
        path.write_text(json.dumps({**settings, "output_dir": str(out)}))
        assert run_experiment.main(["--config", str(path)]) == 2, size
        (line,) = error_lines(capsys)
        assert re.match(rf"error: (output_dir ')?{out}.*No space left on device", line), line
        assert "choose another" in line
    small_disk("50m")
    assert run_experiment.main(["--config", str(path)]) == 0
    assert_same_bytes(out, finished)


# Signals

STOPPED = "stopped: every text written so far is kept; run the same command again to go on\n"


def slow_product():
    """Keep torch at work for many seconds without a word of Python."""
    torch.mm(torch.ones(5000, 5000), torch.ones(5000, 100_000)).sum()


def signalled(number, out, settings, started, tmp_path):
    """Return the status, the seconds and what was printed of a run that gets a signal at `started`."""
    printed = tmp_path / "printed"

    def work():
        os.dup2(os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        stopping.end_on_signals()
        return run(out, settings)

    with child(work) as pid:
        deadline = time.monotonic() + 30
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        began = time.monotonic()
        os.kill(pid, number)
        status = wait(pid, 10)
    return status, time.monotonic() - began, printed.read_text()


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["torch", "python", "loading"])
def test_signal_ends_the_run_in_two_seconds(place, number, settings, finished, loaded, tmp_path, monkeypatch):
    out, started = tmp_path / "out", tmp_path / "started"

    def busy(*args, **kwargs):
        started.touch()
        if place == "torch":
            slow_product()
        while True:
            time.sleep(0.001)

    if place == "loading":
        monkeypatch.setattr(run_experiment, "load_inputs", busy)
    else:
        monkeypatch.setattr("experiment.executor.Worker.write", busy)
    status, seconds, printed = signalled(number, out, settings, started, tmp_path)
    assert status == 128 + number
    assert seconds < 2
    assert printed.endswith(STOPPED)
    assert "Traceback" not in printed
    monkeypatch.undo()
    monkeypatch.setattr(run_experiment, "load_inputs", lambda config, _: replace(loaded, config=config))
    if place == "python" and number == signal.SIGINT:
        assert run(out, settings) == 0
        assert_same_bytes(out, finished)


@needs_fork
def test_slow_judge_does_not_delay_the_end(settings, out, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    monkeypatch.setattr(run_experiment, "load_inputs", load_inputs)
    started = tmp_path / "started"

    def answer(prompt):
        started.touch()
        time.sleep(5)
        return completion("4")

    with chat_server(answer) as server:
        judge = {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"}
        judged = {**settings, "use_gpt4": True, "judge": judge}
        status, seconds, printed = signalled(signal.SIGINT, out, judged, started, tmp_path)
    assert status == 130
    assert seconds < 2
    assert printed.endswith(STOPPED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_modules_are_imported(number, settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**settings, "output_dir": str(tmp_path / "out")}))
    command = [sys.executable, "-v", "run_experiment.py", "--config", str(tmp_path / "config.json")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("import 'torch.nn"):
            break
    began = time.monotonic()
    process.send_signal(number)
    printed = process.stderr.read()
    assert process.wait(10) == 128 + number
    assert time.monotonic() - began < 2
    assert STOPPED.strip() in printed
    assert "Traceback" not in printed


def test_fresh_run_is_told_to_go_on_without_the_flag(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run_experiment.py", "--config", "x.json", "--fresh"])
    with stopping.unwinding():
        assert stopping.say_stopped(stopping.Terminated()) == 143
    assert "run the command without --fresh to go on" in capfd.readouterr().err


def test_error_that_a_library_makes_of_a_signal_is_a_signal(monkeypatch):
    def work(received):
        with stopping.unwinding():
            monkeypatch.setattr(stopping, "_received", received)
            raise RuntimeError("interrupted, or a defect")

    with pytest.raises(stopping.Terminated):
        work(signal.SIGTERM)
    with pytest.raises(RuntimeError):
        work(None)

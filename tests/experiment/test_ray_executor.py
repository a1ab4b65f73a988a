"""Every chunk's result arrives, as from a local worker, whatever happens to the workers."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from experiment import ray_executor
from experiment.ray_executor import PROJECT_FOLDER, Place, RayExecutor, plan_places
from support.errors import InputError

CHUNKS = [(number,) for number in range(6)]
SQUARES = [(number, number**2) for number in range(6)]


class Worker:
    """Leaves a file in `folder` for every time that it is made or begins a chunk."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.note("made")

    def note(self, what):
        (self.folder / f"{what} {os.getpid()} {time.time_ns()}").touch()

    def square(self, number):
        self.note(f"square-{number}")
        return number**2

    def hold_1(self, number):
        """Square, but at the first call for 1 wait to be killed."""
        if number == 1 and not starts(self.folder, "square-1"):
            self.note("square-1")
            time.sleep(60)
        return self.square(number)

    def die_at_2(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    def fail_at_1(self, number, kind):
        logging.getLogger("a.worker").warning("about %s", number)
        if number == 1:
            raise kind(f"chunk {number} is wrong")
        return number

    def wait(self, seconds):
        self.note("wait")
        time.sleep(seconds)
        return seconds

    def unpicklable(self):
        return threading.Lock()


class UnpicklableError(Exception):
    """Pickles, but needs two arguments to be made again."""

    def __init__(self, text, code):
        super().__init__("remade")


def unpicklable_error(text):
    return UnpicklableError(text, 1)


def starts(folder, what):
    """The process ids of the workers that noted `what`."""
    return [int(path.name.split()[1]) for path in Path(folder).iterdir() if path.name.split()[0] == what]


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def fail_to_make(folder, dies):
    Worker(folder)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    raise InputError("the model was not found")


@pytest.fixture(scope="module")
def cluster():
    """Ray with two CPUs, initialised as a caller would in a notebook."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def shared(cluster, tmp_path_factory):
    """Two workers for the tests that lose none; these tests stand before all that need the CPUs."""
    folder = tmp_path_factory.mktemp("starts")
    with RayExecutor(partial(Worker, folder), n_workers=2) as executor:
        executor.folder = folder
        yield executor


def test_every_result_arrives_with_its_index_and_workers_are_made_once(shared):
    assert list(shared.run("square", [])) == []
    for _ in range(3):
        assert sorted(shared.run("square", CHUNKS)) == SQUARES
    made = starts(shared.folder, "made")
    assert len(made) == len(set(made)) <= 2
    assert set(starts(shared.folder, "square-1")) <= set(made)


@pytest.mark.parametrize("kind", [InputError, KeyError])
def test_errors_and_warnings_arrive_as_the_worker_raised_and_logged_them(shared, kind, caplog):
    with pytest.raises(kind) as caught:
        list(shared.run("fail_at_1", [(1, kind)]))
    assert type(caught.value) is kind
    assert caught.value.args == ("chunk 1 is wrong",)
    assert "in fail_at_1" in caught.value.__notes__[0]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("a.worker", "WARNING")
    assert record.getMessage() in ("worker 0: about 1", "worker 1: about 1")
    assert sorted(shared.run("fail_at_1", [(0, kind), (2, kind)])) == [(0, 0), (1, 2)]
    assert len(caplog.records) == 3


@pytest.mark.parametrize(
    ("method", "chunk", "message"),
    [("fail_at_1", (1, unpicklable_error), "remade"), ("unpicklable", (), "lock")],
)
def test_what_cannot_be_sent_is_an_error_that_says_so(shared, method, chunk, message):
    with pytest.raises(Exception, match=message):
        list(shared.run(method, [chunk]))
    assert sorted(shared.run("square", CHUNKS)) == SQUARES


def test_iteration_can_stop_early(shared):
    results = shared.run("wait", [(seconds,) for seconds in (0, 1, 0, 0, 0, 0)])
    assert next(results)[1] == 0
    results.close()
    # The chunk that was abandoned must not appear among the results of the next run.
    assert sorted(shared.run("square", CHUNKS)) == SQUARES
    assert len(starts(shared.folder, "wait")) < 6


def test_no_free_cpu_is_an_error_after_a_while(shared, monkeypatch):
    monkeypatch.setattr(ray_executor, "PLACEMENT_SECONDS", 1.0)
    with pytest.raises(InputError, match=r"1 of 1 Ray workers got no place .* has 0 CPUs"):
        RayExecutor(dict, n_workers=1)
    assert sorted(shared.run("square", CHUNKS)) == SQUARES


def test_close_ends_busy_workers_and_leaves_the_callers_ray_up(shared, cluster):
    results = shared.run("wait", [(0,), (60,), (60,)])
    next(results)
    wait_until(lambda: len(starts(shared.folder, "wait")) > 2)
    shared.close()
    shared.close()
    for remaining in (results, shared.run("square", CHUNKS)):
        with pytest.raises(RuntimeError, match="executor is closed"):
            next(remaining)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in starts(shared.folder, "made")))
    assert cluster.is_initialized()


def test_a_killed_worker_costs_its_chunk_only(cluster, tmp_path, caplog):
    with RayExecutor(partial(Worker, tmp_path), n_workers=2) as executor:
        results = executor.run("hold_1", CHUNKS)
        found = [next(results)]
        wait_until(lambda: starts(tmp_path, "square-1"))
        os.kill(starts(tmp_path, "square-1")[0], signal.SIGKILL)
        found += results
    assert sorted(found) == SQUARES
    assert [len(starts(tmp_path, f"square-{number}")) for number in range(6)] == [1, 2, 1, 1, 1, 1]
    assert len(starts(tmp_path, "made")) == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_chunk_that_always_kills_its_worker_is_given_up(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "MAX_RESTARTS", 1)
    with RayExecutor(partial(Worker, tmp_path), n_workers=2) as executor:
        found = []
        with pytest.raises(RuntimeError, match=r"chunk 2 is given up, .* fit in memory"):
            found.extend(executor.run("die_at_2", CHUNKS))
    assert sorted(found) == [pair for pair in SQUARES if pair[0] != 2]


@pytest.mark.parametrize(
    ("dies", "error", "message"),
    [(False, InputError, "the model was not found"), (True, RuntimeError, "workers left: 0")],
)
def test_a_worker_that_cannot_be_made_ends_the_run(cluster, tmp_path, monkeypatch, dies, error, message):
    monkeypatch.setattr(ray_executor, "MAX_RESTARTS", 1)
    make_worker = partial(fail_to_make, tmp_path, dies)
    with RayExecutor(make_worker, n_workers=1) as executor, pytest.raises(error, match=message):
        list(executor.run("square", CHUNKS[:1]))
    assert len(starts(tmp_path, "made")) == 1 + dies


SCRIPT = """
import json, os, sys
sys.path.insert(0, {project!r})
import ray
from experiment.ray_executor import RayExecutor

class Worker:
    def describe(self):
        from decoding import batching
        names = "OMP_NUM_THREADS", "PERSONA_TRANSFER_CACHE"
        return [os.environ[name] for name in names], batching.__file__, os.listdir()

with RayExecutor(Worker, address={address!r}) as executor:
    ((_, found),) = executor.run("describe", [()])
print(json.dumps([ray.is_initialized(), *found]))
"""


def run_script(folder, address):
    """What a worker reports of a program that runs in another folder, which prints nothing else."""
    script = SCRIPT.format(project=str(PROJECT_FOLDER), address=address)
    variables = {**os.environ, "PERSONA_TRANSFER_CACHE": "/a/cache"}
    if address is None:
        # Ray set it in this process, and would not set it itself if it found it.
        variables.pop("RAY_AUTH_MODE", None)
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")
    return json.loads(finished.stdout)


def test_a_local_ray_is_quiet_and_ends_with_its_executor(tmp_path):
    pytest.importorskip("ray")
    is_up, (_, cache), module, _ = run_script(tmp_path, None)
    assert (is_up, cache) == (False, "/a/cache")
    assert module == str(PROJECT_FOLDER / "decoding" / "batching.py")


def test_a_cluster_is_sent_the_modules_and_nothing_else(cluster, tmp_path):
    address = cluster.get_runtime_context().gcs_address
    _, (n_threads, cache), module, files = run_script(tmp_path, address)
    assert (n_threads, cache) == ("2", "/a/cache")  # the only worker has both CPUs of the cluster
    assert Path(module).parent.parent != PROJECT_FOLDER
    packages = {"analysis", "decoding", "experiment", "maps", "scoring", "support", "texts"}
    assert packages | {path.name for path in PROJECT_FOLDER.glob("*.py")} <= set(files)
    assert not {"results", "tests", "docs", "README.md", ".git", ".venv"} & set(files)
    assert cluster.nodes()[0]["Alive"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "refused"),
        ("ray://127.0.0.1:1", "refused"),
        ("ray://127.0.0.1", "refused"),
        ("nonsense", "expected"),
        ("127.0.0.1:99999", "Port out of range"),
    ],
)
def test_a_wrong_address_is_named_at_once(monkeypatch, address, reason):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    started = time.monotonic()
    with pytest.raises(InputError, match=f"address {address} .*{reason}"):
        RayExecutor(dict, address=address)
    assert time.monotonic() - started < 5


def test_ray_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-ray\.txt"):
        RayExecutor(dict)


def node(name, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "n_workers", "expected"),
    [
        ([node("a", CPU=8), node("b", CPU=2)], None, [("a", 8, 0), ("b", 2, 0)]),
        ([node("a", CPU=8), node("b", CPU=4)], 3, [("a", 4, 0)] * 2 + [("b", 4, 0)]),
        ([node("head"), node("a", CPU=2), node("gone", alive=False, CPU=64)], None, [("a", 2, 0)]),
        ([node("a", CPU=9, GPU=2), node("b", CPU=64)], None, [("a", 4, 1)] * 2),
        ([node("a", CPU=8, GPU=4), node("b", GPU=1)], None, [("a", 2, 1)] * 4 + [("b", 0, 1)]),
        ([node("a", CPU=8, GPU=4), node("b", CPU=8, GPU=4)], 2, [("a", 2, 1), ("b", 2, 1)]),
    ],
)
def test_workers_are_spread_over_the_devices(nodes, n_workers, expected):
    assert plan_places(nodes, n_workers) == [Place(*place) for place in expected]


@pytest.mark.parametrize(
    ("nodes", "n_workers", "message"),
    [
        ([node("a", CPU=2)], 3, "3 Ray workers .* needs a CPU .* has 2"),
        ([node("a", CPU=64, GPU=1)], 2, "2 Ray workers .* needs a GPU .* has 1"),
        ([node("a", CPU=2)], 0, "0 Ray workers"),
        ([node("a")], None, "needs a CPU"),
    ],
)
def test_workers_without_a_device_are_an_error(nodes, n_workers, message):
    with pytest.raises(InputError, match=message):
        plan_places(nodes, n_workers)

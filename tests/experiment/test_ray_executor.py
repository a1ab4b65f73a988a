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
        is_first = not starts(self.folder, f"square-{number}")
        self.note(f"square-{number}")
        if number == 1 and is_first:
            time.sleep(60)
        return number**2

    def die_at_2(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    def fail_at_1(self, number, kind):
        if number == 1:
            raise kind(f"chunk {number} is wrong")
        return number

    def wait(self, seconds):
        self.note("wait")
        time.sleep(seconds)
        return seconds

    def warn(self, text):
        logging.getLogger("a.worker").warning("about %s", text)

    def describe(self):
        import torch

        return torch.get_num_threads(), os.getcwd()

    def double_in_place(self, array):
        array *= 2
        return array

    def unpicklable(self):
        return threading.Lock()


class UnpicklableError(Exception):
    """Pickles, but needs two arguments to be made again."""

    def __init__(self, text, code=None):
        if code is None and not text.startswith("chunk"):
            raise TypeError("code is missing")
        super().__init__("remade")


class ModelWorker:
    def __init__(self):
        from support.tiny_models import tiny_model, tiny_tokenizer

        self.model, self.tokenizer = tiny_model("llama"), tiny_tokenizer()

    def hidden_states(self, texts):
        import torch

        inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            outputs = self.model(**inputs, output_hidden_states=True)
        return torch.stack(outputs.hidden_states)


def starts(folder, what):
    """The process ids of the workers that noted `what`."""
    return [int(path.name.split()[1]) for path in Path(folder).iterdir() if path.name.split()[0] == what]


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def make_nothing(folder):
    Worker(folder)
    raise InputError("the model was not found")


def make_and_die(folder):
    Worker(folder)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster():
    """Ray with two CPUs, initialised as a caller would in a notebook."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def shared(cluster, shared_folder):
    """Two workers for the tests that lose none."""
    with RayExecutor(partial(Worker, shared_folder), n_workers=2) as executor:
        yield executor


def test_every_result_arrives_with_the_index_of_its_chunk(shared):
    assert sorted(shared.run("square", CHUNKS)) == [(number, number**2) for number in range(6)]


def test_no_chunks_give_no_results(shared):
    assert list(shared.run("square", [])) == []


def test_workers_are_made_once_for_several_runs(shared, shared_folder):
    # One worker may do all of a run before the other is ready.
    wait_until(lambda: list(shared.run("square", CHUNKS)) and len(starts(shared_folder, "made")) == 2)
    for _ in range(3):
        assert len(dict(shared.run("square", CHUNKS))) == 6
    made = starts(shared_folder, "made")
    assert len(made) == len(set(made)) == 2
    assert set(starts(shared_folder, "square-1")) <= set(made)


def test_workers_share_the_cpus_and_work_in_the_same_folder(shared):
    ((_, found),) = shared.run("describe", [()])
    assert found == (1, os.getcwd())


@pytest.mark.parametrize("kind", [InputError, KeyError, RuntimeError])
def test_exceptions_of_a_worker_keep_their_type_and_text(shared, kind):
    with pytest.raises(kind) as caught:
        list(shared.run("fail_at_1", [(number, kind) for number in range(6)]))
    assert type(caught.value) is kind
    assert caught.value.args == ("chunk 1 is wrong",)
    assert "in fail_at_1" in caught.value.__notes__[0]
    assert shared.n_lost == 0
    assert len(dict(shared.run("square", CHUNKS))) == 6


def test_an_exception_that_cannot_be_sent_is_described(shared):
    with pytest.raises(RuntimeError, match="UnpicklableError cannot be sent"):
        list(shared.run("fail_at_1", [(1, UnpicklableError)]))


def test_a_result_that_cannot_be_sent_is_described(shared):
    with pytest.raises(RuntimeError, match="lock cannot be sent"):
        list(shared.run("unpicklable", [()]))


def test_arrays_are_writable_on_both_sides(shared):
    numpy = pytest.importorskip("numpy")
    array = numpy.ones(50_000)
    ((_, doubled),) = shared.run("double_in_place", [(array,)])
    doubled += 1
    assert (doubled == 3).all()
    assert (array == 1).all()


def test_warnings_of_a_worker_are_logged_here(shared, caplog):
    list(shared.run("warn", [("memory",)]))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("a.worker", "WARNING")
    assert record.getMessage() in ("worker 0: about memory", "worker 1: about memory")


def test_iteration_can_stop_early(shared, shared_folder):
    results = shared.run("wait", [(seconds,) for seconds in (0, 1, 0, 0, 0, 0)])
    assert next(results)[1] == 0
    results.close()
    # The chunk that was abandoned must not appear among the results of the next run.
    assert sorted(shared.run("square", CHUNKS)) == [(number, number**2) for number in range(6)]
    assert len(starts(shared_folder, "wait")) < 6


def test_a_second_run_beside_an_unfinished_one_is_refused(shared):
    results = shared.run("square", CHUNKS)
    next(results)
    with pytest.raises(RuntimeError, match="another run is unfinished"):
        next(shared.run("square", CHUNKS))
    assert len(list(results)) == 5


def test_no_free_cpu_is_an_error_after_a_while(shared, monkeypatch):
    monkeypatch.setattr(ray_executor, "PLACEMENT_SECONDS", 1.0)
    with pytest.raises(
        InputError, match="1 of 1 Ray workers got no place within 1 seconds: the cluster has 0 CPUs"
    ):
        RayExecutor(dict, n_workers=1)
    assert len(dict(shared.run("square", CHUNKS))) == 6


def test_more_workers_than_cpus_are_refused_at_once(shared):
    with pytest.raises(InputError, match=r"3 Ray workers asked for, .* has 2 on 1 nodes"):
        RayExecutor(dict, n_workers=3)


def test_model_outputs_are_bitwise_those_of_a_local_worker(shared, cluster):
    torch = pytest.importorskip("torch")
    shared.close()
    texts = [(["a cat", "the naïve café"],), (["the dog ran"],), (["one", "two", "three 3"],)]
    with RayExecutor(ModelWorker, n_workers=2) as executor:
        results = dict(executor.run("hidden_states", texts))
    assert cluster.is_initialized()
    local = ModelWorker()
    for index, chunk in enumerate(texts):
        expected = local.hidden_states(*chunk)
        assert results[index].dtype == expected.dtype == torch.float32
        assert torch.equal(results[index], expected)


def test_a_killed_worker_costs_its_chunk_only(cluster, tmp_path, caplog):
    with RayExecutor(partial(Worker, tmp_path), n_workers=2) as executor:
        results = executor.run("hold_1", CHUNKS)
        found = [next(results)]
        wait_until(lambda: starts(tmp_path, "square-1"))
        os.kill(starts(tmp_path, "square-1")[0], signal.SIGKILL)
        found += results
        assert executor.n_lost == 1
        # The other worker may have done the rest before the new one was ready.
        wait_until(lambda: list(executor.run("square", [(9,)])) and len(starts(tmp_path, "made")) == 3)
    assert sorted(found) == [(number, number**2) for number in range(6)]
    assert [len(starts(tmp_path, f"square-{number}")) for number in range(6)] == [1, 2, 1, 1, 1, 1]
    (record,) = caplog.records
    assert "was lost at chunk 1 (loss 1 of at most 3 there, 1 in all)" in record.getMessage()


def test_a_chunk_that_always_kills_its_worker_is_given_up(cluster, tmp_path):
    with RayExecutor(partial(Worker, tmp_path), n_workers=2, max_losses=2) as executor:
        found = []
        with pytest.raises(RuntimeError, match=r"chunk 2 lost 2 workers in a row .* not fit in memory"):
            found.extend(executor.run("die_at_2", CHUNKS))
        assert executor.n_lost == 2
        # The chunk waits behind the others after its first loss.
        assert sorted(found) == [(number, number**2) for number in range(6) if number != 2]
        assert len(dict(executor.run("square", CHUNKS))) == 6


def test_a_cluster_without_room_for_another_worker_is_not_waited_for(cluster, tmp_path, monkeypatch, caplog):
    with RayExecutor(partial(Worker, tmp_path), n_workers=1) as executor:
        # As after the loss of a node that was larger than those that remain.
        executor._workers[0].place = Place("a" * 56, 64, 0)
        monkeypatch.setattr(ray_executor, "PLACEMENT_SECONDS", 1.0)
        with pytest.raises(RuntimeError, match="no worker is left"):
            list(executor.run("die_at_2", CHUNKS))
    assert "got no place on the cluster within 1 seconds; 0 workers remain" in caplog.text


def test_a_worker_that_cannot_be_made_raises_its_own_error_once(cluster, tmp_path):
    with (
        pytest.raises(InputError) as caught,
        RayExecutor(partial(make_nothing, tmp_path), n_workers=1) as executor,
    ):
        list(executor.run("square", CHUNKS))
    assert str(caught.value) == "the model was not found"
    assert len(starts(tmp_path, "made")) == 1


def test_a_worker_that_dies_while_it_loads_is_given_up(cluster, tmp_path):
    with (
        RayExecutor(partial(make_and_die, tmp_path), n_workers=1, max_losses=2) as executor,
        pytest.raises(RuntimeError, match="loading the models lost 2 workers in a row"),
    ):
        list(executor.run("square", CHUNKS))
    assert len(starts(tmp_path, "made")) == 2


def test_close_ends_a_busy_worker(cluster, tmp_path):
    executor = RayExecutor(partial(Worker, tmp_path))
    results = executor.run("wait", [(0,), (60,)])
    next(results)
    wait_until(lambda: len(starts(tmp_path, "wait")) == 2)
    executor.close()
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(results)
    wait_until(lambda: not is_running(starts(tmp_path, "wait")[0]))
    assert cluster.is_initialized()


SCRIPT = """
import json, os, sys
sys.path.insert(0, {project!r})
import ray
from experiment.ray_executor import RayExecutor

class Worker:
    def describe(self):
        import torch
        from decoding import batching
        cache = os.environ.get("PERSONA_TRANSFER_CACHE")
        return {{"threads": torch.get_num_threads(), "cache": cache, "module": batching.__file__}}

with RayExecutor(Worker, address={address!r}) as executor:
    ((_, found),) = executor.run("describe", [()])
found["up"] = ray.is_initialized()
print(json.dumps(found))
"""


def run_script(folder, address):
    """What a worker reports of a program that runs in another folder, and its standard error."""
    script = SCRIPT.format(project=str(PROJECT_FOLDER), address=address)
    variables = {**os.environ, "PERSONA_TRANSFER_CACHE": "/a/cache"}
    if address is None:
        # Ray set it in this process, and would not set it itself if it found it.
        variables.pop("RAY_AUTH_MODE", None)
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout), finished.stderr


def test_a_local_ray_is_quiet_and_ends_with_its_executor(tmp_path):
    pytest.importorskip("ray")
    found, errors = run_script(tmp_path, None)
    assert errors == ""
    assert found["cache"] == "/a/cache"
    assert found["module"] == str(PROJECT_FOLDER / "decoding" / "batching.py")
    assert not found["up"]


def test_a_cluster_is_sent_the_code(cluster, tmp_path):
    address = cluster.get_runtime_context().gcs_address
    found, errors = run_script(tmp_path, address)
    assert errors == ""
    assert found["cache"] == "/a/cache"
    # The only worker has both CPUs of the cluster.
    assert found["threads"] == 2
    assert Path(found["module"]).name == "batching.py"
    assert Path(found["module"]).parent != PROJECT_FOLDER
    assert cluster.is_initialized()
    assert cluster.nodes()[0]["Alive"]


def test_only_modules_and_texts_are_sent(cluster, tmp_path):
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    sent = [
        "experiment/workers.py",
        "model_loading.py",
        "personas/one.json",
        "prompts/test.txt",
        "support/errors.py",
    ]
    kept = [
        "results/big.pt",
        "a.pt",
        ".git/config",
        ".venv/lib/x.py",
        "docs/x.py",
        "tests/test_x.py",
        "README.md",
    ]
    for name in sent + kept + ["personas/__pycache__/x.pyc"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = []
    excludes = [packaging._get_excludes(tmp_path, ray_executor.NOT_SENT)]
    packaging._dir_travel(tmp_path, excludes, found.append, include_gitignore=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in found if path.is_file()) == sent


@pytest.fixture
def no_ray_yet(monkeypatch):
    """Ray as it is before it is initialised, and no address to find."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at the address 127.0.0.1:1"),
        ("ray://127.0.0.1:1", "no Ray cluster answers at the address ray://127.0.0.1:1"),
        ("ray://127.0.0.1", "no Ray cluster answers at the address ray://127.0.0.1 "),
        ("nonsense", "'nonsense', expected"),
        ("host:port", "'host:port', expected"),
        ("127.0.0.1:99999", "127.0.0.1:99999"),
    ],
)
def test_a_wrong_address_is_named_at_once(no_ray_yet, address, message):
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        RayExecutor(dict, address=address)
    assert time.monotonic() - started < 5


def test_ray_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-ray\.txt"):
        RayExecutor(dict)


def test_max_losses_below_1_is_refused():
    with pytest.raises(ValueError, match="max_losses is 0"):
        RayExecutor(dict, max_losses=0)


def node(name, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": {key: float(n) for key, n in resources.items()}}


@pytest.mark.parametrize(
    ("nodes", "n_workers", "expected"),
    [
        ([node("a", CPU=8)], None, [("a", 8, 0)]),
        ([node("a", CPU=8), node("b", CPU=2)], None, [("a", 8, 0), ("b", 2, 0)]),
        ([node("a", CPU=8), node("b", CPU=2)], 2, [("a", 4, 0)] * 2),
        ([node("a", CPU=8), node("b", CPU=4)], 3, [("a", 4, 0)] * 2 + [("b", 4, 0)]),
        ([node("a", CPU=3)], 3, [("a", 1, 0)] * 3),
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
        ([node("a", CPU=2)], 3, "3 Ray workers .* needs a CPU .* has 2 on 1 nodes"),
        ([node("a", CPU=64, GPU=1)], 2, "2 Ray workers .* needs a GPU .* has 1 on 1 nodes"),
        ([node("a", CPU=2)], 0, "0 Ray workers"),
        ([node("a")], None, "needs a CPU"),
    ],
)
def test_workers_without_a_device_are_refused(nodes, n_workers, message):
    with pytest.raises(InputError, match=message):
        plan_places(nodes, n_workers)

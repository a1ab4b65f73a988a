"""Run chunks of work on the workers of a Ray cluster, one worker for each device.

A worker is an object that holds the models. It is made once in a process of its own and
kept over several runs. When a process or its node is lost, another takes its place and
only the chunk that it was working on is run again.

Conventions: every node has the same versions of Python, Ray and the packages of
requirements.txt. Workers return tensors on the CPU. On CPU-only clusters a worker computes
with as many threads as it has CPUs, so its floats are those of a local run with as many
threads. Warnings that a worker logs are logged here too, under the same logger and with the
worker's number; what it prints stays in Ray's own log files. When a process dies, Ray
prints a line of its own beside our warning.

A local Ray and a Ray that the caller has started find modules as the caller's Python does.
Any other cluster is sent the project's modules and texts, and its workers run in a copy of
that folder: paths in their settings must be absolute and mean the same on every node.
"""

import logging
import logging.handlers
import os
import pickle
import queue
import signal
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal

from support.errors import InputError
from support.package_cache import CACHE_VARIABLE

logger = logging.getLogger(__name__)

PROJECT_FOLDER = Path(__file__).resolve().parent.parent
# Read by Ray as lines of a .gitignore file: nothing, except the folder, its modules and its texts.
FOLDERS = "analysis decoding experiment maps scoring support texts personas prompts".split()
NOT_SENT = ["/*", "!/.", "!/*.py", *(f"!/{folder}" for folder in FOLDERS), "__pycache__"]
CLIENT_PORT = 10001
CONNECT_SECONDS = 10.0
# Starting a process takes seconds; this leaves time to send the code to a slow node.
PLACEMENT_SECONDS = 120.0


@dataclass(frozen=True)
class Place:
    """The node on which a worker should run and what it may use there."""

    node_id: str
    n_cpus: int
    n_gpus: int


@dataclass(eq=False)
class _Worker:
    number: int
    place: Place
    actor: Any
    deadline: float  # for being placed, on the clock of time.monotonic


@dataclass(eq=False)
class _Task:
    """What a worker is doing; "abandoned" is a call whose result nobody waits for."""

    worker: _Worker
    stage: Literal["start", "load", "call", "abandoned"]
    chunk_idx: int | None = None


class RayExecutor:
    """Workers on a Ray cluster; close it, or use it as a context manager."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        address: str | None = None,
        n_workers: int | None = None,
        max_losses: int = 3,
    ) -> None:
        """Connect and wait until every worker has its place; the models load from then on.

        make_worker: picklable, for example functools.partial(Worker, settings); called once in each worker.
        address: None starts a local Ray; "auto", "ray://host:port" or "host:port" is a cluster.
            A Ray that the caller has initialised is used as it is, whatever the address, and stays up.
        n_workers: default one for each GPU, or without GPUs one for each node with all its CPUs.
        max_losses: how often one chunk may lose its worker before `run` gives up.
        Raises InputError: Ray is not installed, no cluster at the address, no room for the workers.
        """
        if max_losses < 1:
            raise ValueError(f"max_losses is {max_losses}, expected 1 or more")
        self._ray = _import_ray()
        self._lost_errors = _errors_of_lost_workers(self._ray)
        self._make_worker = self._ray.cloudpickle.dumps(make_worker)
        self._max_losses = max_losses
        self._n_failed_starts = 0
        self._n_losses: Counter[int] = Counter()  # for each chunk of this run
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        # In order of submission: Ray reports the first that is ready, so the oldest is never passed over.
        self._tasks: dict[Any, _Task] = {}
        self._has_started = self._running = self._closed = False
        self.n_lost = 0
        self._started_ray = not self._ray.is_initialized()
        self._sends_code = self._started_ray and address is not None
        if self._started_ray:
            with _own_sigterm():
                _connect(self._ray, address)
        try:
            self._start_workers(n_workers)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, method: str, chunks: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
        """Yield (chunk index, worker.method(*chunk)) for every chunk, as they finish.

        Iteration may stop early: what the workers are doing then is finished and dropped.
        Raises what the worker raised, with the worker's traceback as a note; RuntimeError if a
        chunk has lost max_losses workers in a row.
        """
        if self._running:
            raise RuntimeError("another run is unfinished: exhaust its iterator or close it first")
        self._running = True
        waiting = deque(range(len(chunks)))
        self._n_losses.clear()
        n_left = len(chunks)
        try:
            while n_left:
                self._hand_out(method, chunks, waiting)
                task, value, is_lost = self._advance()
                if task.stage != "call":
                    continue
                if is_lost:
                    waiting.append(task.chunk_idx)
                    continue
                n_left -= 1
                # Before the caller works on this result, so that no device waits for the caller.
                self._hand_out(method, chunks, waiting)
                yield task.chunk_idx, value
        finally:
            for task in self._tasks.values():
                if task.stage == "call":
                    task.stage = "abandoned"
            self._running = False

    def close(self) -> None:
        """End the workers, and Ray if this executor started it or connected to it."""
        if self._closed:
            return
        self._closed = True
        self._tasks.clear()
        self._idle.clear()
        if self._ray.is_initialized():
            for worker in self._workers:
                self._ray.kill(worker.actor)
            if self._started_ray:
                self._ray.shutdown()

    def _start_workers(self, n_workers: int | None) -> None:
        for number, place in enumerate(plan_places(self._ray.nodes(), n_workers)):
            self._start_worker(number, place)
        while any(task.stage == "start" for task in self._tasks.values()):
            self._advance()
        self._has_started = True

    def _start_worker(self, number: int, place: Place) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Set before the process starts: torch reads the number of threads when it is imported.
        variables = {"OMP_NUM_THREADS": str(max(1, place.n_cpus))}
        if os.environ.get(CACHE_VARIABLE):
            variables[CACHE_VARIABLE] = os.path.abspath(os.environ[CACHE_VARIABLE])
        if not self._sends_code:
            variables["PYTHONPATH"] = os.pathsep.join(_module_folders())
        options = {
            "num_cpus": place.n_cpus,
            "num_gpus": place.n_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            # Soft: if the node is lost, the worker's successor may run on another.
            "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node_id, soft=True),
            "runtime_env": {"env_vars": variables},
        }
        actor = self._ray.remote(_Host).options(**options).remote()
        worker = _Worker(number, place, actor, time.monotonic() + PLACEMENT_SECONDS)
        self._workers.append(worker)
        self._tasks[actor.start.remote()] = _Task(worker, "start")

    def _hand_out(self, method: str, chunks: Sequence[tuple], waiting: deque[int]) -> None:
        """Give every idle worker a chunk."""
        while waiting and self._idle:
            chunk = self._ray.cloudpickle.dumps(tuple(chunks[waiting[0]]))
            worker = self._idle.pop()
            self._tasks[worker.actor.call.remote(method, chunk)] = _Task(worker, "call", waiting.popleft())

    def _advance(self) -> tuple[_Task, Any, bool]:
        """Wait until a worker has finished something; return it, its value and whether the worker was lost.

        Raises what the worker raised, unless its task was abandoned.
        """
        reference = self._wait()
        task = self._tasks.pop(reference)
        worker = task.worker
        try:
            reply = self._ray.get(reference)
        except self._lost_errors as error:
            if getattr(error, "actor_init_failed", False):  # not lost: the project cannot be imported there
                self.close()
                raise
            self._replace(task, error)
            return task, None, True
        if task.stage == "start":
            self._tasks[worker.actor.load.remote(self._make_worker)] = _Task(worker, "load")
            return task, None, False
        value, error, records = pickle.loads(reply)
        _log_again(records, worker.number)
        if task.stage == "load" and error is not None:
            self.close()
            raise error
        self._n_failed_starts = 0
        self._idle.append(worker)
        if error is not None and task.stage == "call":
            raise error
        return task, value, False

    def _wait(self) -> Any:
        """Return the reference of the first finished task, dropping workers that got no place in time."""
        while self._tasks:
            deadlines = [task.worker.deadline for task in self._tasks.values() if task.stage == "start"]
            timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=timeout)
            if ready:
                return ready[0]
            self._drop_unplaced()
        if self._closed:
            raise RuntimeError("this executor is closed")
        raise RuntimeError("no worker is left, and the cluster had no room for another")

    def _drop_unplaced(self) -> None:
        """Go on with fewer workers, unless that happens at the very start."""
        now = time.monotonic()
        late = {
            reference: task.worker
            for reference, task in self._tasks.items()
            if task.stage == "start" and task.worker.deadline <= now
        }
        if late and not self._has_started:
            free = self._ray.available_resources()
            raise InputError(
                f"{len(late)} of {len(self._workers)} Ray workers got no place within {PLACEMENT_SECONDS:g} "
                f"seconds: the cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free; "
                "wait for other work on it to end or ask for fewer workers"
            )
        for reference, worker in late.items():
            del self._tasks[reference]
            self._remove(worker)
            message = "worker %d got no place on the cluster within %g seconds; %d workers remain"
            logger.warning(message, worker.number, PLACEMENT_SECONDS, len(self._workers))

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.actor)

    def _replace(self, task: _Task, error: Exception) -> None:
        """Start a worker in the place of a lost one.

        Raises RuntimeError if the chunk, or loading the models, has lost max_losses workers in a row.
        """
        worker, chunk_idx = task.worker, task.chunk_idx
        # Ray's last line says what happened, and then guesses at length.
        reason = str(error).strip().split("\n")[-1].partition(" Some common causes")[0]
        self.n_lost += 1
        if task.stage in ("call", "abandoned"):
            n_losses = self._n_losses[chunk_idx] = self._n_losses[chunk_idx] + (task.stage == "call")
            what = f"chunk {chunk_idx}"
        else:
            n_losses = self._n_failed_starts = self._n_failed_starts + 1
            what = "loading the models"
        message = "worker %d was lost at %s (loss %d of at most %d there, %d in all): %s"
        logger.warning(message, worker.number, what, n_losses, self._max_losses, self.n_lost, reason)
        self._remove(worker)
        self._start_worker(worker.number, worker.place)
        if n_losses >= self._max_losses:
            raise RuntimeError(
                f"{what} lost {n_losses} workers in a row and is given up: it may not fit in memory; "
                f"try smaller batches, chunks or models; the last loss: {reason}"
            ) from error


class _Host:
    """The process of one worker. Requests and replies are pickled here, not by Ray.

    So arrays arrive writable as in a local call, and every exception keeps its type.
    """

    def __init__(self) -> None:
        self._worker: Any = None
        self._records: queue.SimpleQueue = queue.SimpleQueue()
        # The second handler leaves a copy in Ray's log files, in case this process dies.
        for handler in (logging.handlers.QueueHandler(self._records), logging.StreamHandler()):
            handler.setLevel(logging.WARNING)
            logging.getLogger().addHandler(handler)

    def start(self) -> None:
        """Return, which shows that this process has its place."""

    def load(self, make_worker: bytes) -> bytes:
        def make() -> None:
            self._worker = pickle.loads(make_worker)()

        return self._reply(make)

    def call(self, method: str, chunk: bytes) -> bytes:
        return self._reply(lambda: getattr(self._worker, method)(*pickle.loads(chunk)))

    def _reply(self, work: Callable[[], Any]) -> bytes:
        """Return the pickled triple of value, exception and log records."""
        from ray import cloudpickle

        value, error = None, None
        try:
            value = work()
        except Exception as raised:  # every kind: the executor raises it again
            raised.add_note(f"In the worker:\n{traceback.format_exc()}")
            error = raised.with_traceback(None)
        records = [self._records.get() for _ in range(self._records.qsize())]
        try:
            reply = cloudpickle.dumps((value, error, records))
            if error is not None:
                pickle.loads(reply)
        except Exception as failure:  # pickling runs the object's own code, which may raise anything
            content = value if error is None else error
            text = f"{type(content).__name__} cannot be sent from a worker ({failure!r})"
            if error is not None:
                text += f": {error}\n{traceback.format_exception(error)[-1]}"
            return cloudpickle.dumps((None, RuntimeError(text), records))
        return reply


def plan_places(nodes: Sequence[Mapping[str, Any]], n_workers: int | None = None) -> list[Place]:
    """Return the place of every worker.

    nodes: as ray.nodes() describes them.
    With GPUs in the cluster a worker gets one GPU and its share of the node's CPUs. Without,
    a node's workers share its CPUs; more workers go where there is more for each.
    Raises InputError if a worker would be left without a GPU, or without a CPU.
    """
    resources = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
    cpus = {node_id: int(total.get("CPU", 0)) for node_id, total in resources.items()}
    gpus = {node_id: int(total.get("GPU", 0)) for node_id, total in resources.items()}
    has_gpus = any(gpus.values())
    devices = {node_id: n for node_id, n in (gpus if has_gpus else cpus).items() if n}
    n_devices = sum(devices.values())
    one_a_node = n_workers is None and not has_gpus
    if n_workers is None:
        n_workers = len(devices) if one_a_node else n_devices
    if n_devices == 0 or not 1 <= n_workers <= n_devices:
        device = "GPU" if has_gpus else "CPU"
        raise InputError(
            f"{n_workers} Ray workers asked for, but each needs a {device} and the cluster has {n_devices} "
            f"on {len(devices)} nodes; ask for at least 1 and at most {n_devices}"
        )
    counts = Counter(devices.keys() if one_a_node else ())
    while counts.total() < n_workers:
        counts[max(devices, key=lambda node_id: devices[node_id] / (counts[node_id] + 1))] += 1
    return [
        Place(node_id, cpus[node_id] // (gpus[node_id] if has_gpus else count), int(has_gpus))
        for node_id, count in counts.items()
        for _ in range(count)
    ]


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "the Ray executor needs Ray, which is not installed: pip install -r requirements-ray.txt"
        ) from error
    return ray


def _errors_of_lost_workers(ray: ModuleType) -> tuple[type[Exception], ...]:
    """Return the exceptions that mean that a process, a node or a finished result is gone."""
    names = "RayActorError WorkerCrashedError NodeDiedError OutOfMemoryError ObjectLostError".split()
    return tuple(getattr(ray.exceptions, name) for name in names)


def _module_folders() -> list[str]:
    """Return where this Python finds modules, apart from those that are installed.

    Ray would pass on two of these folders only: that of the program and the current one.
    """
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    installed = {Path(sysconfig.get_path(name)).resolve() for name in names}
    folders = [PROJECT_FOLDER, *(Path(entry).resolve() for entry in sys.path)]
    own = [
        folder for folder in folders if folder.is_dir() and installed.isdisjoint([folder, *folder.parents])
    ]
    return list(dict.fromkeys(map(str, own)))


def _connect(ray: ModuleType, address: str | None) -> None:
    """Start a local Ray, or connect to a cluster and send it the project's code."""
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    # Ray warns that access is protected and that it leaves out .git, both of which are as they should be.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    if address is None:
        # "local": without it Ray would look for a cluster first.
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    _check_reachable(address)
    # A job submitted with `ray job submit` brings its code along.
    is_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    code = None if is_job else {"working_dir": str(PROJECT_FOLDER), "excludes": NOT_SENT}
    try:
        ray.init(address=address, runtime_env=code, **quiet)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise InputError(
            f"cannot use a Ray cluster at the address {address}: {error}; start one with "
            "`ray start --head` or correct the address"
        ) from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Undo that Ray makes SIGTERM an ordinary exit."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _check_reachable(address: str) -> None:
    """Raise InputError if nothing listens at host:port, for which Ray would try for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto" or "://" in host:
        return
    if address.startswith("ray://") and not host:
        host, port = port, str(CLIENT_PORT)
    if not host or not port.isdigit():
        raise InputError(f'the Ray address is {address!r}, expected "auto", "host:port" or "ray://host:port"')
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at the address {address} ({error}); start one with "
            "`ray start --head` or correct the address"
        ) from error


def _log_again(records: Sequence[logging.LogRecord], number: int) -> None:
    """Hand a worker's log records to the loggers of this process."""
    for record in records:
        record.msg = f"worker {number}: {record.msg}"
        target = logging.getLogger(record.name)
        if target.isEnabledFor(record.levelno):
            target.handle(record)


def main() -> None:
    """Compute powers on two workers; without Ray, check the message."""
    try:
        _import_ray().init(address="local", num_cpus=2, include_dashboard=False)
    except InputError as error:
        print(f"ray_executor OK: Ray is not installed, only that was checked ({error})")
        return
    with RayExecutor(partial(int, 2), n_workers=2) as executor:
        results = dict(executor.run("__pow__", [(number,) for number in range(8)]))
    assert results == {number: 2**number for number in range(8)}
    print("ray_executor OK: all results arrived from two workers")


if __name__ == "__main__":
    main()

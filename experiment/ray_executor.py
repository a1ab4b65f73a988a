"""Run chunks of work on a Ray cluster, with one worker for each device.

A worker is an object that holds the models. It is made in a process of its own at the first chunk and
kept over several runs. When its process dies, Ray starts it again and repeats its chunk. When its node is
lost, the other workers take over its chunk. Warnings that a worker logs are logged here too.

Every node needs the same versions of Python, Ray and the packages of requirements.txt. Workers return tensors
on the CPU. On CPU-only clusters a worker computes with as many threads as it has CPUs.

A local Ray and a Ray that the caller has started find modules as the caller's Python does. Any other
cluster is sent the project's modules, and its workers run in a copy of that folder: paths in their
settings must be absolute and mean the same on every node.
"""

import logging
import logging.handlers
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from support.errors import InputError, first_line
from support.package_cache import CACHE_VARIABLE

logger = logging.getLogger(__name__)

PROJECT_FOLDER = Path(__file__).resolve().parent.parent
MAX_RESTARTS = 3  # of each worker: enough for accidents; a chunk that kills it four times does not fit
CLIENT_PORT = 10001  # where `ray start` listens for addresses that begin with ray://
CONNECT_SECONDS = 10.0
# Starting a process takes seconds; this leaves time to send the code to a slow node.
PLACEMENT_SECONDS = 120.0


class Place(NamedTuple):
    """The node on which a worker runs and what it may use there."""

    node_id: str
    n_cpus: int
    n_gpus: int


class RayExecutor:
    """Workers on a Ray cluster; close it, or use it as a context manager."""

    def __init__(
        self,
        make_worker: Callable[[], Any],
        address: str | None = None,
        n_workers: int | None = None,
        gpus_per_worker: int = 1,
    ) -> None:
        """Connect and wait until every worker has its place.

        make_worker: picklable, for example functools.partial(Worker, settings); called once in each worker.
        address: None starts a local Ray; "auto", "ray://host:port" or "host:port" is a cluster.
            A Ray that the caller has initialised is used as it is, whatever the address, and stays up.
        n_workers: default as many as the GPUs allow, or without GPUs one for each node with all its CPUs.
        gpus_per_worker: where there are any.
        Raises InputError: Ray is not installed, no cluster at the address, no room for the workers.
        """
        ray = _ray()
        self._ray, self._actors = ray, []
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            _connect(ray, address)
        sends_code = self._started_ray and address is not None
        try:
            places = plan_places(ray.nodes(), n_workers, gpus_per_worker)
            self.has_gpus = places[0].n_gpus > 0
            for number, place in enumerate(places):
                actor = ray.remote(_Host).options(**_options(place, sends_code))
                self._actors.append(actor.remote(number, make_worker))
            self._wait_for_places()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_workers(self) -> int:
        """How many workers there are."""
        return len(self._actors)

    def run(self, method: str, chunks: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
        """Yield (chunk index, worker.method(*chunk)) for every chunk, as they finish.

        Iteration may stop early: what the workers are doing then is finished and dropped.
        Raises what the worker raised, with the worker's traceback as a note; RuntimeError if a chunk has
        ended two workers for good, or all of them.
        """
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool

        left = set(range(len(chunks)))
        while left:
            n_before, loss = len(left), None
            pool = ActorPool(self._actors)
            for chunk_idx in sorted(left):
                pool.submit(lambda actor, idx: actor.call.remote(idx, method, chunks[idx]), chunk_idx)
            while self._actors and pool.has_next():
                try:
                    # The pool gives this worker its next chunk before the caller works on this result.
                    chunk_idx, value, records = pool.get_next_unordered()
                except RayTaskError as failure:
                    if not isinstance(failure.cause, _Failure):  # Ray's own: what cannot be sent
                        raise failure from None
                    error, records = failure.cause.args
                    _log_again(records)
                    raise error from None
                except RayError as error:  # the chunk waits for another worker, behind all other chunks
                    loss = error
                    continue
                _log_again(records)
                left.remove(chunk_idx)
                yield chunk_idx, value
            if loss:
                self._drop_lost_workers()
            if len(left) == n_before:
                raise RuntimeError(
                    f"chunk {min(left)} is given up, since no worker finished it (workers left: "
                    f"{len(self._actors)}). It may not fit in memory: try smaller batches, chunks or models. "
                    f"The last error: {_reason(loss) if loss else 'this executor is closed'}"
                ) from loss

    def close(self) -> None:
        """End the workers, and Ray if this executor started it or connected to it."""
        if self._ray.is_initialized():
            for actor in self._actors:
                self._ray.kill(actor)
        self._actors = []
        if self._started_ray:
            self._ray.shutdown()
            self._started_ray = False

    def _wait_for_places(self) -> None:
        calls = [actor.__ray_ready__.remote() for actor in self._actors]
        ready, late = self._ray.wait(calls, num_returns=len(calls), timeout=PLACEMENT_SECONDS)
        self._ray.get(ready)  # raises an error of a node that cannot import the project
        if late:
            free = self._ray.available_resources()
            raise InputError(
                f"{len(late)} of {len(calls)} Ray workers got no place within {PLACEMENT_SECONDS:g} "
                f"seconds: the cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free; "
                "wait for other work on it to end or ask for fewer workers"
            )

    def _drop_lost_workers(self) -> None:
        """Go on without the workers that Ray will not start again."""
        for actor in list(self._actors):
            ready, _ = self._ray.wait([actor.__ray_ready__.remote()], timeout=1.0)
            try:
                self._ray.get(ready)
            except self._ray.exceptions.RayError as error:
                self._actors.remove(actor)
                logger.warning("a worker is lost (workers left: %d): %s", len(self._actors), _reason(error))


class _Failure(Exception):
    """Carry what a worker raised, and the records that it logged before."""


class _Host:
    """The process of one worker."""

    def __init__(self, number: int, make_worker: Callable[[], Any]) -> None:
        import ray

        # Not called before the first chunk: Ray counts a death while the models load only if there is one.
        self._worker = cache(make_worker)
        self._records: queue.SimpleQueue = queue.SimpleQueue()
        sent = logging.handlers.QueueHandler(self._records)
        sent.setFormatter(logging.Formatter(f"worker {number}: %(message)s"))
        # The second handler leaves a copy in Ray's log files, in case this process dies.
        for handler in (sent, logging.StreamHandler()):
            handler.setLevel(logging.WARNING)
            logging.getLogger().addHandler(handler)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            logger.warning("its process died and was started again; the chunk that it had is repeated")

    def call(self, chunk_idx: int, method: str, chunk: tuple) -> tuple[int, Any, list[logging.LogRecord]]:
        """Return the chunk's index, its value and what was logged."""
        try:
            value = getattr(self._worker(), method)(*chunk)
        except Exception as error:  # every kind: the executor raises it again
            error.add_note(f"In the worker:\n{traceback.format_exc()}")
            raise _Failure(error, self._take_records()) from None
        return chunk_idx, value, self._take_records()

    def _take_records(self) -> list[logging.LogRecord]:
        return [self._records.get() for _ in range(self._records.qsize())]


def has_gpus(address: str | None = None) -> bool:
    """Return whether workers at an address, as of a RayExecutor, would have GPUs.

    Raises InputError: Ray is not installed, or no cluster at the address.
    """
    ray = _ray()
    if ray.is_initialized():
        return _have_gpus(ray.nodes())
    if address is None:  # a Ray that is yet to be started here
        import torch  # which each worker would wait for before it has its place

        return torch.cuda.is_available()
    _connect(ray, address)
    try:
        return _have_gpus(ray.nodes())
    finally:
        ray.shutdown()


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "the Ray executor needs Ray, which is not installed: pip install -r requirements-ray.txt"
        ) from error
    return ray


def _have_gpus(nodes: Sequence[Mapping[str, Any]]) -> bool:
    return any(node["Alive"] and node["Resources"].get("GPU", 0) >= 1 for node in nodes)


def plan_places(
    nodes: Sequence[Mapping[str, Any]], n_workers: int | None = None, gpus_per_worker: int = 1
) -> list[Place]:
    """Return the place of every worker; nodes: as ray.nodes() describes them.

    With GPUs in the cluster a worker gets `gpus_per_worker` of a node's and their share of its CPUs. Without,
    a node's workers share its CPUs; more workers go where there is more for each.
    Raises InputError if a worker would be left without its GPUs, or without a CPU.
    """
    resources = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
    device, each = ("GPU", gpus_per_worker) if _have_gpus(nodes) else ("CPU", 1)
    n_devices = {node_id: int(total.get(device, 0)) // each for node_id, total in resources.items()}
    one_a_node = n_workers is None and device == "CPU"
    slots = sorted(
        ((number + 1) / n, node_id)
        for node_id, n in n_devices.items()
        for number in range(min(n, 1) if one_a_node else n)
    )
    n_asked = len(slots) if n_workers is None else n_workers
    if not 1 <= n_asked <= len(slots):
        raise InputError(
            f"{n_asked} Ray workers asked for, but each needs {'a' if each == 1 else each} {device}"
            f"{'s on one node' * (each > 1)} and the cluster has {'room for ' * (each > 1)}{len(slots)}; "
            + (
                "lower executor.gpus_per_worker"
                if each > 1 and not slots
                else f"ask for at least 1 and at most {len(slots)}"
            )
        )
    counts = Counter(node_id for _, node_id in slots[:n_asked])
    shares = n_devices if device == "GPU" else counts
    return [
        Place(node_id, int(resources[node_id].get("CPU", 0)) // shares[node_id], each * int(device == "GPU"))
        for node_id in counts.elements()
    ]


def _options(place: Place, sends_code: bool) -> dict[str, Any]:
    """Return Ray's options of a worker's process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Set before the process starts: torch reads the number of threads when it is imported.
    variables = {"OMP_NUM_THREADS": str(max(1, place.n_cpus))}
    if os.environ.get(CACHE_VARIABLE):
        variables[CACHE_VARIABLE] = os.path.abspath(os.environ[CACHE_VARIABLE])
    if not sends_code:  # Ray would pass on two folders only: that of the program and the current one
        variables["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    return {
        "num_cpus": place.n_cpus,
        "num_gpus": place.n_gpus,
        "max_restarts": MAX_RESTARTS,
        # A chunk is repeated as often as its worker is started again. A number would be used up within
        # seconds on a node that is gone, before Ray knows of it.
        "max_task_retries": -1,
        # Hard: a worker whose node is lost ends with an error, instead of waiting for room on another.
        "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node_id, soft=False),
        "runtime_env": {"env_vars": variables},
    }


def _connect(ray: ModuleType, address: str | None) -> None:
    """Start a local Ray, or connect to a cluster and send it the project's code."""
    # Ray warns that access is protected and that it leaves out .git, both of which are as they should be.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:  # for Ray None means that it looks for a cluster first
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            _check_reachable(address)
            ray.init(address=address, runtime_env=_code(), **quiet)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise InputError(
            f"no Ray can be used at the address {address or 'local'} ({first_line(error)}); start a cluster "
            "with `ray start --head` or correct the address"
        ) from error
    # Ray makes SIGTERM an ordinary exit, which this undoes.
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at host:port, for which Ray would try for minutes; or ValueError."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    url = urlsplit(address if "://" in address else f"//{address}")
    if address == "auto" or url.scheme not in ("", "ray"):
        return
    port = url.port or (CLIENT_PORT if url.scheme else None)
    if not url.hostname or not port:
        raise ValueError('expected "auto", "host:port" or "ray://host:port"')
    socket.create_connection((url.hostname, port), timeout=CONNECT_SECONDS).close()


def _code() -> dict[str, Any] | None:
    """Return what of the project is sent to a cluster: the modules at the top, and the packages."""
    # A job submitted with `ray job submit` brings its code along. Without pyproject.toml the project is
    # installed among other packages, as it must be on every node then.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or not (PROJECT_FOLDER / "pyproject.toml").exists():
        return None
    packages = (f"!/{path.parent.name}" for path in PROJECT_FOLDER.glob("*/__init__.py"))
    # Ray reads these as lines of a .gitignore file.
    excludes = ["/*", "!/.", "!/*.py", *packages, "__pycache__"]
    return {"working_dir": str(PROJECT_FOLDER), "excludes": excludes}


def _reason(error: Exception) -> str:
    """Return what happened; Ray's last line says that, and then guesses at length."""
    return str(error).strip().split("\n")[-1].partition(" Some common causes")[0]


def _log_again(records: Sequence[logging.LogRecord]) -> None:
    """Hand a worker's log records to the loggers of this process."""
    for record in records:
        if (target := logging.getLogger(record.name)).isEnabledFor(record.levelno):
            target.handle(record)

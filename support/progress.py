"""Show progress in a terminal and in a notebook, and log once a minute what is done and what is left.

`working` names a task, and each `Bar` is one; a line of the log has all that are open, the outermost first. A
log file has no bars.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm
from tqdm.notebook import tqdm as _notebook_tqdm

logger = logging.getLogger(__name__)

LOG_EVERY = 55.0  # seconds, so that no minute of a log is without a line
# The value of `disable` for every bar. None lets tqdm ask the stream whether it is a terminal. A notebook's
# stream is none, but shows bars all the same.
HIDDEN: bool | None = False if issubclass(tqdm, _notebook_tqdm) else None
Item = TypeVar("Item")
_tasks: dict[int, Callable[[], str]] = {}  # that are open, by id; each returns how far it is


class Bar:
    """A task of which a known number of things is to be done, with a bar where one can be shown.

    n_before: things that were done earlier. leave: keep the bar when the task ends. quiet: neither show nor
    log it.
    """

    def __init__(
        self, total: int, desc: str, unit: str, n_before: int = 0, leave: bool = True, quiet: bool = False
    ) -> None:
        disable = True if quiet else HIDDEN
        self._shown = tqdm(total=total, desc=desc, unit=unit, initial=n_before, leave=leave, disable=disable)
        self._quiet, self._total, self._desc, self._unit = quiet, total, desc, unit
        self._n_before, self._n_done, self._started = n_before, 0, time.monotonic()

    def __enter__(self) -> "Bar":
        if not self._quiet:
            _tasks[id(self)] = self.state
        return self

    def __exit__(self, *_: object) -> None:
        _tasks.pop(id(self), None)
        self._shown.close()

    def update(self, n: int = 1) -> None:
        """Count n more as done."""
        self._n_done += n
        self._shown.update(n)

    def state(self) -> str:
        """Return such as `generating: 120 of 3600 texts done, 3480 left, about 58 min`."""
        n = self._n_before + self._n_done
        said = f"{self._desc}: {n} of {self._total} {self._unit}s done, {self._total - n} left"
        if not self._n_done:
            return said
        seconds = (self._total - n) * (time.monotonic() - self._started) / self._n_done
        return f"{said}, about {seconds / 60:.0f} min"


def each(items: Iterable[Item], desc: str, unit: str, leave: bool = True) -> Iterator[Item]:
    """Yield the items under a bar; one is done when the next is asked for."""
    items = list(items)
    with Bar(len(items), desc, unit, leave=leave) as progress:
        for item in items:
            yield item
            progress.update()


@contextmanager
def working(task: str) -> Iterator[None]:
    """Name the task of the body in the lines of the log."""
    _tasks[id(task)] = lambda: task
    try:
        yield
    finally:
        _tasks.pop(id(task), None)


@contextmanager
def logged_progress() -> Iterator[None]:
    """Log how far the open tasks are, at least once a minute, from a thread, until the body ends."""
    ended, started = threading.Event(), time.monotonic()

    def log() -> None:
        while not ended.wait(LOG_EVERY):
            states = "; ".join(state() for state in list(_tasks.values()))
            logger.info(
                "after %.0f min: %s", (time.monotonic() - started) / 60, states or "between two tasks"
            )

    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _tasks.clear()  # a loop that an error has left may not be closed yet

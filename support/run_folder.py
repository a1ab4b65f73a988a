"""The files of one run: which of them are current, and which a later phase requires.

An artifact is current only if it is whole and has the expected fingerprint (see `support.artifacts`). In a
fresh run no artifact of an earlier run is current, but a later phase may load what an earlier phase has
just saved.

One object at a time writes to a folder. It holds `.run.lock`, which the system releases when its process
ends in whatever way, and names itself in `.run_owner.json`.
"""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from support.artifacts import (
    DamagedError,
    acquire,
    file_lock,
    load_json,
    load_tensors,
    release,
    remove_temporaries,
    save_json,
    save_tensors,
    sealed,
)
from support.errors import InputError
from support.journal import Journal

logger = logging.getLogger(__name__)

LOCK, OWNER = ".run.lock", ".run_owner.json"
MISSING = "missing"


class RunFolder:
    """An output directory, for the length of one run.

    fresh: artifacts of earlier runs are not current, and a journal starts empty when it is first opened.
    notes: what the end of the run reports. The first write locks the folder, until `close`.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.fresh = fresh
        self.notes: list[str] = []
        self._opened: set[str] = set()
        self._lock, self._is_ours = file_lock(self.path / LOCK, timeout=0), False

    def lock(self) -> None:
        """Make the folder, and keep others from writing to it until `close`; a second call does nothing.

        Removes the temporary files of killed runs.
        Raises InputError, which names the owner, if another process or object is writing to the folder.
        """
        if self._is_ours:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            acquire(self._lock)
        except Timeout as error:
            raise InputError(
                f"{self.path} is in use by {_owner(self.path / OWNER)}; wait until it ends, stop it, or "
                "choose another folder with --output-dir"
            ) from error
        try:
            remove_temporaries(self.path)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            owner = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
            save_json(self.path / OWNER, owner)
        except BaseException:
            release(self._lock)
            raise
        self._is_ours = True

    def close(self) -> None:
        """Let others write to the folder; a second call does nothing."""
        if self._is_ours:
            (self.path / OWNER).unlink(missing_ok=True)
            release(self._lock)
            self._is_ours = False

    def files(self) -> list[Path]:
        """Return the files of a run: those of the folder, and those of a band's layer pairs below it."""
        found = [path for pattern in ("*", "layers/*/*") for path in sorted(self.path.glob(pattern))]
        return [path for path in found if path.is_file() and not path.name.startswith(".")]

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Write what is logged in the body to `experiment.log` too; locks the folder."""
        self.lock()
        handler = logging.FileHandler(self.path / "experiment.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        # The write that fails next reports a full disk; a traceback for each line of the log would not help.
        handler.handleError = lambda record: None
        root = logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(min(level, logging.INFO))
        try:
            yield
        finally:
            root.setLevel(level)
            root.removeHandler(handler)
            with suppress(OSError):
                handler.close()

    def current(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the content of an artifact (`.json` or `.pt`) with this key, None if it must be made."""
        return None if self.fresh else self.load(name, key)

    def load(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the same also in a fresh run, for what an earlier phase of the run has just saved."""
        content, problem = self._read(name, key)
        if problem not in (None, MISSING):
            logger.info("%s is %s; recomputing", self.path / name, problem)
        return content

    def require(self, name: str, key: str, phase: int) -> dict[str, Any]:
        """Return what an earlier phase saved. Raises InputError that says why not, and which phase to run."""
        content, problem = self._read(name, key)
        if content is None:
            raise InputError(f"{self.path / name} is {problem}; run phase {phase} first")
        return content

    def _read(self, name: str, key: str) -> tuple[dict[str, Any] | None, str | None]:
        """Return an artifact's content, or None and what keeps it from being used."""
        path = self.path / name
        try:
            content = load_tensors(path) if path.suffix == ".pt" else load_json(path, needs_checksum=True)
        except FileNotFoundError:
            return None, MISSING
        except DamagedError as error:
            return None, f"damaged ({error.reason})"
        if content.get("fingerprint") != key:
            return None, "stale (made from another configuration)"
        return content, None

    def save(self, name: str, key: str, content: dict[str, Any]) -> dict[str, Any]:
        """Write an artifact in one step; returns the content with its fingerprint, which is the key."""
        self.lock()
        content = {"fingerprint": key, **content}
        if name.endswith(".pt"):
            save_tensors(self.path / name, content)
        else:
            save_json(self.path / name, sealed(content))
        return content

    def journal(self, name: str) -> Journal:
        """Open `<name>_journal.jsonl`; a row's key holds everything that the row depends on."""
        self.lock()
        path = self.path / f"{name}_journal.jsonl"
        journal = Journal(path, self.fresh and name not in self._opened)
        self._opened.add(name)
        if journal.n_damaged:
            self.notes.append(f"{journal.n_damaged} lines of {path} were damaged; their rows are recomputed")
        return journal


def load_finished(folder: Path, *names: str, others: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the content of JSON artifacts of a finished run, in the order of their names.

    others: further files that must be there.
    Raises InputError: one of them is missing, or damaged.
    """
    missing = [name for name in (*names, *others) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} is no finished run: {missing[0]} is missing; name the output_dir of a run whose five "
            "phases are done"
        )
    return [load_json(folder / name) for name in names]


def _owner(path: Path) -> str:
    """Return who holds a folder, as its owner's file says."""
    try:
        owner = load_json(path)
        process, host = owner["process"], owner["host"]
        here = (process, host) == (os.getpid(), socket.gethostname())
        who = "this process, through another object (close it)" if here else f"process {process} on {host}"
        return f"{who} since {owner['since']}"
    except (OSError, InputError, KeyError):  # the owner has just ended, or has not written its file yet
        return "another process"

"""The files of one run: which of them are current, and which are required.

A file counts as current only if its fingerprint is that of the inputs (see `support.artifacts`). In a
fresh run nothing that lies there is current, but what a later phase requires may be read.

One object at a time writes to a folder. It holds `.run.lock`, which the system takes back from a process
that is killed, and says in `.run_owner.json` who it is.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from support.artifacts import (
    load_if_current,
    load_json,
    load_tensors,
    remove_temporaries,
    save_json,
    save_tensors,
    sealed,
)
from support.errors import InputError
from support.journal import Journal

LOCK, OWNER = ".run.lock", ".run_owner.json"


class RunFolder:
    """An output directory, for the length of one run.

    fresh: artifacts of earlier runs are not current, and a journal starts empty when first opened.
    The first write locks the folder, until `close`.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.fresh = fresh
        self.notes: list[str] = []
        self._opened: set[str] = set()
        # Not per thread, so that any thread may close the folder.
        self._lock = FileLock(self.path / LOCK, timeout=0, thread_local=False)

    def lock(self) -> None:
        """Make the folder, and keep others from writing to it until `close`; a second call does nothing.

        Removes the temporary files that killed runs have left.
        Raises InputError, which says who, if another process or another object here is writing to it.
        """
        if self._lock.is_locked:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InputError(
                f"{self.path} is in use by {_owner(self.path / OWNER)}; wait until it ends, stop it, or "
                "choose another folder with --output-dir"
            ) from error
        try:
            remove_temporaries(self.path)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            save_json(
                self.path / OWNER, {"host": socket.gethostname(), "process": os.getpid(), "since": since}
            )
        except BaseException:
            self._lock.release()
            raise

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Write what is logged in the body to `experiment.log` too; locks the folder."""
        self.lock()
        handler = logging.FileHandler(self.path / "experiment.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        # A full disk is reported once, by what fails next, not in a traceback for each line of the log.
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

    def close(self) -> None:
        """Let others write to the folder; a second call does nothing."""
        if self._lock.is_locked:
            (self.path / OWNER).unlink(missing_ok=True)
            self._lock.release()

    def current(self, name: str, cache_key: str, structure: Any = None) -> dict[str, Any] | None:
        """Return what an artifact (`.json` or `.pt`) holds if it was made from these inputs, else None.

        structure: what its reader relies on, see `support.structure`; another one is not current.
        """
        return None if self.fresh else self.left(name, cache_key, structure)

    def left(self, name: str, cache_key: str, structure: Any = None) -> dict[str, Any] | None:
        """Return the same, also in a fresh run: for what an earlier phase of the run has just made."""
        load = load_tensors if name.endswith(".pt") else load_json
        return load_if_current(load, self.path / name, cache_key, structure)

    def required(self, name: str, cache_key: str, phase: int, structure: Any = None) -> dict[str, Any]:
        """Return what an earlier phase left. Raises InputError that names the phase to run first."""
        content = self.left(name, cache_key, structure)
        if content is None:
            raise InputError(
                f"{self.path / name} is missing, incomplete or made from another configuration; "
                f"run phase {phase} first"
            )
        return content

    def save(self, name: str, cache_key: str, content: dict[str, Any]) -> dict[str, Any]:
        """Write an artifact in one step; returns the content with its fingerprint."""
        self.lock()
        content = {"fingerprint": cache_key, **content}
        if name.endswith(".pt"):
            save_tensors(self.path / name, content)
        else:
            save_json(self.path / name, sealed(content))
        return content

    def journal(self, name: str, cache_key: str) -> Journal:
        """Open `<name>_journal.jsonl`; rows in it are keyed by what they were made from."""
        self.lock()
        path = self.path / f"{name}_journal.jsonl"
        journal = Journal(path, cache_key, self.fresh and name not in self._opened)
        self._opened.add(name)
        if journal.n_damaged:
            self.notes.append(f"{journal.n_damaged} lines of {path} were damaged; their rows are made again")
        return journal


def _owner(path: Path) -> str:
    """Return who holds a folder, as its owner's file says."""
    try:
        owner = load_json(path)
        process, host = owner["process"], owner["host"]
        here = (process, host) == (os.getpid(), socket.gethostname())
        who = "this process, through another object (close it)" if here else f"process {process} on {host}"
        return f"{who} since {owner['since']}"
    except (OSError, InputError, KeyError):  # it has just ended, or has not got that far
        return "another process"


def main() -> None:
    """Check that a fresh run reads what it has just made, and nothing older as current."""
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        folder, fresh = RunFolder(Path(path)), RunFolder(Path(path), fresh=True)
        folder.save("check.json", "inputs", {"n": 3})
        assert folder.current("check.json", "inputs") == {"fingerprint": "inputs", "n": 3}
        assert folder.current("check.json", "others") is None is fresh.current("check.json", "inputs")
        assert fresh.required("check.json", "inputs", 2)["n"] == 3
    print("run_folder OK: fingerprints decide what is current")


if __name__ == "__main__":
    main()

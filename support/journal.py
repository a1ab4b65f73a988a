"""Keep the rows of a long grid as they are made, so that a kill at any instant loses none of them.

A journal is a JSONL file. Its first line is `{"journal": 1, "cache_key": ...}`; every other
line is `{"row": {...}, "crc": ...}`, where crc is the crc32 of `json.dumps(row, sort_keys=True)`.
Appending adds lines and rewrites nothing; a result file is assembled from the rows at the end.

Lines are ASCII: every other character is escaped, a lone surrogate too, so any text reads back
as it was. (Two surrogates in a row that form a pair read back as the character they stand for;
jq 1.6 stops at a lone one.)

One process writes at a time, from one thread. What a crash between two steps may leave
beside the journal is the lock file, which holds nothing, and an unused temporary file.
"""

import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import BaseFileLock, FileLock, Timeout

from support.artifacts import fingerprint, named_in_errors, nan_to_none, replacing
from support.errors import InputError

logger = logging.getLogger(__name__)

FORMAT = 1
N_DIGITS = 12


class Journal:
    """Append-only JSONL ledger of rows, keyed by row["key"]; a later row replaces an earlier one.

    path: the journal. If it was made from the same inputs, its rows are read. A last line that
    a kill cut short is removed; any other line that cannot be read is left out and counted.
    Otherwise the file is kept aside as `<stem>.<first digits of its cache_key>.jsonl`, or
    `<stem>.unreadable.jsonl` if its header is damaged; a name that is taken is never reused
    but gets a number (`<stem>.<digits>.2.jsonl`). A damaged header with nothing after it is
    not kept.

    cache_key: what the rows depend on, as `fingerprint` gives it. A journal of it that was kept
    aside comes back when `path` holds no such journal: the largest, if there are several.
    Journals are never merged.

    fresh: start anew; every journal of this cache_key is deleted, at `path` or kept aside.

    rows: key -> row as it reads back from the file. n_damaged: lines left out.

    Raises InputError if another journal object, here or in another process, has it open.
    """

    def __init__(self, path: Path, cache_key: str, fresh: bool = False) -> None:
        self.path = Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        self.n_damaged = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(_acquire_lock(self.path).release)
            _settle(self.path, cache_key, fresh)
            self._size = self._read()
            self._file: FileIO = stack.enter_context(open(self.path, "ab", buffering=0))
            self._file.truncate(self._size)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another run write; nothing can be appended any more. A second call does nothing."""
        self._open.close()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows; they are on the disk when this returns. A non-finite number becomes null.

        Raises ValueError if a row has no "key" that is a string, TypeError if JSON cannot hold it,
        OSError if the disk refuses it. The journal is then as it was before and can still be used.
        """
        kept = [_plain(row) for row in rows]
        if not kept:
            return
        lines = b"".join(_encode({"row": row, "crc": _checksum(row)}) for row in kept)
        # Nothing to cut, unless an earlier append failed and so did its own cut.
        self._file.truncate(self._size)
        try:
            # The file is unbuffered: a buffer would keep the lines that failed and write them later.
            left = memoryview(lines)
            with named_in_errors(self.path):
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(self._size)
            raise
        self._size += len(lines)
        self.rows.update((row["key"], row) for row in kept)

    def _read(self) -> int:
        """Fill `rows` and `n_damaged`; return the size in bytes up to the last whole line."""
        with open(self.path, "rb") as file:
            size = len(file.readline())
            for line in file:
                if not line.endswith(b"\n"):
                    logger.info("%s ends in a line cut short; removing it", self.path)
                    break
                size += len(line)
                row = _decode_row(line)
                if row is None:
                    self.n_damaged += 1
                else:
                    self.rows[row["key"]] = row
        if self.n_damaged:
            logger.warning(
                "%s: damaged lines left out: %d; rows that they held count as missing",
                self.path,
                self.n_damaged,
            )
        return size


def rows_of(path: Path, cache_key: str) -> dict[str, dict[str, Any]]:
    """Return key -> row of a journal that was made from the same, without opening it; else nothing."""
    if _made_from(path) != cache_key:
        return {}
    rows = map(_decode_row, path.read_bytes().splitlines(keepends=True)[1:])
    return {row["key"]: row for row in rows if row is not None}


def _acquire_lock(path: Path) -> BaseFileLock:
    """Return the lock of `path`, held; the system takes it back from a process that is killed."""
    # Not per thread, so that any thread may close the journal.
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another run is writing to this folder ({path} is in use); "
            "wait until it ends, stop it, or choose another folder with --output-dir"
        ) from error
    return lock


def _settle(path: Path, cache_key: str, fresh: bool) -> None:
    """Make `path` a journal of `cache_key`: the one there, one that was kept aside, or a new one."""
    current = _made_from(path) == cache_key
    if path.exists() and not current:
        _keep_aside(path)
    kept_aside = _kept_aside(path, cache_key)
    if fresh:
        # Before `path` itself, or a crash in between would let a replaced journal come back.
        for other in kept_aside:
            other.unlink()
    elif kept_aside and not current:
        back = max(kept_aside, key=lambda other: other.stat().st_size)
        os.replace(back, path)
        logger.info("%s was kept aside and fits again; it is %s once more", back.name, path)
        current = True
    if fresh or not current:
        with replacing(path) as file:
            file.write(_encode({"journal": FORMAT, "cache_key": cache_key}))
    _sync_folder(path.parent)


def _keep_aside(path: Path) -> None:
    """Rename a journal that is not to be continued, unless it is a damaged header and nothing else."""
    owner = _made_from(path)
    if owner is None and not _has_second_line(path):
        return
    target = _free_name(path, "unreadable" if owner is None else _label(owner))
    os.rename(path, target)
    if owner is None:
        logger.warning("%s has a damaged first line; it is kept as %s", path, target.name)
    else:
        logger.info("%s was made from other inputs; it is kept as %s", path, target.name)


def _kept_aside(path: Path, cache_key: str) -> list[Path]:
    """Return the journals of `cache_key` beside `path`. Their headers decide, not their names."""
    start = f"{path.stem}.{_label(cache_key)}."
    named = (
        item for item in path.parent.iterdir() if item.name.startswith(start) and item.suffix == ".jsonl"
    )
    return sorted(item for item in named if item.is_file() and _made_from(item) == cache_key)


def _free_name(path: Path, label: str) -> Path:
    numbers = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    targets = (path.with_name(f"{path.stem}.{label}{number}.jsonl") for number in numbers)
    return next(target for target in targets if not target.exists())


def _label(cache_key: str) -> str:
    # A damaged header can hold any character, and a file name cannot.
    return re.sub(r"[^0-9A-Za-z_-]", "_", cache_key[:N_DIGITS])


def _made_from(path: Path) -> str | None:
    """Return what the journal at `path` was made from; None if it is absent or its header is damaged."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        header = _decode(file.readline())
    if header is None or header.get("journal") != FORMAT:
        return None
    cache_key = header.get("cache_key")
    return cache_key if isinstance(cache_key, str) else None


def _has_second_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.readline()
        return bool(file.read(1))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as it will read back: lists for tuples, strings for keys, None for NaN."""
    if not isinstance(row.get("key"), str):
        raise ValueError(f'row["key"] is {row.get("key")!r}, expected a string that names the row')
    return json.loads(_encode(nan_to_none(row)))


def _checksum(row: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True, allow_nan=False).encode())


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    """Return the object on a line; None if the line is cut short or is not a JSON object."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _decode_row(line: bytes) -> dict[str, Any] | None:
    record = _decode(line) or {}
    row = record.get("row")
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        return None
    try:
        return row if record.get("crc") == _checksum(row) else None
    except ValueError:
        # The line says NaN or Infinity, which are never written.
        return None


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; only POSIX systems ask for this."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def main() -> None:
    """Check that whole rows come back and that a damaged one is noticed."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path, cache_key = Path(folder) / "check.jsonl", fingerprint("check")
        with Journal(path, cache_key) as journal:
            journal.append([{"key": "first"}, {"key": "second"}])
        path.write_bytes(path.read_bytes().replace(b"second", b"sekond"))
        with Journal(path, cache_key) as journal:
            assert (list(journal.rows), journal.n_damaged) == (["first"], 1)
    print("journal OK: whole rows come back, and a damaged one is noticed")


if __name__ == "__main__":
    main()

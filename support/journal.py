"""Keep the rows of a long computation as they are made, so that a kill at any instant loses none of them.

A journal is a JSONL file. Each line is `{"row": {...}, "crc": ...}` in ASCII, where crc is the crc32 of
`json.dumps(row, sort_keys=True)`. A row's own key names everything that the row depends on, so rows of
several configurations may stand in one file. Appending adds lines and rewrites nothing.

One process writes at a time, from one thread; `support.run_folder` sees to it.
"""

import json
import logging
import os
import zlib
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Self

from support.artifacts import named_in_errors, nan_to_none, replacing

logger = logging.getLogger(__name__)

Rows = dict[str, dict[str, Any]]


class Journal:
    """An append-only JSONL file of rows, keyed by row["key"]; a later row replaces an earlier one.

    fresh: delete the rows that are there. A journal of an earlier version, whose first line is a header, is
    started anew as well. A last line that a kill cut short is removed; another line that cannot be read is
    left out and counted.

    rows: key -> row as it reads back from the file. n_damaged: lines that were left out.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh or not self.path.exists():
            with replacing(self.path):
                pass
            _sync_folder(self.path.parent)
        self.rows, self.n_damaged, self._size = _read(self.path)
        if self.n_damaged:
            logger.warning("%s: %d damaged lines are left out", self.path, self.n_damaged)
        self._file: FileIO = open(self.path, "ab", buffering=0)  # noqa: SIM115 (`close` closes it)
        self._file.truncate(self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another run write; nothing can be appended any more. A second call does nothing."""
        self._file.close()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows; they are on the disk when this returns. A non-finite number becomes null.

        Raises ValueError if a row has no "key" that is a string, TypeError if JSON cannot hold it,
        OSError if the disk cannot. The journal is then as it was before and can still be used.
        """
        kept = [_plain(row) for row in rows]
        if not kept:
            return
        lines = b"".join(_encode({"row": row, "crc": _checksum(row)}) for row in kept)
        # This cuts nothing, unless an earlier append failed and so did its own cut.
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


def rows_of(path: Path) -> Rows:
    """Return key -> row of the journal at `path` without opening it to write; nothing if there is none."""
    return _read(path)[0] if path.exists() else {}


def _read(path: Path) -> tuple[Rows, int, int]:
    """Return the rows, the number of damaged lines, and the size in bytes of the lines that are kept."""
    rows: Rows = {}
    n_damaged = size = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                logger.info("%s ends in a line that was cut short; it is left out", path)
                break
            try:
                record = json.loads(line.decode())
                if size == 0 and "journal" in record:
                    logger.info("%s is of an earlier version; it is started anew", path)
                    return {}, 0, 0
                if record["crc"] != _checksum(record["row"]):
                    raise ValueError("wrong checksum")
                rows[record["row"]["key"]] = record["row"]
            except (ValueError, RecursionError, LookupError, TypeError):  # no JSON, or no row of ours
                n_damaged += 1
            size += len(line)
    return rows, n_damaged, size


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as it will read back: lists for tuples, strings for keys, None for NaN."""
    if not isinstance(row.get("key"), str):
        raise ValueError(f'row["key"] is {row.get("key")!r}, expected a string that names the row')
    return json.loads(_encode(nan_to_none(row)))


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _checksum(row: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True, allow_nan=False).encode())


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; only POSIX systems ask for this."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

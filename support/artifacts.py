"""Write and read the files of a run so that a crash never leaves half of one.

Every artifact carries a fingerprint, the sha256 of what it was made from (configuration slice, model, texts,
versions); see `support.run_folder`.

Tensor artifacts (`.pt`) are dictionaries that `torch.load(weights_only=True)` accepts; their archive holds a
CRC of every part. JSON artifacts are objects with the keys `fingerprint` and `checksum`, the sha256 of
everything else in them. A JSON file without a fingerprint, as `config.json`, has no checksum.

Every write goes to a temporary file in the same folder, is flushed to disk, and replaces the old file in one
step. A process that is killed leaves at most such a temporary file, `.<name>.<8 characters>`.

A lock belongs to one process until it ends in whatever way. On a network file system without locks, work
goes on without one, and a line says so.
"""

import errno
import hashlib
import json
import logging
import math
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import BaseFileLock, FileLock, Timeout

from support.errors import InputError, first_line

logger = logging.getLogger(__name__)

CHECKSUM = "checksum"
TEMPORARY = re.compile(r"\..+\.(json|jsonl|pt|png)\.[a-z0-9_]{8}")

# How network file systems say that they have no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ESTALE, errno.EINVAL}

# Errors that reading a damaged or foreign tensor file has been seen to raise.
_UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError)
_UNREADABLE += (LookupError, ValueError, TypeError)


class DamagedError(InputError):
    """A file does not hold what was written to it. reason: how it shows."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); delete it or run with --fresh")
        self.reason = reason


def fingerprint(*parts: Any) -> str:
    """Return a 64-digit sha256 of JSON-serialisable parts; tensors count by dtype, shape and bytes.

    Raises TypeError for a part that is neither a tensor nor JSON-serialisable.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            values = part.detach().cpu().contiguous()
            digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\x00")
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError of the body that names none; a full disk's does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the body ends, and is removed if the body raises.

    An OSError names `path`: as its `filename2` if the temporary file could not replace it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with named_in_errors(path), os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed runs; nobody else may be writing to the folder."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            logger.info("removing %s, which a killed run left", path)
            path.unlink()


def nan_to_none(value: Any) -> Any:
    """Return `value` with every non-finite float inside it as None, since JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return value


def save_text(path: Path, text: str) -> None:
    """Write a text in one step."""
    with replacing(path) as file:
        file.write(text.encode())


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object; a missing number is written as null."""
    text = json.dumps(nan_to_none(content), indent=1, ensure_ascii=False, allow_nan=False)
    save_text(Path(path), f"{text}\n")


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON artifact, as JSON gives it back, with its checksum."""
    plain = json.loads(json.dumps(nan_to_none(content)))
    return {**plain, CHECKSUM: fingerprint(plain)}


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers, strings, lists and dictionaries of these."""
    with replacing(Path(path)) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # After a failed write, torch still closes its archive and reports that error instead.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_json(path: Path, needs_checksum: bool = False) -> dict[str, Any]:
    """Read a JSON object; its checksum, if it has one, is checked and left out.

    Raises DamagedError: no JSON object, a wrong checksum, or none that is needed; FileNotFoundError: no file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number or nesting without end
        raise DamagedError(path, str(error)) from error
    if not isinstance(content, dict):
        raise DamagedError(path, f"it holds a {type(content).__name__}, expected a JSON object")
    checksum = content.pop(CHECKSUM, None)
    if checksum is None and needs_checksum:
        raise DamagedError(path, "no checksum")
    if checksum is not None and checksum != fingerprint(content):
        raise DamagedError(path, "wrong checksum")
    return content


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a `.pt` dictionary without running pickled code.

    Raises DamagedError: damage, or no dictionary; FileNotFoundError: no file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise DamagedError(path, first_line(error, 120)) from error
    if not isinstance(content, dict):
        raise DamagedError(path, f"it holds a {type(content).__name__}, expected a dictionary")
    return content


def file_lock(path: Path, timeout: float = -1) -> BaseFileLock:
    """Return the lock of a file, for `acquire`; timeout: seconds to wait for another process, -1 for ever."""
    # It is not bound to a thread, so that any thread may release it.
    return FileLock(path, timeout=timeout, thread_local=False, fallback_to_soft=False)


def acquire(lock: BaseFileLock) -> bool:
    """Take a lock; False if its file system has none. Raises Timeout: another process holds it."""
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if lock.timeout == 0:
                raise
            logger.info("waiting for another process, which holds %s", lock.lock_file)
            lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
            raise
        _say_unlocked(Path(lock.lock_file).parent, error.strerror)
        return False
    return True


@cache
def _say_unlocked(folder: Path, reason: str) -> None:
    logger.warning("%s has no file locks (%s): let no other process write there meanwhile", folder, reason)


def release(lock: BaseFileLock) -> None:
    """Release a lock; one that is not held is left alone."""
    with suppress(OSError):  # the file system has lost it
        lock.release()


def check_writable(path: Path) -> None:
    """Raise InputError unless the folder, or the nearest existing one above it, accepts a file.

    Creates nothing, so that a run that is rejected later leaves no trace.
    """
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("it holds a NUL character")
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file or a link to nothing")
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as error:  # ValueError: a character that no path can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"output_dir {str(path)!r} cannot be written ({reason}); choose another with --output-dir"
        ) from error

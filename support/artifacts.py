"""Write and read the files of a run so that a crash never leaves half of one.

Every artifact carries a fingerprint: the sha256 of whatever made it (configuration
slice, model, texts, versions). A file counts as present only when it can be read
and its fingerprint is the expected one; the file's existence proves nothing.

Tensor artifacts (`.pt`) are dictionaries that `torch.load(weights_only=True)` accepts; their archive
holds a CRC of every part. JSON artifacts are objects with a `fingerprint` and a `checksum` key, the
sha256 of everything else in them; those of earlier versions have none. Every write goes to a temporary
file in the same folder, is flushed to disk, and replaces the old file in one step. A process that is
killed leaves at most such a temporary file, `.<name>.<8 characters>`.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from support.errors import InputError
from support.structure import check_structure

logger = logging.getLogger(__name__)

CHECKSUM = "checksum"
TEMPORARY = re.compile(r"\..+\.(json|jsonl|pt|png)\.[a-z0-9_]{8}")

# What reading a damaged or foreign tensor file has been seen to raise.
_DAMAGED = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
)


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
    """Give an OSError of the body that names no file, as a full disk's, the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the body ends, and vanishes if it raises.

    An OSError names `path`: as its `filename2` if the temporary file could not take its place.
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
    """Remove the temporary files of killed runs from a folder to which nobody else is writing."""
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


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object; a missing number is written as null."""
    text = json.dumps(nan_to_none(content), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(Path(path)) as file:
        file.write(text.encode() + b"\n")


def save_text(path: Path, text: str) -> None:
    """Write a text in one step."""
    with replacing(path) as file:
        file.write(text.encode())


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON artifact with its checksum, which `load_json` checks and leaves out."""
    return {**content, CHECKSUM: _checksum(json.loads(json.dumps(nan_to_none(content))))}


def _checksum(content: dict[str, Any]) -> str:
    """Of an object as JSON gives it back; white space and the order of keys don't matter."""
    return fingerprint({key: value for key, value in content.items() if key != CHECKSUM})


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers, strings, lists and dictionaries of these."""
    with replacing(Path(path)) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch ends its archive also after a write that failed, and complains of that instead.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, without its checksum.

    Raises InputError if the file is damaged or its checksum, if it has one, is that of other content;
    FileNotFoundError if it is absent.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number or nesting without end
        raise InputError(f"{path} is damaged ({error}); delete it or run with --fresh") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a JSON object; delete it")
    if CHECKSUM in content and content.pop(CHECKSUM) != _checksum(content):
        raise InputError(f"{path} is damaged (wrong checksum); delete it or run with --fresh")
    return content


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a `.pt` dictionary without running pickled code.

    Raises InputError if the file is damaged or not a dictionary, FileNotFoundError if absent.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        reason = str(error).split("\n")[0][:120]
        raise InputError(f"{path} is damaged ({reason}); delete it or run with --fresh") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a dictionary; delete it")
    return content


def load_if_current(
    load: Callable[[Path], dict[str, Any]], path: Path, expected: str, structure: Any = None
) -> dict[str, Any] | None:
    """Return the artifact when it is readable, bears the expected fingerprint and has the structure.

    structure: as `check_structure` takes it; None checks none. Else returns None, and says why in the log.
    Raises OSError for a file that is there and cannot be read.
    """
    if not path.exists():
        return None
    try:
        content = load(path)
        if content.get("fingerprint") != expected:
            logger.info("%s was made from other inputs; making it again", path.name)
            return None
        if structure is not None:
            check_structure(content, structure, str(path))
    except InputError as error:
        logger.warning("%s; making it again", error)
        return None
    return content


def check_writable(path: Path) -> None:
    """Raise InputError unless the folder, or the nearest one above that exists, accepts a file.

    Creates nothing, so that a run that is refused later leaves no trace.
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


def main() -> None:
    """Check that a round trip keeps tensors, and that other inputs and damage are noticed."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path, vector = Path(folder) / "check.pt", torch.arange(5, dtype=torch.float64)
        save_tensors(path, {"fingerprint": "ours", "vector": vector})
        assert torch.equal(load_if_current(load_tensors, path, "ours")["vector"], vector)
        assert load_if_current(load_tensors, path, "other") is None
        path.write_bytes(path.read_bytes()[:200])
        assert load_if_current(load_tensors, path, "ours") is None
    print("artifacts OK: a round trip keeps tensors, a cut file is not current")


if __name__ == "__main__":
    main()

"""Write and read the files of a run so that a crash never leaves half of one.

Every artifact carries a fingerprint: the sha256 of whatever made it (configuration
slice, model, texts, versions). A file counts as present only when it can be read
and its fingerprint is the expected one; the file's existence proves nothing.

Tensor artifacts (`.pt`) are dictionaries that `torch.load(weights_only=True)` accepts.
JSON artifacts are objects with a `fingerprint` key. Every write goes to a temporary
file in the same folder, is flushed to disk, and replaces the old file in one step.
"""

import hashlib
import json
import logging
import math
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from support.errors import InputError

logger = logging.getLogger(__name__)

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
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the body ends, and vanishes if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers, strings, lists and dictionaries of these."""
    with replacing(Path(path)) as file:
        torch.save(content, file)


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError if the file is damaged, FileNotFoundError if absent."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it or run with --fresh") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a JSON object; delete it")
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
    load: Callable[[Path], dict[str, Any]], path: Path, expected: str
) -> dict[str, Any] | None:
    """Return the artifact when it is readable and bears the expected fingerprint, else None."""
    if not path.exists():
        return None
    try:
        content = load(path)
    except InputError as error:
        logger.warning("%s; making it again", error)
        return None
    if content.get("fingerprint") != expected:
        logger.info("%s was made from other inputs; making it again", path.name)
        return None
    return content


def check_writable(path: Path) -> None:
    """Raise InputError unless the folder, or the nearest one above that exists, accepts a file.

    Creates nothing, so that a run that is refused later leaves no trace.
    """
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"output_dir {path} cannot be written ({error.strerror}); choose another with --output-dir"
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

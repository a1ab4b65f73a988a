"""Read text and JSON that users wrote, with the marks that their editors leave."""

import json
import re
from pathlib import Path
from typing import Any

from support.errors import InputError, shown


def local_path(name: str) -> Path:
    """Return a path as the file system takes it, `~` and `~user` expanded; it need not exist.

    Raises InputError: a NUL, an unknown user, a name that is too long, or a folder above it that may not be
    read.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no such user
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"path {shown(name)} cannot be used ({reason}); name another") from error
    return path


def file_name(name: str) -> str:
    """Return a name as a part of a file's: no path, not hidden, and allowed on every system."""
    return re.sub(r"[^\w .-]", "_", name).lstrip(".")


def check_characters(text: str, name: str = "the text") -> str:
    """Return the text if a file can hold it and any tokenizer can read it; name: what errors call it.

    Raises InputError: a NUL, or half of a surrogate pair, as in a text that was cut in the middle of an
    emoji.
    """
    found = re.search("[\0\ud800-\udfff]", text)
    if found is None:
        return text
    kind = "NUL" if found[0] == "\0" else "lone surrogate"
    around = shown(text[max(0, found.start() - 20) : found.end() + 20])
    raise InputError(
        f"{name} holds a {kind} ({found[0]!a}, character {found.start() + 1}, in {around}), which is no "
        "text; remove it"
    )


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without the byte-order mark that some editors put before it.

    Raises InputError: the file cannot be read, is not UTF-8, or holds a NUL, as UTF-16 does.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot be read ({reason})") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{str(path)!r} is UTF-16; save it as UTF-8")
    if b"\0" in content:
        raise InputError(
            f"{str(path)!r} holds a NUL at byte {content.index(0) + 1}, so it is UTF-16 or no "
            "text; save it as UTF-8"
        )
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text ({error}); save it as UTF-8") from error


def parse_json(text: str, name: str) -> Any:
    """Return the content of a JSON text; name: what errors call it.

    Raises InputError: no JSON, a number of thousands of digits, hundreds of nested brackets, or a key that
    stands twice in an object, where JSON would keep the last.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except InputError as error:
        raise InputError(f"{name} {error}") from error
    except RecursionError as error:
        raise InputError(f"{name} is not JSON that can be read: it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON ({str(error)[:150]})") from error
    except ValueError as error:  # Python reads integers of at most 4300 digits
        raise InputError(
            f"{name} is not JSON that can be read: it has a number of thousands of digits"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in content if keys.count(key) > 1)
        raise InputError(f"has the key {shown(twice)} twice in one object; remove or rename one")
    return content

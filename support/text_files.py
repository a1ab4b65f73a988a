"""Read text and JSON that users wrote, with the marks that their editors leave."""

import json
from pathlib import Path
from typing import Any

from support.errors import InputError


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without the byte-order mark that some editors put before it.

    Raises InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: NUL in a path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot be read ({reason})") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{str(path)!r} is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text ({error}); save it as UTF-8") from error


def parse_json(text: str, name: str) -> Any:
    """Return what a JSON text holds; name: what errors call it.

    Raises InputError: no JSON, numbers of thousands of digits, or hundreds of brackets in each other.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"{name} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({str(error)[:150]})") from error


def main() -> None:
    """Check that a byte-order mark is left out and that another encoding is named."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "check.json"
        path.write_text('{"text": "é"}', encoding="utf-8-sig")
        assert parse_json(read_text(path), "check") == {"text": "é"}
    print("text_files OK: a byte-order mark is no part of the text")


if __name__ == "__main__":
    main()

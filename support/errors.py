"""Define the one exception for input that a user can correct.

`run_experiment.py` prints it without a traceback and exits with status 2, so its text must say what was
given, what was expected and what to do. Any other exception that escapes is a defect of ours and keeps its
traceback.
"""

import errno
from typing import Any

ELSEWHERE = "choose another folder with --output-dir"
AGAIN = "; then run again: what was written is kept"
REMEDIES = {
    errno.ENOSPC: f"free some space, or {ELSEWHERE}{AGAIN}",
    errno.EDQUOT: f"free some space, or {ELSEWHERE}{AGAIN}",
    errno.EISDIR: f"a file should be there: move the folder away, or {ELSEWHERE}",
    errno.ENOTEMPTY: f"move it away, or {ELSEWHERE}",
    errno.ENOTDIR: f"a folder should be there: move the file away, or {ELSEWHERE}",
    errno.EEXIST: f"a folder should be there: move the file or link away, or {ELSEWHERE}",
    errno.EACCES: f"give this user the right to read and write it, or {ELSEWHERE}",
    errno.EPERM: f"make it changeable for this user, or {ELSEWHERE}",
    errno.EROFS: ELSEWHERE,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link",
}
REMEDY = f"check the path and the disk{AGAIN}"


class InputError(ValueError):
    """Bad input: a configuration, text, model or file that cannot be used as given."""


class HubError(InputError):
    """A model hub that cannot be reached, and that what was asked for needs."""


def shown(value: Any, length: int = 80) -> str:
    """Return a value as a message quotes it: ASCII in one line, cut after `length` characters."""
    if isinstance(value, str):
        value = value[: length + 1]
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # hundreds of nested brackets, thousands of digits
        text = f"of type {type(value).__name__} and too large to show"
    return text if len(text) <= length + 2 else f"{text[:length]}..."


def first_line(error: BaseException, length: int = 300) -> str:
    """Return the first line of a library's message, with what follows where that line only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    n = next((n for n, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:n])[:length]


def file_error(error: OSError) -> InputError | None:
    """Return what to tell a user whose file cannot be read or written; None if the error is about no file."""
    if error.errno is None or error.strerror is None:
        return None
    # The user knows the file that a temporary one should replace, which is the second name.
    path = error.filename2 or error.filename
    if path is None and error.errno not in REMEDIES:
        return None
    named = f"{path}: " if path is not None else ""
    return InputError(f"{named}{error.strerror}; {REMEDIES.get(error.errno, REMEDY)}")

"""The one exception for input that a user can put right.

`run_experiment.py` prints it without a traceback and exits with status 2, so its
text must say what was given, what was expected and what to do. Everything else
that escapes is a defect of ours and keeps its traceback.
"""

from typing import Any


class InputError(ValueError):
    """Bad input: a configuration, text, model or file that cannot be used as given."""


def shown(value: Any, length: int = 80) -> str:
    """Return a value as a message quotes it: ASCII in one line, cut after `length` characters."""
    if isinstance(value, str):
        value = value[: length + 1]
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # hundreds of brackets in each other, thousands of digits
        text = f"of type {type(value).__name__} and too large to show"
    return text if len(text) <= length + 2 else f"{text[:length]}..."

"""Word what pydantic finds wrong with a configuration: the key, what was given and expected, what to do."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from support.errors import shown

# Keys and values that were renamed; nothing but this message is kept for an old name.
RENAMED_KEYS = {
    "positions": '"mapping_positions"',
    "map_text": '"mapping_data"',
    "layers": '"layer_idx": "band"',
    "dose": '"alpha_search"',
    "likelihood_ratio": '"probe"',
    "equal_cost": '"strength_curve"',
    "examination_texts": '"validation_texts"',
}
RENAMED_VALUES = {
    "word_ends": "aligned",
    "passages": "neutral_text",
    "answers": "responses",
    "styled_answers": "styled_responses",
    "generated": "response",
    "random": "random_direction",
    "shuffled": "shuffled_pairs",
    "wrong_persona": "other_persona",
}


def explain(problem: Mapping[str, Any], known_keys: Sequence[str]) -> str:
    """Return a sentence on one of `pydantic.ValidationError.errors()`.

    known_keys: of the whole configuration, among which a near one is looked for.
    """
    # What pydantic adds between the keys, such as `list[float]`, is left out.
    parts = [
        str(part)[:120] for part in problem["loc"] if not re.match(r"list\[|constrained-|tag-", str(part))
    ]
    if parts[-1:] == ["[key]"]:
        parts = parts[:-2]  # the key itself is wrong, and is shown as the input
    key = shown(".".join(parts), 120)
    if problem["type"] == "extra_forbidden":
        return f"configuration key {key} is unknown; {_hint(parts, known_keys)}"
    if problem["type"] == "missing":
        return f"configuration key {key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_unicode":
        message = "a key holds a lone surrogate, which is no text; remove it"
    if not parts:
        return message
    remedy = {"less_than_equal": "; lower it", "greater_than_equal": "; raise it"}.get(problem["type"], "")
    value = problem["input"]
    renamed = RENAMED_VALUES.get(value) if isinstance(value, str) else None
    if renamed and f"'{renamed}'" in message:
        remedy = f"; it is called {renamed!r} now"
    return f"configuration key {key} is {shown(value)}: {message}{remedy}"


def _hint(parts: Sequence[str], known_keys: Sequence[str]) -> str:
    if parts[-1] in RENAMED_KEYS:
        return f"it is called {RENAMED_KEYS[parts[-1]]} now"
    near = difflib.get_close_matches(parts[-1], known_keys if len(parts) == 1 else [], n=1)
    return f"did you mean {near[0]!r}?" if near else "see docs/configuration.md for the known keys"

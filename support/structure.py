"""Check that what was read from a file has the structure that its reader relies on.

A structure is written as an example:

a type; `float` takes an int too, `int` no bool;
a tuple: one of these;
a list with one structure: of all its items, and of one or more with `...` behind it; with several: of just
these items;
a dictionary: of some keys, others being allowed; `Each(structure)` of all values of any keys;
`Shape((5, None))`: a tensor of finite numbers, None being any size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from support.errors import InputError

NUMBER = (float, type(None))  # a number, or a missing one


@dataclass(frozen=True)
class Each:
    """A dictionary, all of whose values have this structure. keys: those that it has to have."""

    value: Any
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor of finite numbers, None for any size."""

    sizes: tuple[int | None, ...]


def check_structure(content: Any, structure: Any, name: str) -> None:
    """Raise InputError, which names the first entry that differs, unless `content` has the structure."""
    problem = _problem(content, structure, "")
    if problem is not None:
        raise InputError(f"{name} is not as it was written ({problem}); delete it or run with --fresh")


def _problem(content: Any, structure: Any, where: str) -> str | None:
    """Return what differs first, or None."""
    if isinstance(structure, Shape):
        return _tensor_problem(content, structure, where)
    if isinstance(structure, tuple):
        problems = [_problem(content, choice, where) for choice in structure]
        return None if None in problems else problems[0]
    if isinstance(structure, list):
        if not isinstance(content, list):
            return f"{where or 'it'} is a {type(content).__name__}, expected a list"
        if structure[1:] == [...] and content:
            structure = structure[:1]
        expected = structure * len(content) if len(structure) == 1 else structure
        if len(expected) != len(content):
            wanted = "one or more" if ... in expected else len(expected)
            return f"{where or 'it'} has {len(content)} items, expected {wanted}"
        pairs = enumerate(zip(content, expected, strict=True))
        found = (_problem(item, wanted, f"{where}[{index}]") for index, (item, wanted) in pairs)
        return next((problem for problem in found if problem is not None), None)
    if isinstance(structure, dict | Each):
        return _mapping_problem(content, structure, where)
    if structure is float and type(content) is int:
        return None
    if type(content) is not structure:  # a bool is no int
        return f"{where} is a {type(content).__name__}, expected {structure.__name__}"
    return None


def _mapping_problem(content: Any, structure: Mapping[str, Any] | Each, where: str) -> str | None:
    if not isinstance(content, Mapping):
        return f"{where or 'it'} is a {type(content).__name__}, expected a dictionary"
    before = f"{where}." if where else ""
    keys = structure.keys if isinstance(structure, Each) else structure
    missing = [key for key in keys if key not in content]
    if missing:
        return f"{before}{missing[0]} is missing"
    expected = dict.fromkeys(content, structure.value) if isinstance(structure, Each) else structure
    found = (_problem(content[key], value, f"{before}{key}") for key, value in expected.items())
    return next((problem for problem in found if problem is not None), None)


def _tensor_problem(content: Any, shape: Shape, where: str) -> str | None:
    if not isinstance(content, torch.Tensor):
        return f"{where} is a {type(content).__name__}, expected a tensor"
    got, wanted = tuple(content.shape), shape.sizes
    if len(got) != len(wanted) or any(size not in (None, n) for n, size in zip(got, wanted, strict=True)):
        named = ", ".join("any" if size is None else str(size) for size in wanted)
        return f"{where} has shape {got}, expected ({named})"
    return None if content.isfinite().all() else f"{where} holds numbers that are not finite"


def main() -> None:
    """Check that a missing key, a wrong type and a wrong shape are found and named."""
    structure = {"n": int, "rows": [{"key": str}], "W": Shape((2, None))}
    whole = {"n": 1, "rows": [{"key": "a"}], "W": torch.ones(2, 3)}
    assert _problem(whole, structure, "") is None
    assert _problem({**whole, "rows": [{}]}, structure, "") == "rows[0].key is missing"
    assert _problem({**whole, "n": True}, structure, "") == "n is a bool, expected int"
    assert _problem({**whole, "W": torch.ones(3)}, structure, "").startswith("W has shape (3,)")
    print("structure OK: missing keys, wrong types and wrong shapes are named")


if __name__ == "__main__":
    main()

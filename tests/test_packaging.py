"""The lists of packages agree: what is pinned lies in the ranges, and the lock has the same pins."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def pinned(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


def test_pins_lie_in_the_ranges_and_in_the_lock():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    ranges = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    ranges = {requirement.name: requirement for requirement in map(Requirement, ranges)}
    pins, lock = pinned("requirements.txt"), pinned("requirements.lock")
    assert pins.keys() == ranges.keys()
    for name, pin in pins.items():
        (version,) = pin.specifier
        assert ranges[name].specifier.contains(version.version), name
        assert str(lock[name].specifier) == str(pin.specifier), name


def test_ray_is_in_its_range():
    with open(ROOT / "pyproject.toml", "rb") as file:
        ranges = map(Requirement, tomllib.load(file)["project"]["optional-dependencies"]["ray"])
    pins = pinned("requirements-ray.txt")
    assert all(each.specifier.contains(next(iter(pins[each.name].specifier)).version) for each in ranges)

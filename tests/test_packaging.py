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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    files = {
        "requirements.txt": [*project["dependencies"], *extras["dev"]],
        "requirements-ray.txt": extras["ray"],
    }
    for name, ranges in files.items():
        ranges, pins = {each.name: each.specifier for each in map(Requirement, ranges)}, pinned(name)
        assert ranges.keys() == pins.keys()
        for package, pin in pins.items():
            (version,) = pin.specifier
            assert ranges[package].contains(version.version), package
    assert pinned("requirements.txt").items() <= pinned("requirements.lock").items()

"""Imports go down only, also inside functions and for type checking, and the command line is quick."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = {"run_experiment", "export_vectors", "apply_mapping", "make_persona"}
COMPONENTS = {path.stem for path in ROOT.glob("*.py")} - PROGRAMS
FOLDERS = ("decoding", "experiment", "scoring", "support", "texts")
BELOW = ("decoding", "scoring", "support", "texts")  # the components


def imports():
    """Return module -> the project's modules that it imports anywhere."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
    names = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in paths}
    names = {name: path for name, path in names.items() if not name.endswith("__init__")}
    graph = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = found & names.keys()
    return graph


GRAPH = imports()


def test_no_module_imports_itself_by_way_of_others():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises CycleError
    assert len(order) == len(GRAPH) > 30


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_down(name):
    folder, imported = name.partition(".")[0], GRAPH[name]
    if folder in BELOW:
        assert imported & COMPONENTS <= {"model_loading"}
    assert not imported & PROGRAMS
    if folder not in {*PROGRAMS, "experiment"}:
        assert not {module for module in imported if module.startswith("experiment.")}


def test_the_front_shows_the_components_and_programs_alone():
    assert len(COMPONENTS) <= 6
    assert len((ROOT / "run_experiment.py").read_text().splitlines()) <= 400


@pytest.mark.parametrize("flags", [["--help"], ["--config", "/no/such/file.json"]], ids=["help", "no file"])
def test_command_line_answers_before_torch_is_imported(flags):
    command = [sys.executable, "-X", "importtime", "run_experiment.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if flags == ["--help"] else 2)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "sklearn", "matplotlib"}

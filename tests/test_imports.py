"""Imports go down only, the front shows the components alone, and the command line is quick."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a module imports from its own floor and from those below.
FLOORS = (
    {"support"},
    {"texts"},
    {"model_loading"},
    {"decoding"},
    {"activation_extractor", "ridge_mapping", "baseline_methods", "steered_generation"},
    {"judging", "scoring"},
    {"evaluation"},
    {"maps"},
    {"experiment"},
    {"analysis"},
    {"reporting"},
    {"phases"},
    {"ablations"},
    {"run_experiment", "tools"},
)
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
FOLDERS = [name for name in FLOOR_OF if (ROOT / name).is_dir()]


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


def floor(module):
    return FLOOR_OF[module.partition(".")[0]]


def test_no_module_imports_itself_by_way_of_others():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises CycleError
    assert len(order) == len(GRAPH) > 60


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_down(name):
    assert not {module for module in GRAPH[name] if floor(module) > floor(name)}


@pytest.mark.parametrize("folder", ["analysis", "reporting"])
def test_numbers_and_looks_know_the_tables_of_conditions_and_no_run(folder):
    of_folder = [found for name, found in GRAPH.items() if name.startswith(f"{folder}.")]
    assert {name for found in of_folder for name in found if name.startswith("experiment.")} <= {
        "experiment.conditions"
    }


def test_the_front_shows_the_components_alone():
    components = {path.stem for path in ROOT.glob("*.py")}
    assert components == FLOOR_OF.keys() - FOLDERS
    assert len(components) == 7


def test_no_folder_is_crowded():
    n_files = Counter(name.partition(".")[0] for name in GRAPH if "." in name)
    assert max(n_files.values()) <= 12
    n_lines = Counter()
    for name in GRAPH:
        path = ROOT / f"{name.replace('.', '/')}.py"
        n_lines[name.partition(".")[0]] += len(path.read_text(encoding="utf-8").splitlines())
    assert max(n_lines.values()) <= 0.15 * n_lines.total()
    for folder in (ROOT / "tests").iterdir():
        assert len(list(folder.glob("*.py"))) <= 12, folder


@pytest.mark.parametrize("flags", [["--help"], ["--config", "/no/such/file.json"]], ids=["help", "no file"])
def test_command_line_answers_before_torch_is_imported(flags):
    command = [sys.executable, "-X", "importtime", "run_experiment.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if flags == ["--help"] else 2)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "sklearn", "matplotlib"}

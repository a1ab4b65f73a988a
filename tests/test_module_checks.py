"""Every module's self-check passes, offline and without a filled cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "decoding", "experiment", "scoring", "support", "texts")
# Those that put others together are tested whole, by tests/test_run_experiment.py.
ASSEMBLING = ("development", "grid", "inputs", "journalled", "learned_maps", "structures", "transfers")
PROGRAMS = ("run_experiment", "export_vectors", "apply_mapping", "make_persona")
WITHOUT_CHECK = ("__init__", "errors", "vocabulary", *PROGRAMS, *ASSEMBLING)
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if path.stem not in WITHOUT_CHECK
)
# In one process, because importing torch takes longer than most checks.
RUN_ALL = """
import contextlib, io, json, os, runpy, sys, traceback

environment = dict(os.environ)
for name in sys.argv[1:]:
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module(name, run_name="__main__")
    except BaseException:
        error = traceback.format_exc()
    os.environ.clear()
    os.environ.update(environment)
    print(json.dumps([name, printed.getvalue(), error]))
"""


def finished(arguments, cache):
    offline = {"HF_HUB_OFFLINE": "1", "PERSONA_TRANSFER_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True, check=True
    )


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    cache = tmp_path_factory.mktemp("empty_cache")
    lines = finished(["-W", "ignore", "-c", RUN_ALL, *MODULES], cache).stdout.splitlines()
    return {name: (printed, error) for name, printed, error in map(json.loads, lines)}


@pytest.mark.parametrize("name", MODULES)
def test_module_checks_itself_offline(name, checks):
    printed, error = checks[name]
    assert not error
    assert f"{name.split('.')[-1]} OK" in printed


@pytest.mark.parametrize("arguments", [["ridge_mapping.py"], ["-m", "support.journal"]])
def test_a_check_runs_from_the_command_line(arguments, tmp_path):
    assert " OK" in finished(arguments, tmp_path).stdout

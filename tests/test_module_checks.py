"""The components at the top check themselves, offline and without a filled cache."""

import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.package_cache import CACHE_VARIABLE

ROOT = Path(__file__).parent.parent
CHECKED = (
    "activation_extractor",
    "ridge_mapping",
    "baseline_methods",
    "steered_generation",
    "evaluation",
    "model_loading",
)


@pytest.mark.parametrize("name", CHECKED)
def test_component_checks_itself_offline(name, tmp_path, monkeypatch, capsys):
    def offline(*arguments):
        raise OSError("a self-check asked for the network")

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", offline)
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert f"{name} OK" in capsys.readouterr().out


def test_a_check_runs_from_the_command_line_and_warns_of_nothing():
    command = [sys.executable, "ridge_mapping.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert " OK" in done.stdout
    assert done.stderr == ""

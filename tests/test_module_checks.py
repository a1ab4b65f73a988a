"""The components at the top check themselves, offline and without a filled cache."""

import runpy
import socket
from pathlib import Path

import pytest

from support.package_cache import CACHE_VARIABLE

ROOT = Path(__file__).parent.parent
CHECKED = {path.stem for path in ROOT.glob("*.py")} - {"run_experiment"}


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_component_checks_itself_offline(name, tmp_path, monkeypatch, capsys, caplog):
    def offline(*arguments):
        raise OSError("a self-check asked for the network")

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", offline)
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert f"{name} OK" in capsys.readouterr().out
    assert caplog.records == []

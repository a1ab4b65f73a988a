"""SIGTERM and Ctrl-C unwind a program, and end it with one line and the status that shells expect."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.signals import Terminated, say_stopped

ROOT = Path(__file__).parent.parent.parent
STOPPED = "stopped: every text written so far is kept; run the same command again to go on\n"
PROGRAM = """
import signal, sys, time
from support.signals import exit_on_signals, say_stopped, unwind_on_signals

signal.signal(signal.SIGINT, signal.default_int_handler)
{handler}()
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt as error:
    sys.exit(say_stopped(error))
finally:
    print("closed")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("handler", "printed"), [("unwind_on_signals", "closed\n"), ("exit_on_signals", "")])
def test_a_signal_ends_the_program_with_one_line(number, handler, printed):
    command = [sys.executable, "-c", PROGRAM.format(handler=handler)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        output, error = process.communicate(timeout=20)
    assert (process.returncode, output, error) == (128 + number, printed, STOPPED)


def test_ignored_signals_stay_ignored():
    program = (
        "import signal; from support.signals import exit_on_signals, unwind_on_signals\n"
        "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)\n"
        "exit_on_signals(); unwind_on_signals()\n"
        "signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGINT); print('alive')"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "alive\n"


def test_a_fresh_run_is_told_to_go_on_without_the_flag(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run_experiment.py", "--config", "x.json", "--fresh"])
    assert say_stopped(Terminated()) == 143
    assert "run the command without --fresh to go on" in capfd.readouterr().err

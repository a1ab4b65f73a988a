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
from support.signals import end_on_signals, say_stopped

signal.signal(signal.SIGINT, signal.default_int_handler)
end_on_signals()
try:
    print("started", flush=True)
    time.sleep(60)
{handler}
finally:
    print("closed")
"""
HANDLERS = {
    "nobody catches it": "",
    "main catches it": "except KeyboardInterrupt as e: sys.exit(say_stopped(e))",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
def test_a_signal_unwinds_the_program_and_ends_it_with_one_line(number, handler):
    command = [sys.executable, "-c", PROGRAM.format(handler=handler)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        printed, error = process.communicate(timeout=20)
    assert (process.returncode, printed, error) == (128 + number, "closed\n", STOPPED)


def test_an_ignored_sigterm_stays_ignored_and_a_defect_keeps_its_traceback():
    program = (
        "import signal; from support.signals import end_on_signals\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); end_on_signals()\n"
        "signal.raise_signal(signal.SIGTERM); print('alive'); 1 / 0"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert "ZeroDivisionError" in done.stderr


def test_a_fresh_run_is_told_to_go_on_without_the_flag(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run_experiment.py", "--config", "x.json", "--fresh"])
    assert say_stopped(Terminated()) == 143
    assert "run the command without --fresh to go on" in capfd.readouterr().err

"""End a program on SIGTERM and Ctrl-C with one line that says how to go on.

While a program imports its libraries it ends at once: nothing has been written, and an exception inside the
initialisation of a C++ module aborts the process. Afterwards both signals unwind the stack as a
KeyboardInterrupt, so hooks, files and locks are closed; Python raises it when the present call into a library
returns.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


def exit_on_signals() -> None:
    """Let SIGTERM and Ctrl-C end the process at once. Call this before the imports of a program."""
    _handle(signal.SIGTERM, _exit)
    _handle(signal.SIGINT, _exit)


def unwind_on_signals() -> None:
    """Let SIGTERM raise Terminated and Ctrl-C KeyboardInterrupt. Call this after the imports of a program."""
    _handle(signal.SIGTERM, _terminate)
    _handle(signal.SIGINT, signal.default_int_handler)


def _handle(number: signal.Signals, handler: Any) -> None:
    """Install a handler, unless the caller has set the signal to be ignored."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)


def say_stopped(error: KeyboardInterrupt) -> int:
    """Print how to go on; returns the exit status, which is 128 and the signal's number."""
    is_fresh = any(argument.startswith("--f") for argument in sys.argv[1:])
    how = "the command without --fresh" if is_fresh else "the same command again"
    # The terminal shows Ctrl-C as ^C and leaves that line open.
    start = "\n" if sys.stderr.isatty() else ""
    print(f"{start}stopped: every text written so far is kept; run {how} to go on", file=sys.stderr)
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    status = say_stopped(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
    sys.stderr.flush()
    os._exit(status)

"""End a program on SIGTERM as on Ctrl-C, with one line that says how to go on.

Both signals unwind the stack as a KeyboardInterrupt, so hooks, files and locks are closed. Python raises it
when the present call into a library returns; until then a signal waits.
"""

import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


def end_on_signals() -> None:
    """Let SIGTERM raise Terminated, and end without a traceback where nobody catches it or Ctrl-C.

    Call this first in a program, so that signals during the imports end it in the same way. A SIGTERM that
    the caller has set to be ignored stays ignored.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _terminate)
    sys.excepthook = _excepthook


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


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        sys.exit(say_stopped(error))
    sys.__excepthook__(kind, error, trace)

"""End a program on Ctrl-C and SIGTERM within two seconds, with one line that says how to go on.

A signal becomes a KeyboardInterrupt where Python can raise one. Where it cannot, because the main thread
computes, waits for a thread or ends, a second thread ends the process after 0.4 seconds: whatever was
written is whole, as after any kill. While modules are imported there is nothing to unwind, and the process
ends at once. Only the loading of a shared library delays that.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE_SECONDS = 0.4
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


_unwinds = False
_received: int | None = None
_said = threading.Lock()


def end_on_signals() -> None:
    """Catch SIGINT and SIGTERM from now on; for programs. A signal that is ignored stays so."""
    sender, receiver = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    threading.Thread(target=_watch, args=(receiver,), daemon=True).start()


@contextmanager
def unwinding() -> Iterator[None]:
    """Raise KeyboardInterrupt for a signal in the body, also where a library makes another error of it."""
    global _unwinds, _received
    _unwinds, _received = True, None
    if _said.locked():  # of an earlier body
        _said.release()
    try:
        yield
    except Exception as error:
        if _received is not None:
            raise _exception(_received) from error
        raise
    finally:
        _unwinds = False


def say_stopped(error: KeyboardInterrupt) -> int:
    """Print how to go on, once; returns the exit status, 128 and the signal's number."""
    if _said.acquire(blocking=False):
        line = "stopped: every text written so far is kept; run the same command again to go on"
        if any(argument.startswith("--f") for argument in sys.argv[1:]):
            line = "stopped: every text written so far is kept; run the command without --fresh to go on"
        # Not through sys.stderr, whose lock another thread may hold. A progress bar leaves its line open.
        os.write(2, f"{chr(10) if os.isatty(2) else ''}{line}\n".encode())
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def _exception(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    if _unwinds:
        raise _exception(number)
    _leave(number)


def _watch(receiver: socket.socket) -> None:
    """Wait for a signal, then for a second one or until the time is up."""
    number = _next(receiver)
    receiver.settimeout(GRACE_SECONDS)
    with suppress(TimeoutError):
        _next(receiver)
    _leave(number)


def _next(receiver: socket.socket) -> int:
    while (number := receiver.recv(1)[0]) not in SIGNALS:
        pass
    return number


def _leave(number: int) -> None:
    os._exit(say_stopped(_exception(number)))


def main() -> None:
    """Check that a signal is raised where it can be, and becomes the status that shells expect."""
    ended = []
    for number in SIGNALS:
        before = signal.signal(number, _handle)
        try:
            with unwinding():
                signal.raise_signal(number)
        except KeyboardInterrupt as stop:
            ended.append(say_stopped(stop))
        signal.signal(number, before)
    assert ended == [130, 143]
    print("stopping OK: SIGINT ends with 130, SIGTERM with 143")


if __name__ == "__main__":
    main()

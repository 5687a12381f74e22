"""Stop signals. A thread receives them, so that none of our code runs inside a signal handler."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def call_on_stop(stop: Callable[[], None]) -> None:
    """Call `stop` in a thread whenever a stop signal arrives. Only the main thread may call this function.

    The interpreter's C handler writes the number of each signal into a pipe, and a thread reads the pipe. The Python handler
    does nothing, because it interrupts the main thread at any point. A signal that was ignored before stays ignored: `nohup`
    ignores SIGHUP, and a shell ignores SIGINT for its background jobs.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _do_nothing)
    threading.Thread(target=_receive, args=(reading, stop), name="signals", daemon=True).start()
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_restore_defaults)


def ignore_stop_signals() -> None:
    """Ignore further stop signals, so that one that arrives during the exit does not change the exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _do_nothing(*_: object) -> None:
    """Handle a signal by doing nothing; this replaces its default action."""


def _receive(reading: int, stop: Callable[[], None]) -> None:
    """Read signal numbers from the pipe, and call `stop` for stop signals."""
    while numbers := os.read(reading, 64):
        if any(number in STOP_SIGNALS for number in numbers):  # a user's model may handle signals of its own
            stop()


def _block() -> None:
    """Block stop signals during a fork: the child must not receive one before it has the default handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _restore_defaults() -> None:
    """Restore the default handlers in a forked child, such as a data worker: a signal to it must not stop the daemon."""
    with contextlib.suppress(ValueError):  # the child was forked from another thread than the main one
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is _do_nothing:
                signal.signal(number, signal.SIG_DFL)
    _unblock()

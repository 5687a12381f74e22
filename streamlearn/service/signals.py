"""Signals that ask for a stop. A thread receives them, so nothing of ours runs inside a signal handler."""

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
    """Call `stop` in a thread when a stop signal arrives, for as long as the process lives. The main thread calls this.

    The interpreter's C handler writes the number of each signal into a pipe at once, and a thread reads the pipe. The
    Python handler, which runs in the main thread in the middle of anything, does nothing. A signal that was ignored
    before stays ignored: `nohup` ignores SIGHUP, and a shell ignores SIGINT for its background jobs.
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
    """Ignore further stop signals: the work is done, and one that arrives during the exit must not change the exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _do_nothing(*_: object) -> None:
    """Replace the default action of a signal."""


def _receive(reading: int, stop: Callable[[], None]) -> None:
    while numbers := os.read(reading, 64):
        if any(number in STOP_SIGNALS for number in numbers):  # a user's model may handle signals of its own
            stop()


def _block() -> None:
    """Hold stop signals back around a fork: one to the child must not arrive before its handlers are the default ones."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _restore_defaults() -> None:
    """Give a forked child, such as a user's data worker, its default handlers: else a signal to it would stop the daemon."""
    with contextlib.suppress(ValueError):  # forked in a way that leaves no main thread
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is _do_nothing:
                signal.signal(number, signal.SIG_DFL)
    _unblock()

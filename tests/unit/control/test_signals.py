"""Stop signals: during the waits of the loop, in forked children, and if they were ignored before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from streamlearn.core.deliveries import Delivery
from streamlearn.metrics import Metrics
from streamlearn.runtime.control_desk import ControlDesk
from tests.support.in_process import made

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DURING_WAITS = """
import os, random, signal, sys, threading, time
from streamlearn.stream.config import QueueConfig
from streamlearn.control.signals import call_on_stop
from streamlearn.stream.queue import DeliveryQueue

queue = DeliveryQueue(QueueConfig())
received = threading.Semaphore(0)

def stop():
    received.release()
    queue.wake()

call_on_stop(stop)
for turn in range(300):
    timeout = random.uniform(0.001, 0.004)
    threading.Timer(timeout, os.kill, [os.getpid(), signal.SIGTERM]).start()
    queue.get(timeout)
    received.acquire()
    queue.get(timeout)
print("done", "torch" in sys.modules)
"""
FORKING = """
import os, signal, time
from streamlearn.control.signals import call_on_stop
call_on_stop(lambda: os._exit(1))
child = os.fork()
if child == 0:
    time.sleep(20)
    os._exit(0)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
time.sleep(0.2)
"""
IGNORING = """
import os, signal, threading
from streamlearn.control.signals import call_on_stop
stopped = threading.Event()
call_on_stop(stopped.set)
os.kill(os.getpid(), signal.SIGHUP)
print(stopped.wait(0.5))
os.kill(os.getpid(), signal.SIGTERM)
print(stopped.wait(60))
"""


def output(script: str, *before: str) -> str:
    """Return what a script prints; its exit code must be 0."""
    command = [*before, sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("where", ["next", "wait"])
def test_a_slow_signal_handler_does_not_extend_a_wait(tmp_path: Path, where: str) -> None:
    """A handler starts before the deadline of a wait and returns after it: the wait still ends."""
    job, stream = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    waits: dict[str, Callable[[float], object]] = {"next": stream.next_delivery, "wait": desk.wait}
    before = signal.signal(signal.SIGUSR1, lambda *_: time.sleep(0.3))

    def end_both() -> None:
        stream.queue.put(Delivery(), Counter())
        desk._wake_event.set()

    rescue = threading.Timer(20, end_both)
    rescue.start()
    try:
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        assert waits[where](0.2) is None
        assert rescue.is_alive(), "only the rescue ended the wait"
    finally:
        signal.signal(signal.SIGUSR1, before)
        rescue.cancel()


def test_no_stop_signal_is_lost_at_the_deadline_of_a_wait() -> None:
    """Of 300 signals, each sent when a wait is about to end, none is lost, and no wait hangs."""
    assert output(DURING_WAITS) == "done False\n"


def test_a_signal_to_a_forked_child_does_not_stop_the_daemon() -> None:
    """A data worker of a user's model ends by SIGTERM, and the daemon continues."""
    assert output(FORKING) == f"{-signal.SIGTERM}\n"


def test_an_ignored_sighup_stays_ignored() -> None:
    """Under `nohup` SIGHUP does not stop the daemon; SIGTERM does."""
    assert output(IGNORING, "nohup") == "False\nTrue\n"

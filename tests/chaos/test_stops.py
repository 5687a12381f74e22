"""Stops of an idle daemon beside busy processes, on each version of CPython: each ends soon, with 0."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.stream.logs.sqlite import EmbeddedWriter
from tests.support import jobs
from tests.support.chaos.case import FULL, Case
from tests.support.pythons import python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CURRENT_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
POLL = 0.5  # seconds that the loop waits: a signal may arrive at any moment of it
SLOW = 20.0  # seconds; the grace period is 25


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep so many processes busy beside what runs in the context."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("version", "stops"),
    [
        pytest.param(CURRENT_VERSION, 2, id="short"),
        pytest.param("3.11", 300, id="3.11", marks=FULL),
        pytest.param("3.12", 50, id="3.12", marks=FULL),
        pytest.param("3.13", 50, id="3.13", marks=FULL),
    ],
)
def test_stops_at_idle(case: Case, tmp_path: Path, version: str, stops: int) -> None:
    """A daemon that waits for records gets a stop signal at a random moment: the exit code is always 0."""
    interpreter = python(version)
    over: dict[str, Any] = {"input": {"shape": [4], "dtype": "float32", "scale": 1}, "stream": {"on_finished": "wait"}}
    config = jobs.write_config(tmp_path, strategy={"naive": {}}, **over)
    EmbeddedWriter(tmp_path / "topics.sqlite").close()
    seconds, codes = [], []
    with load(os.cpu_count() or 1):
        for _ in range(stops):
            with jobs.Daemon(config, python=interpreter) as daemon:
                daemon.until(lambda status: status.get("waiting_for") is not None)
                time.sleep(case.rng.uniform(0, POLL))
                begun = time.monotonic()
                daemon.process.send_signal(case.rng.choice(STOP_SIGNALS))
                codes.append(daemon.finish(60))
                seconds.append(time.monotonic() - begun)
                assert codes[-1] == 0, daemon.tail()
    ordered = sorted(seconds)
    print(
        f"CPython {version}: {len(seconds)} stops, exit codes {sorted(set(codes))}; seconds: median "
        f"{statistics.median(seconds):.2f}, 95 % below {ordered[int(0.95 * (len(ordered) - 1))]:.2f}, "
        f"longest {ordered[-1]:.2f}"
    )
    case.assert_happened(f"ended with 0 on CPython {version}", codes.count(0), stops)
    case.assert_happened("took less than the grace period", sum(each < SLOW for each in seconds), stops)
    case.record("a stop at idle beside busy processes", stops)

"""The demonstration, which `make demo` runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from streamlearn.control.statedir import is_locked
from streamlearn.tools import demo
from tests.support.commands import cli
from tests.support.jobs import DEADLINE

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

KILLED = """
import os, signal, sys, time
from pathlib import Path
from streamlearn.tools import demo
from streamlearn.control.statedir import read_process_record

work = Path(sys.argv[1])
daemon = demo._start(work, "naive")
while daemon.poll() is None and read_process_record(work / "state" / "naive") is None:
    time.sleep(0.05)
print(daemon.poll(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_demo_reports_forgetting(tmp_path: Path) -> None:
    """It ends by itself and writes a page, a picture and a summary: naive forgets, the default strategy does not."""
    done = cli("demo", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "average accuracy" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"naive", "joint", "default"}
    assert all(len(run["matrix"]) == 5 for run in summary.values())
    accuracy = {name: run["average_accuracy"] for name, run in summary.items()}
    assert 0.15 < accuracy["naive"] < 0.25
    assert accuracy["joint"] > 0.9
    assert accuracy["default"] > 0.8
    assert summary["naive"]["average_forgetting"] > 0.9
    assert summary["default"]["average_forgetting"] < 0.3
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert "data:image/png" in (tmp_path / "report.html").read_text()


def test_daemons_end_with_a_demo_that_is_killed(tmp_path: Path) -> None:
    """A daemon that waits for its topics ends when the demo is killed."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.stdout == "None\n", done.stderr  # the daemon was running
    deadline = time.monotonic() + DEADLINE
    while is_locked(tmp_path / "state" / "naive"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_demo_reads_the_matrix_of_many_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 50 tasks the status leaves the accuracy matrix out, so the rows come from /matrix."""

    class ManyTasks:
        def __init__(self, state: Path, timeout: float) -> None: ...

        def get(self, path: str) -> dict[str, Any]:
            return {"matrix": [[0.5]] if path == "/matrix" else None}

    monkeypatch.setattr(demo, "Client", ManyTasks)
    assert demo._read_matrix(tmp_path) == [[0.5]]

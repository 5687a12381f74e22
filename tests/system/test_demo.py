"""The demonstration, which `make demo` runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from streamlearn import demo
from tests.support.commands import cli

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


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


def test_the_demo_reads_the_matrix_of_many_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 50 tasks the status leaves the accuracy matrix out, so the rows come from /matrix."""

    class ManyTasks:
        def __init__(self, state: Path, timeout: float) -> None: ...

        def get(self, path: str) -> dict[str, Any]:
            return {"matrix": [[0.5]] if path == "/matrix" else None}

    monkeypatch.setattr(demo, "Client", ManyTasks)
    assert demo._read_matrix(tmp_path) == [[0.5]]

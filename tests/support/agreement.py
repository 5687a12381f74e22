"""Reads a daemon's values over HTTP, and checks that they are the same wherever they are shown."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.support import jobs
from tests.support.commands import cli

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def scrape(http: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every value of /metrics, by name and labels."""
    text = urllib.request.urlopen(f"{http}/metrics", timeout=10).read().decode()
    return {
        (sample.name.removeprefix("streamlearn_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def get(url: str) -> tuple[int, Any]:
    """Return the HTTP status and the JSON of a URL."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def has_finished(status: Mapping[str, Any]) -> bool:
    """Return whether all five tasks have ended, and no record waits."""
    tasks = status.get("tasks", [])
    return len(tasks) == 5 and all(task["state"] == "ended" for task in tasks) and not any_lag(status)


def any_lag(status: Mapping[str, Any]) -> bool:
    """Return whether any record waits in the log."""
    return any(count for partitions in (status["lag"] or {}).values() for count in partitions.values())


METRICS = (  # all but forward transfer, which is not defined here
    "average_accuracy",
    "learning_accuracy",
    "backward_transfer",
    "average_forgetting",
    "worst_forgetting",
    "windowed_forgetting",
    "min_accuracy",
    "worst_case_accuracy",
)


def check_agreement(daemon: jobs.Daemon, tmp_path: Path, probe_size: int | None = 200) -> dict[str, Any]:
    """Assert that /metrics, /status, `status --json`, `report` and `predict` have the same values; return the status."""
    status = daemon.until(has_finished)
    metrics = scrape(daemon.http)
    assert cli("status", "--state", daemon.state, "--json").returncode == 0
    shown = json.loads(cli("status", "--state", daemon.state, "--json").stdout)
    for key in ("matrix", "positions", "tasks", "samples", *METRICS):
        assert shown[key] == status[key] == get(f"{daemon.http}/status")[1][key], key
    names = [task["name"] for task in status["tasks"]]
    for i, row in enumerate(status["matrix"]):
        for j, value in enumerate(row):
            labels = (("task", names[j]), ("trained_task", names[i]))
            assert metrics.get(("probe_accuracy_after_task_ratio", labels)) == value
    for task in status["tasks"]:
        assert metrics["probe_accuracy_ratio", (("task", task["name"]),)] == task["probe"]["accuracy"]
        assert metrics["samples_trained_total", (("task", task["name"]),)] == task["samples"]["trained"]
    for name in METRICS:
        assert metrics[name if name.endswith("transfer") else f"{name}_ratio", ()] == status[name]
    assert ("forward_transfer", ()) not in metrics
    assert status["forward_transfer"] is None
    for topic, partitions in status["positions"].items():
        for partition, offset in partitions.items():
            assert metrics["consumer_position_offset", (("partition", partition), ("topic", topic))] == offset
    assert jobs.all_accounted_for(status)

    report = cli("report", "--state", daemon.state, "--joint", daemon.state, "--output", tmp_path / "report")
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"{100 * status['average_accuracy']:.1f} %" in page
    for name in ("learning_accuracy", "worst_forgetting", "worst_case_accuracy"):
        assert f"{100 * status[name]:.1f} %" in page
    assert page.count("<td>+0.0</td></tr>") == len(status["tasks"])  # it misses nothing that it has learned itself
    assert (tmp_path / "report" / "accuracy.png").stat().st_size > 5000

    for number, (_, probe) in enumerate(jobs.tasks(1, probe_size)):
        np.savez(tmp_path / "probe.npz", x=probe.x, y=np.array(probe.y))
        done = cli("predict", "--state", daemon.state, tmp_path / "probe.npz", "--json")
        assert json.loads(done.stdout)["accuracy"] == status["tasks"][number]["probe"]["accuracy"], done.stderr
    return status

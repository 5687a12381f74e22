"""Warnings about tasks that trained nothing, and about probes that are missing or misleading."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from streamlearn.core.tasks import Task, TaskState
from streamlearn.evaluation.config import HoldoutConfig
from streamlearn.evaluation.coverage import probe_warnings, task_warnings

TENTH = HoldoutConfig(fraction=0.1)
COUNTS: list[tuple[str, dict[str, int], HoldoutConfig, list[str], str]] = [
    ("active", {"consumed": 999, "held_out": 999}, TENTH, [], ""),
    ("active", {"consumed": 1000, "held_out": 1000}, TENTH, ["untrained"], "holdout.by value holds all samples out"),
    (
        "ended",
        {"consumed": 3, "rejected": 3},
        TENTH,
        ["untrained"],
        "3 samples consumed, 0 held out, 3 rejected, 0 skipped",
    ),
    ("active", {"consumed": 199, "trained": 199}, TENTH, [], ""),
    (
        "active",
        {"consumed": 200, "trained": 200},
        HoldoutConfig(by="key"),
        ["unmeasured"],
        "holdout.by key selected none of them",
    ),
    ("active", {"consumed": 9999, "trained": 9999}, HoldoutConfig(fraction=0), [], ""),
    ("ended", {"consumed": 9, "trained": 9}, HoldoutConfig(fraction=0), ["unmeasured"], "holdout.fraction is 0"),
    ("ended", {"consumed": 9, "trained": 8, "held_out": 1}, TENTH, [], ""),
]


@pytest.mark.parametrize(("state", "counts", "rule", "kinds", "text"), COUNTS)
def test_warnings_from_the_counts_of_a_task(
    state: str, counts: dict[str, int], rule: HoldoutConfig, kinds: list[str], text: str
) -> None:
    """The warning comes when the task ends, or earlier if chance does not explain the counts."""
    found = list(task_warnings(Task(0, "a", state=TaskState(state), counts=Counter(counts)), rule))
    assert [kind for kind, _ in found] == kinds
    assert all(text in line for _, line in found)


PROBES: list[tuple[Any, Any, HoldoutConfig, list[str], str]] = [
    ([0.0, 1.0, 2.0], [0, 1, 0], TENTH, [], ""),
    ([0.0, 1.0], [0, 0], TENTH, ["missing"], "no sample of 1 trained classes ('b')"),
    ([0.0, 1.0, 2.0, 3.0], [0, 1, 2, -1], TENTH, ["strange"], "2 of 4 samples of the probe have a class"),
    ([0.0, 1.0] * 20, [0, 1] * 20, TENTH, ["distinct"], "40 samples of the probe have only 2 distinct values"),
    ([0.0, 1.0] * 20, [0, 1] * 20, HoldoutConfig(fraction=0), [], ""),
    ([0.0, 1.0] * 9, [0, 1] * 9, TENTH, [], ""),
]


@pytest.mark.parametrize(("x", "y", "rule", "kinds", "text"), PROBES)
def test_warnings_about_a_probe(x: Any, y: Any, rule: HoldoutConfig, kinds: list[str], text: str) -> None:
    """Warns about trained classes without a sample, untrained classes, and few distinct values."""
    found = list(probe_warnings(torch.tensor(x)[:, None], torch.tensor(y), {0: "a", 1: "b"}, rule))
    assert [kind for kind, _ in found] == kinds
    assert all(text in line for _, line in found)


def test_declared_classes_may_be_missing_in_a_probe() -> None:
    """In scenario domain a declared class need not come."""
    assert list(probe_warnings(torch.arange(3.0)[:, None], torch.tensor([0, 0, 0]), None, TENTH)) == []

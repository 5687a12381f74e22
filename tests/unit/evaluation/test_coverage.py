"""Warnings of a task that taught nothing, and of probes that cannot judge it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from streamlearn.config import HoldoutConfig
from streamlearn.data import Task
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
def test_what_the_counts_of_a_task_say(
    state: str, counts: dict[str, int], rule: HoldoutConfig, kinds: list[str], text: str
) -> None:
    """Nothing trained or nothing measured is told when the task ends, or as soon as chance does not explain it."""
    found = list(task_warnings(Task(0, "a", state=state, counts=Counter(counts)), rule))
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
def test_what_a_probe_lacks(x: Any, y: Any, rule: HoldoutConfig, kinds: list[str], text: str) -> None:
    """Classes without a sample, classes that were not trained, and few distinct values that all share one fate."""
    found = list(probe_warnings(torch.tensor(x)[:, None], torch.tensor(y), {0: "a", 1: "b"}, rule))
    assert [kind for kind, _ in found] == kinds
    assert all(text in line for _, line in found)


def test_declared_labels_are_not_missed() -> None:
    """In scenario domain a class may be declared and never come."""
    assert list(probe_warnings(torch.arange(3.0)[:, None], torch.tensor([0, 0, 0]), None, TENTH)) == []

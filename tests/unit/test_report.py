"""What a report says of runs, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from streamlearn.report import Curves, intransigence


def curves(names: list[str], matrix: list[list[float | None]]) -> Curves:
    """Return a run with these tasks and this accuracy matrix."""
    status: dict[str, Any] = {"tasks": [{"name": name} for name in names], "matrix": matrix}
    return Curves("run", status, [])


def test_intransigence_is_what_a_joint_run_knew_better() -> None:
    """a*_k - R[k, k] by name, where both have measured it: whatever the order, and negative where the run knew more."""
    run = curves(["a", "b", "c", "d"], [[0.9, None, None], [0.7, 0.6, None], [0.5, 0.5, None]])
    joint = curves(["b", "a", "c"], [[0.8, None, None], [0.8, 0.85, None], [0.8, 0.8, 0.9]])
    assert run.learned() == {"a": 0.9, "b": 0.6}
    assert intransigence(run, joint) == pytest.approx({"a": -0.05, "b": 0.2})

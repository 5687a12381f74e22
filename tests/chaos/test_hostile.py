"""A hundred thousand hostile records: the generated ones of tests/faults, at full number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.chaos.case import FULL, ROOT, Case

NAME = "tests/faults/test_hostile.py::test_hostile_records_change_nothing"


DUPLICATES = 1.12  # hypothesis may give nine new ones of ten asked for


@pytest.mark.parametrize("records", [pytest.param(100_000, id="100000", marks=FULL)])
def test_hostile(case: Case, records: int) -> None:
    """None ends the daemon's work, each is in the dead letters, and the model is as if none had come."""
    asked = round(records * DUPLICATES)
    # a process of its own, since the number is read where the test is
    told = {**os.environ, "STREAMLEARN_HOSTILE": str(asked), "STREAMLEARN_SEED": str(case.seed)}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--timeout", "3000", NAME]
    done = subprocess.run(command, env=told, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    case.sometimes("records sent", records * (f"seed {case.seed}, {asked} records" in done.stdout), records)
    case.report("hostile records", records)

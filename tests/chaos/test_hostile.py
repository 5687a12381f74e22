"""A hundred thousand hostile records: the generated records of tests/faults, in full number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.chaos.case import FULL, ROOT, Case

NAME = "tests/faults/test_hostile.py::test_hostile_records_change_nothing"


DUPLICATES = 1.12  # hypothesis repeats some examples: about nine of ten are new


@pytest.mark.parametrize("records", [pytest.param(100_000, id="100000", marks=FULL)])
def test_hostile(case: Case, records: int) -> None:
    """No record stops the daemon, each is in the dead letters, and the model is as if none had been sent."""
    requested = round(records * DUPLICATES)
    # in a separate process, because the number is read when the test module is imported
    environment = {**os.environ, "STREAMLEARN_HOSTILE": str(requested), "STREAMLEARN_SEED": str(case.seed)}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--timeout", "3000", NAME]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    case.assert_happened("records sent", records * (f"seed {case.seed}, {requested} records" in done.stdout), records)
    case.record("hostile records", records)

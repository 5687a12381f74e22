"""The table of docs/reliability.md."""

from __future__ import annotations

import random

import pytest

from tests.support.chaos import report
from tests.support.chaos.case import Case, open_results

ENTRY = {
    "fault": "a",
    "tried": 3,
    "lost": 0,
    "twice": 0,
    "seen": {"x": 2},
    "seed": 1,
    "seconds": 60,
    "date": "2026-01-01",
}


def test_cases_of_a_fault_are_one_line() -> None:
    """Numbers of a fault's cases are added up; the last line has seeds and dates."""
    lines = report.table({"1": ENTRY, "2": {**ENTRY, "tried": 1000, "seen": {"x": 1, "y": 5}}}).splitlines()
    assert lines[2] == "| a | 1,003 | 0 | 0 | x: 3; y: 5 |"
    assert lines[-1] == "2 cases, 2 minutes, 2026-01-01; `--chaos-seed` 1."


def test_the_page_shows_the_results() -> None:
    """docs/reliability.md shows exactly the recorded results."""
    text = report.PAGE.read_text()
    assert report.page(text, open_results().entries) == text


def test_a_case_cannot_pass_without_its_fault() -> None:
    """A case fails without its fault, with a loss, or with nothing tried. Its random numbers depend on seed and key."""
    case = Case("a", 7)
    with pytest.raises(AssertionError, match="nothing shows that the fault happened"):
        case.record("a", 1)
    with pytest.raises(AssertionError, match="killed: 0 times, expected at least 1; seed 7"):
        case.assert_happened("killed", 0)
    with pytest.raises(AssertionError):
        case.record("a", 0)
    with pytest.raises(AssertionError):
        case.record("a", 1, twice=1)
    assert Case("a", 7).rng.random() == random.Random("7/a").random() != Case("b", 7).rng.random()

"""Two starts at the same time on one state directory: exactly one succeeds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from streamlearn.control.statedir import read_process_record
from tests.support import jobs, models
from tests.support.chaos.case import FULL, Case

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 60


@pytest.mark.parametrize("races", [pytest.param(2, id="short"), pytest.param(100, id="100", marks=FULL)])
def test_two_starts(case: Case, tmp_path: Path, races: int) -> None:
    """The winner holds the directory and answers; the other ends with 73 and names the winner's process."""
    config = jobs.write_tree(tmp_path, models.settings(tmp_path, 10, stream={"on_finished": "wait"}))
    firsts = 0
    for _ in range(races):
        begun = time.monotonic()
        with jobs.Daemon(config) as one:
            time.sleep(case.rng.uniform(0, 0.05))
            with jobs.Daemon(config) as other:
                while {one.process.poll(), other.process.poll()} == {None}:
                    assert time.monotonic() - begun < SECONDS, "both still run"
                    time.sleep(0.01)
                loser, winner = (one, other) if one.process.poll() is not None else (other, one)
                assert loser.process.returncode == 73, loser.tail()
                assert "Traceback" not in loser.tail()
                while (record := read_process_record(winner.state)) is None or record.pid != winner.process.pid:
                    assert winner.process.poll() is None, winner.tail()
                    assert time.monotonic() - begun < SECONDS
                    time.sleep(0.01)
                while winner.status() is None:
                    assert winner.process.poll() is None, winner.tail()
                    time.sleep(0.02)
                assert str(winner.process.pid) in loser.tail()
                firsts += winner is one
    case.assert_happened("the first process won", firsts)
    case.assert_happened("the second process won", races - firsts, 0)
    case.record("two starts at once", races)

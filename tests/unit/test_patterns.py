"""Patterns of users on names of anybody."""

from __future__ import annotations

import re
import threading
import time

import pytest

from streamlearn import patterns
from streamlearn.config import StreamConfig


@pytest.mark.parametrize(
    ("pattern", "name"), [("jobs-.*", "jobs-1"), ("jobs-", "jobs-1"), (r"(?!x)\w+", "abc"), ("a|ab", "ab"), ("", "a")]
)
def test_a_pattern_matches_the_whole_name(pattern: str, name: str) -> None:
    """As `re.fullmatch` does, look-ahead and alternatives included."""
    expected = re.fullmatch(pattern, name) is not None
    assert patterns.matches(pattern, name) is StreamConfig(pattern=pattern).reads(name) is expected


def test_a_name_that_makes_a_pattern_backtrack_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The match ends by its time limit, other threads run meanwhile, and a warning names pattern and topic once."""
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.3)
    turns, ended = 0, threading.Event()

    def turn() -> None:
        nonlocal turns
        while not ended.is_set():
            turns += 1
            time.sleep(0.01)

    thread = threading.Thread(target=turn)
    thread.start()
    name = "a" * 200 + "_\x1b[2J"
    begun = turns
    assert not StreamConfig(pattern="(a|aa)+").reads(name)
    assert turns > begun
    ended.set()
    thread.join()
    assert not StreamConfig(pattern="(a|aa)+").reads(name)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("stream.pattern (a|aa)+ backtracks for more than 0 s on topic aaaa")
    assert "\x1b" not in line

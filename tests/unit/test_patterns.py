"""Tests of patterns for topic names: both may come from people who do not trust each other."""

from __future__ import annotations

import re
import threading
import time

import pytest

from streamlearn import patterns
from streamlearn.stream.config import StreamConfig


@pytest.mark.parametrize(
    ("pattern", "name"), [("jobs-.*", "jobs-1"), ("jobs-", "jobs-1"), (r"(?!x)\w+", "abc"), ("a|ab", "ab"), ("", "a")]
)
def test_a_pattern_matches_the_whole_name(pattern: str, name: str) -> None:
    """The result is that of `re.fullmatch`, also with look-ahead and alternatives."""
    expected = re.fullmatch(pattern, name) is not None
    assert patterns.matches(pattern, name) is StreamConfig(pattern=pattern).reads(name) is expected


def test_a_name_on_which_a_pattern_backtracks_is_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The match ends at its time limit, other threads run meanwhile, and one warning names pattern and topic."""
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

"""What a chaos test gets: a seed, and methods that record what it tried and what happened."""

from __future__ import annotations

import hashlib
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce.result_file import ResultFile

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests" / "chaos" / "results.json"
FULL = (pytest.mark.chaos, pytest.mark.timeout(3600))  # marks of the full form, which `make chaos` runs and records


def code_digest() -> str:
    """Return a digest of all source files of the program."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "streamlearn").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass
class Case:
    """A running case. Its random numbers depend only on the seed and its key, so it can be repeated alone."""

    key: str
    seed: int
    seen: dict[str, int] = field(default_factory=dict)  # how often each required event happened
    entry: dict[str, Any] | None = None
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}/{self.key}")

    def assert_happened(self, what: str, times: int, at_least: int = 1) -> None:
        """Fail unless the event happened at least so many times. Otherwise the test could pass without its fault."""
        self.seen[what] = self.seen.get(what, 0) + times
        assert times >= at_least, f"{what}: {times} times, expected at least {at_least}; seed {self.seed}"

    def record(self, fault: str, tried: int, *, lost: int = 0, twice: int = 0) -> None:
        """Record how often a fault was tried and how many samples were lost or learned twice. Fail if there were any."""
        assert tried > 0
        assert self.seen, "nothing shows that the fault happened"
        self.entry = {
            "fault": fault,
            "tried": tried,
            "lost": lost,
            "twice": twice,
            "seen": self.seen,
            "seed": self.seed,
            "seconds": round(time.monotonic() - self._started),
            "date": time.strftime("%Y-%m-%d"),
            "processors": os.cpu_count(),
        }
        print(self.entry)
        assert (lost, twice) == (0, 0), f"seed {self.seed}"


def result_digest(item_file: Path, key: str) -> str:
    """Return a digest of everything that a result depends on: the program, the test file and the case's key."""
    text = f"{code_digest()}\n{key}\n".encode() + item_file.read_bytes()
    return hashlib.sha256(text).hexdigest()[:12]


def open_results() -> ResultFile:
    """Return the results of finished cases."""
    return ResultFile(RESULTS)

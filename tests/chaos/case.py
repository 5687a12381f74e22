"""What a chaos test is given: a seed, and a place to say what it tried and what became of it."""

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

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "chaos" / "results.json"
FULL = (pytest.mark.chaos, pytest.mark.timeout(3600))  # of the form that `make chaos` runs and writes down


def code_digest() -> str:
    """Return a digest of the program, whatever the case."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "streamlearn").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass
class Case:
    """A case under way. Its random numbers are a function of the seed and its key, so that it can be repeated alone."""

    key: str
    seed: int
    seen: dict[str, int] = field(default_factory=dict)  # by what had to happen, how often it did
    entry: dict[str, Any] | None = None
    _begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.chance = random.Random(f"{self.seed}/{self.key}")

    def sometimes(self, what: str, times: int, at_least: int = 1) -> None:
        """Fail unless something happened often enough: else the test would pass without its fault."""
        self.seen[what] = self.seen.get(what, 0) + times
        assert times >= at_least, f"{what}: {times} times, expected at least {at_least}; seed {self.seed}"

    def report(self, fault: str, tried: int, *, lost: int = 0, twice: int = 0) -> None:
        """Say that a fault was tried so often, and how many samples were lost or learned twice; fail where any was."""
        assert tried > 0
        assert self.seen, "nothing says that the fault has happened"
        self.entry = {
            "fault": fault,
            "tried": tried,
            "lost": lost,
            "twice": twice,
            "seen": self.seen,
            "seed": self.seed,
            "seconds": round(time.monotonic() - self._begun),
            "date": time.strftime("%Y-%m-%d"),
            "processors": os.cpu_count(),
        }
        print(self.entry)
        assert (lost, twice) == (0, 0), f"seed {self.seed}"


def result_digest(item_file: Path, key: str) -> str:
    """Return a digest of everything a result depends on: the program, the case and its numbers."""
    text = f"{code_digest()}\n{key}\n".encode() + item_file.read_bytes()
    return hashlib.sha256(text).hexdigest()[:12]


def open_results() -> ResultFile:
    """Return the book of finished cases."""
    return ResultFile(RESULTS)

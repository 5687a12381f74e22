"""Runs commands as a user does: one process for each."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.support.jobs import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def cli(
    *arguments: str | Path, stdin: int | None = None, environment: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    command = [sys.executable, "-m", "streamlearn", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env={**os.environ, **environment},
        check=False,
        stdin=stdin,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the single line of an error."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]

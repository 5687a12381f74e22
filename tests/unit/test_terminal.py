"""Labels, topics and messages from outside cannot write markup, escape sequences or forged lines on a terminal."""

from __future__ import annotations

import ast
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

import streamlearn
from streamlearn.cli.common import print_error, print_line
from streamlearn.cli.status import print_plain, render
from streamlearn.core.samples import Outcome
from streamlearn.core.states import DaemonState
from streamlearn.logs import TextFormatter
from streamlearn.runtime.status import status_of
from tests.support.in_process import made

if TYPE_CHECKING:
    from collections.abc import Callable

HOSTILE = "[/x][red]\x1b]0;pwned\x07\x1b[2J\u202e\nforged: line"
SHOWN = r"[/x][red]\x1b]0;pwned\x07\x1b[2J\u202e\nforged: line"
CLI = Path(streamlearn.__file__).parent / "cli"


def hostile_status(tmp_path: Path) -> dict[str, Any]:
    """Return a status in which every value from outside is hostile."""
    job, _ = made(tmp_path)
    counts = dict.fromkeys(("consumed", *Outcome), 1)
    probe = {"size": 1, "accuracy": 0.5, "best": 0.5, "forgetting": 0.0}
    task = {"name": HOSTILE, "index": 0, "state": "active", "labels": [HOSTILE], "samples": counts, "probe": probe}
    return {
        **status_of(job, None, DaemonState.RUNNING),
        "problem": HOSTILE,
        "waiting_for": HOSTILE,
        "tasks": [task],
        "topics": {HOSTILE: {**counts, "queued": 0}},
    }


def print_table(tree: dict[str, Any]) -> None:
    """Print a status as a table, as on a terminal."""
    file = io.StringIO()
    Console(file=file, width=4000, force_terminal=True, color_system=None).print(render(tree))
    print(file.getvalue())


@pytest.mark.parametrize("show", [print_table, print_plain])
def test_a_status_shows_hostile_text_literally(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], show: Callable[[dict[str, Any]], None]
) -> None:
    """In the table and in plain lines, `[/x]` is no markup, and control characters are escaped."""
    show(hostile_status(tmp_path))
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) >= 4
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert "\nforged" not in shown


def test_lines_errors_and_log_lines_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of commands, errors and log lines escape control characters; only an error may have several lines."""
    print_line(HOSTILE)
    print_error(f"streamlearn: a: {HOSTILE}")
    captured = capsys.readouterr()
    assert captured.out == f"{SHOWN}\n"
    assert captured.err == f"streamlearn: a: {SHOWN}\n".replace(r"\n", "\n")
    record = logging.LogRecord("a", logging.WARNING, "a", 1, "label %s", (HOSTILE,), None)
    assert TextFormatter("%(message)s").format(record) == f"label {SHOWN}"


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_commands_print_only_through_the_helpers(path: Path) -> None:
    """All text of commands goes through `print_line`, `print_json` and `print_error`, which escape it."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    own = {"print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write"}
    assert path.stem == "common" or not own & set(calls)

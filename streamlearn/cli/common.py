"""Helpers of several commands: find the state directory, read a configuration, print."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamlearn.core.errors import StreamlearnError, UsageError, is_out_of_memory
from streamlearn.logs import printable, printable_lines

if TYPE_CHECKING:
    from streamlearn.config.root import Config

StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state",
        envvar="STREAMLEARN_STATE_DIR",
        help="State directory. Default: that of ./streamlearn.yaml.",
        readable=False,  # click's own check is off: reading it gives a better message and exit code
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.", readable=False)]


def load_config(path: Path, *, warn: bool = False) -> Config:
    """Return a configuration, and print its warnings if `warn` is set; raises `ConfigurationError`."""
    from streamlearn.config.loader import load
    from streamlearn.learning.strategies.recipes import RECIPES

    config = load(path, RECIPES, os.environ)
    for warning in config.warnings(RECIPES) if warn else ():
        print_error(f"warning: {warning}")
    return config


def config_here() -> Path | None:
    """Return ./streamlearn.yaml, the configuration of commands that get none; None if there is no such file."""
    here = Path("streamlearn.yaml")
    return here if here.is_file() else None


def find_state_dir(state: Path | None) -> Path:
    """Return the state directory for a command; raises `UsageError` if none is given."""
    if state is not None:
        return state
    if (here := config_here()) is not None:
        return load_config(here).state_dir
    raise UsageError(
        "no state directory: use --state DIR, set STREAMLEARN_STATE_DIR, or run in a directory with a streamlearn.yaml",
    )


def to_streamlearn_error(error: Exception) -> StreamlearnError:
    """Return any exception as a `StreamlearnError`: one line and an exit code."""
    if isinstance(error, StreamlearnError):
        return error
    if isinstance(error, OSError):
        return StreamlearnError.from_os_error(error)
    if is_out_of_memory(error):
        return StreamlearnError.from_out_of_memory(error)
    return StreamlearnError(f"{type(error).__name__}: {error} (this is a bug in streamlearn; --debug shows where)")


def print_line(line: object) -> None:
    """Print a line on stdout, with control characters escaped."""
    typer.echo(printable(str(line)))


def print_json(tree: Any, indent: int | None = 2) -> None:
    """Print a JSON value on stdout."""
    typer.echo(json.dumps(tree, indent=indent, allow_nan=False))


def print_error(line: str) -> None:
    """Print one or more lines on stderr, with control characters escaped."""
    sys.stderr.write(printable_lines(line) + "\n")


def format_percent(value: float | None) -> str:
    """Return a ratio as percent; a dash if it is None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def format_megabytes(num_bytes: int) -> str:
    """Return a number of bytes as megabytes."""
    return f"{num_bytes / 1e6:.1f} MB"

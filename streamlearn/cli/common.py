"""What several commands share: finding the state directory, reading a configuration, printing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamlearn.data import StreamlearnError, is_out_of_memory
from streamlearn.logs import printable, printable_lines

if TYPE_CHECKING:
    from streamlearn.config import Config

StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state",
        envvar="STREAMLEARN_STATE_DIR",
        help="State directory; else that of ./streamlearn.yaml.",
        readable=False,  # whether it is, reading tells, in one line and with the right code
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.", readable=False)]


def load_config(path: Path, *, warn: bool = False) -> Config:
    """Return a configuration, its warnings printed where it is to be learned by; raises `StreamlearnError` (78)."""
    from streamlearn.configfile import load
    from streamlearn.strategies.recipes import RECIPES

    config = load(path, RECIPES, os.environ)
    for warning in config.warnings(RECIPES) if warn else ():
        print_error(f"warning: {warning}")
    return config


def find_state_dir(state: Path | None) -> Path:
    """Return the state directory that a command is about; raises `StreamlearnError` (2) when nothing names one."""
    if state is not None:
        return state
    here = Path("streamlearn.yaml")
    if here.is_file():
        return load_config(here).state_dir
    raise StreamlearnError(
        "which daemon? give --state DIR, set STREAMLEARN_STATE_DIR, or stand beside a streamlearn.yaml", code=2
    )


def to_streamlearn_error(error: Exception) -> StreamlearnError:
    """Return any failure as one line and an exit code."""
    if isinstance(error, StreamlearnError):
        return error
    if isinstance(error, OSError):
        return StreamlearnError.from_os_error(error)
    if is_out_of_memory(error):
        return StreamlearnError.from_out_of_memory(error)
    return StreamlearnError(f"{type(error).__name__}: {error} (this is a fault of ours; --debug shows where)")


def print_line(line: object) -> None:
    """Print a line on stdout, as a terminal may show it."""
    typer.echo(printable(str(line)))


def print_json(tree: Any, indent: int | None = 2) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(tree, indent=indent, allow_nan=False))


def print_error(line: str) -> None:
    """Print a line, or several, on stderr, as a terminal may show them."""
    sys.stderr.write(printable_lines(line) + "\n")


def format_percent(value: float | None) -> str:
    """Return a ratio for people; a dash where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f} %"


def format_megabytes(num_bytes: int) -> str:
    """Return a size for people."""
    return f"{num_bytes / 1e6:.1f} MB"

"""`report`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamlearn.cli.common import StateOption, find_state_dir, print_line


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (report, demo):
        app.command()(command)


def report(
    state: StateOption = None,
    checkpoint: Annotated[str, typer.Option(help="An id, its number, or `latest`.")] = "latest",
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.")] = Path("report"),
    joint: Annotated[
        Path | None, typer.Option(help="The state directory of a joint run of the same tasks, for intransigence.")
    ] = None,
) -> None:
    """Write an HTML page and pictures: what was learned, and what was forgotten."""
    from streamlearn.checkpoint import Store
    from streamlearn.report import Run, write

    def curves(directory: Path, name: str) -> Run:
        return Run.from_checkpoint(Store(directory).find(name, "status.json", "state.json"))

    page = write(
        output, [curves(find_state_dir(state), checkpoint)], None if joint is None else curves(joint, "latest")
    )
    print_line(str(page))


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.")] = Path("demo"),
) -> None:
    """Learn five tasks of handwritten digits three ways, and show what forgetting is, and its cure."""
    from streamlearn.demo import run

    run(output)

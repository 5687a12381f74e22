"""The commands `report` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamlearn.cli.common import StateOption, find_state_dir, print_line


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (report, demo):
        app.command()(command)


def report(
    state: StateOption = None,
    checkpoint: Annotated[str, typer.Option(help="A checkpoint: its id, its number, or `latest`.")] = "latest",
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to create or update.")] = Path("report"),
    joint: Annotated[
        Path | None, typer.Option(help="State directory of a joint run of the same tasks, to report intransigence.")
    ] = None,
) -> None:
    """Write an HTML page and pictures of what was learned and what was forgotten."""
    from streamlearn.checkpoint.store import Store
    from streamlearn.tools.report import Run, write

    def read_run(directory: Path, name: str) -> Run:
        return Run.from_checkpoint(Store(directory).find(name, "status.json", "state.json"))

    page = write(
        output, [read_run(find_state_dir(state), checkpoint)], None if joint is None else read_run(joint, "latest")
    )
    print_line(str(page))


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to create or update.")] = Path("demo"),
) -> None:
    """Learn five tasks of handwritten digits in three ways, and report how much each way forgets."""
    from streamlearn.tools.demo import run

    run(output)

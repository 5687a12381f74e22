"""`streamlearn task`: commands about tasks."""

from __future__ import annotations

import typer

from streamlearn.cli.common import JsonOption, StateOption, find_state_dir, print_json, print_line
from streamlearn.control.client import COMMAND_SECONDS, Client

app = typer.Typer(help="End the open task.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """End the open task."""


@app.command()
def end(state: StateOption = None, json_: JsonOption = False) -> None:
    """End the open task at the records read so far; returns when these are learned and the task has ended.

    Later records of its topic count as late. The exit code is 1 if no task is open.
    """
    found = Client(find_state_dir(state), timeout=COMMAND_SECONDS).command("end_task")
    if json_:
        print_json(found)
    else:
        print_line(f"task {found['task']} has ended")

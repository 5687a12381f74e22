"""`streamlearn task`: what a person decides about tasks."""

from __future__ import annotations

import typer

from streamlearn.cli.common import JsonOption, StateOption, find_state_dir, print_json, print_line
from streamlearn.service.client import COMMAND_SECONDS, Client

app = typer.Typer(help="End the open task.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """End the open task."""


@app.command()
def end(state: StateOption = None, json_: JsonOption = False) -> None:
    """End the open task where its topic was read up to; returns once what was read is learned and made to last.

    What comes later in its topic is late. Where no task is open, that is said and the exit code is 1.
    """
    found = Client(find_state_dir(state), timeout=COMMAND_SECONDS).command("end_task")
    if json_:
        print_json(found)
    else:
        print_line(f"task {found['task']} has ended")

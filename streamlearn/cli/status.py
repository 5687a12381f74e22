"""`streamlearn status`: what is learned and what was forgotten, once or repeated, as text, table or JSON."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamlearn.cli.common import (
    JsonOption,
    StateOption,
    find_state_dir,
    format_megabytes,
    format_percent,
    print_json,
    print_line,
)
from streamlearn.control.client import Client
from streamlearn.control.statedir import is_locked
from streamlearn.core.errors import NotRunningError, StreamlearnError
from streamlearn.logs import format_outcomes, printable, printable_lines

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table


def status(
    state: StateOption = None,
    json_: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Repeat every second until Ctrl-C; with --json one line each time.")
    ] = False,
) -> None:
    """Show what is learned and what was forgotten; without a daemon, that of the last checkpoint (exit code 3)."""
    directory = find_state_dir(state)
    if watch:
        _watch(directory, json_)
        return
    tree = read_status(directory, matrix=json_)
    if json_:
        print_json(tree)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(render(tree))
    else:
        print_plain(tree)
    if tree["pid"] is None:
        raise typer.Exit(NotRunningError.exit_code)


def read_status(directory: Path, *, matrix: bool = False) -> dict[str, Any]:
    """Return the status of the daemon, or of the last checkpoint with `pid` None if no daemon runs.

    With `matrix`, the accuracy matrix is included even if there are too many tasks for the usual status.
    """
    if is_locked(directory):
        tree: dict[str, Any] = Client(directory).get("/status")
        if matrix and tree.get("tasks") and tree["matrix"] is None:
            tree["matrix"] = Client(directory, timeout=60).get("/matrix")["matrix"]
        return tree
    from streamlearn.checkpoint.store import Store

    try:
        checkpoint = Store(directory).find("latest", "status.json")
    except StreamlearnError as error:
        raise NotRunningError(f"no daemon is running; {error}") from error
    tree = {**checkpoint.read_json("status.json"), "checkpoint": checkpoint.summary()}
    if matrix and tree.get("tasks") and tree["matrix"] is None:
        from streamlearn.evaluation.matrix import AccuracyMatrix

        tree["matrix"] = AccuracyMatrix.from_checkpoint(checkpoint).matrix()
    return tree


def print_plain(tree: dict[str, Any]) -> None:
    """Print a status as plain lines."""
    print_line(headline(tree))
    if tree.get("problem"):
        print_line(f"problem: {tree['problem']}")
    for task in tree.get("tasks", []):
        probe = task["probe"]
        print_line(
            f"{task['name']:<20} {task['state']:<9} samples {task['samples']['consumed']:>7}  "
            f"accuracy {format_percent(probe['accuracy']):>7}  best {format_percent(probe['best']):>7}  "
            f"forgetting {format_percent(probe['forgetting']):>7}"
        )
    if "samples" in tree:
        for line in format_summary(tree).split("\n"):
            print_line(line)


def headline(tree: dict[str, Any]) -> str:
    """Return the first line of a status: name, state, strategy, device and step."""
    known = [f"{key} {tree[key]}" for key in ("strategy", "device", "step") if tree.get(key) is not None]
    pid = f" (process {tree['pid']})" if tree["pid"] is not None else ""
    return f"{tree['name']}: {tree['state']}{pid}" + "".join(f", {part}" for part in known)


def format_summary(tree: dict[str, Any]) -> str:
    """Return the lines of a status below its tasks: mean accuracies, samples, lag and the last checkpoint."""
    counts = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in tree["samples"].items())
    lag = "-"
    if tree["lag"] is not None:
        lag = f"{sum(count for partitions in tree['lag'].values() for count in partitions.values())} records"
    waiting = f"; waiting for topic {printable(tree['waiting_for'])}" if tree.get("waiting_for") is not None else ""
    held_back = sum(count for partitions in tree.get("held_back", {}).values() for count in partitions.values())
    behind = f"; {held_back} offsets behind open transactions" if held_back else ""
    saved = tree["checkpoint"]
    last = "none yet" if saved is None else f"{saved['id']} at step {saved['step']}, {format_megabytes(saved['bytes'])}"
    age = tree.get("batches_since_evaluation")
    forward = format_percent(tree["forward_transfer"]) + (f" (measured {age} batches ago)" if age else "")
    audited = "".join(f"{printable(line)}\n" for line in format_outcomes(tree["topics"]))
    accuracy, forgetting, backward = (
        format_percent(tree[key]) for key in ("average_accuracy", "average_forgetting", "backward_transfer")
    )
    return (
        f"average accuracy {accuracy}, average forgetting {forgetting}, backward transfer {backward}, "
        f"forward transfer {forward}\n"
        f"samples: {counts}; lag {lag}{behind}{waiting}\n{audited}checkpoint: {last}"
    )


def render(tree: dict[str, Any]) -> Table:
    """Return a status as a table for a terminal. Names and messages are shown as they are, not as rich markup."""
    from rich.table import Table
    from rich.text import Text

    def text(value: object, style: str = "") -> Text:
        return Text(printable(str(value)), style)

    table = Table(
        title=text(headline(tree)),
        caption=Text(printable_lines(format_summary(tree))) if "samples" in tree else None,
        title_justify="left",
        caption_justify="left",
    )
    for column, justify in (("task", "left"), ("state", "left"), ("samples", "right"), ("probe", "right"),
                            ("accuracy", "right"), ("best", "right"), ("forgetting", "right")):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]  # the literals are in the tuple
    for task in tree.get("tasks", []):
        probe = task["probe"]
        table.add_row(
            text(task["name"]), task["state"], str(task["samples"]["consumed"]), str(probe["size"]),
            format_percent(probe["accuracy"]), format_percent(probe["best"]), format_percent(probe["forgetting"]),
        )  # fmt: skip
    if tree.get("problem"):
        table.add_section()
        table.add_row(text(tree["problem"], "red"))
    return table


def _watch(directory: Path, json_: bool) -> None:
    try:
        while json_:
            print_json(read_status(directory, matrix=True), indent=None)
            time.sleep(1)
        from rich.live import Live

        with Live(render(read_status(directory)), refresh_per_second=2) as live:
            while True:
                time.sleep(1)
                live.update(render(read_status(directory)))
    except KeyboardInterrupt:
        return

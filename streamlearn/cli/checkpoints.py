"""`streamlearn checkpoint`: all commands work on the files, except `create`, which asks the daemon."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from streamlearn.checkpoint.manifest import BrokenCheckpoint
from streamlearn.checkpoint.store import Store
from streamlearn.cli.common import (
    JsonOption,
    StateOption,
    find_state_dir,
    format_megabytes,
    format_percent,
    print_error,
    print_json,
    print_line,
)
from streamlearn.control.client import COMMAND_SECONDS, Client
from streamlearn.control.statedir import is_locked, locked
from streamlearn.core.errors import AlreadyRunningError, InputOutputError, StreamlearnError, UsageError
from streamlearn.core.text import parse_digits

app = typer.Typer(help="Create, list, show, verify, tag, restore and remove checkpoints.", no_args_is_help=True)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="An id, its number, a tag, or `latest`.")]
TagArgument = Annotated[str, typer.Argument(metavar="TAG", help="A name of your choice.")]


@app.command()
def create(
    state: StateOption = None,
    json_: JsonOption = False,
    tag: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Also a tag: the checkpoint is kept until it is removed or untagged."),
    ] = None,
) -> None:
    """Let the daemon save now; returns when the checkpoint is durable. Without a tag, retention may remove it later."""
    found = Client(find_state_dir(state), timeout=COMMAND_SECONDS).command(
        "checkpoint", **({} if tag is None else {"tag": tag})
    )
    if json_:
        print_json(found)
    else:
        print_line(found["id"])


@app.command("list")
def list_(state: StateOption = None, json_: JsonOption = False) -> None:
    """List the checkpoints, newest first."""
    store, rows = Store(find_state_dir(state)), []
    for path in store.paths():
        try:
            found = store.find(path.name)
        except BrokenCheckpoint as error:
            print_error(f"{path.name}: broken: {error}")
        except StreamlearnError as error:
            print_error(f"{path.name}: {error}")
        else:
            more = {key: found.manifest.get(key) for key in ("average_accuracy", "parent")}
            rows.append({**found.summary(), **more, "tags": found.tags})
    if json_:
        print_json(rows)
        return
    print_line(f"{'ID':<18} {'CREATED':<25} {'STEP':>9} {'SIZE':>10} {'ACCURACY':>9} {'TAGS'}")
    for row in rows:
        accuracy = format_percent(row["average_accuracy"])
        line = f"{row['id']:<18} {row['created'][:19]:<25} {row['step']:>9} {format_megabytes(row['bytes']):>10} {accuracy:>9}"
        print_line(f"{line} {', '.join(row['tags'])}".rstrip())


@app.command()
def show(id_: IdArgument = "latest", state: StateOption = None, json_: JsonOption = False) -> None:
    """Show a checkpoint: its positions in the stream, its accuracy and its files."""
    found = Store(find_state_dir(state)).find(id_, "offsets.json")
    tree = {**dict(found.manifest), "tags": found.tags, "positions": found.read_json("offsets.json")}
    if json_:
        print_json(tree)
        return
    for key in ("id", "parent", "created", "step", "batches", "version"):
        print_line(f"{key:<10} {tree[key]}")
    print_line(f"{'accuracy':<10} {format_percent(tree['average_accuracy'])}")
    for tag in tree["tags"]:
        print_line(f"{'tag':<10} {tag}")
    for topic, entry in tree["positions"]["topics"].items():
        for partition, position in entry["partitions"].items():
            print_line(f"{'position':<10} {topic}[{partition}] offset {position['offset']} skip {position['skip']}")
    for name, entry in tree["files"].items():
        print_line(f"{'file':<10} {name} {entry['size']} bytes")


@app.command()
def verify(
    id_: Annotated[str | None, typer.Argument(metavar="[ID]", help="Default: the newest.")] = None,
    state: StateOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Verify every checkpoint.")] = False,
) -> None:
    """Compare every file with its hash; the exit code is 74 if one does not match."""
    store = Store(find_state_dir(state))
    names = [path.name for path in store.paths()]
    if not everything:
        names = [id_] if id_ not in {None, "latest"} else names[:1] or ["latest"]
    broken = 0
    for name in names:
        try:
            checkpoint = store.find(name)
            checkpoint.verify()
            print_line(f"{checkpoint.id}: valid")
        except BrokenCheckpoint as error:
            broken += 1
            print_error(f"{name}: broken: {error}")
    if broken:
        raise typer.Exit(InputOutputError.exit_code)


@app.command()
def restore(id_: IdArgument, state: StateOption = None) -> None:
    """Copy an older checkpoint as the newest; the daemon must be stopped, and continues from there at its next start."""
    directory = find_state_dir(state)
    if is_locked(directory):
        raise AlreadyRunningError(f"{directory}: the daemon is running; stop it first")
    Store(directory).find(id_)  # before the lock, which would create a missing directory
    with locked(directory):
        store = Store(directory)
        before = store.newest()
        restored = store.restore(id_)
    print_line(f"{restored.id} is a copy of {restored.manifest['restored_from']}")
    if before is not None:
        old, new = (c.read_json("status.json")["positions"] for c in (before, restored))
        for topic, partitions in old.items():
            for partition, offset in partitions.items():
                count = offset - new.get(topic, {}).get(partition, 0)
                if count:
                    print_line(f"{topic}[{partition}]: {count} records will be learned again")


@app.command()
def tag(id_: IdArgument, tag: TagArgument, state: StateOption = None) -> None:
    """Give a checkpoint a tag: it is kept until it is removed or untagged, and the tag can be used as its ID."""
    print_line(f"{Store(find_state_dir(state)).tag(id_, tag).id} has the tag {tag}")


@app.command()
def untag(tag: TagArgument, state: StateOption = None) -> None:
    """Remove a tag; retention may then remove its checkpoint."""
    print_line(f"{Store(find_state_dir(state)).untag(tag)} no longer has the tag {tag}")


@app.command()
def remove(id_: IdArgument, state: StateOption = None) -> None:
    """Remove a checkpoint, even one with tags; never the newest."""
    print_line(f"{Store(find_state_dir(state)).remove(id_).id} removed")


@app.command()
def prune(
    state: StateOption = None,
    keep_last: Annotated[int, typer.Option(min=1, help="Number of newest checkpoints to keep.")] = 3,
    hourly: Annotated[int, typer.Option(min=0, help="Number of older ones to keep, one for each hour.")] = 24,
    task_ends: Annotated[
        str, typer.Option(metavar="N|all", help="Number of last tasks whose checkpoint at the end is kept.")
    ] = "5",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
) -> None:
    """Remove old checkpoints; never the newest, and never one with a tag."""
    ends: int | Literal["all"] | None = "all" if task_ends == "all" else parse_digits(task_ends, 9)
    if ends is None:
        raise UsageError(f"--task-ends {task_ends!r:.40}: expected a number or `all`")
    for checkpoint in Store(find_state_dir(state)).prune(keep_last, hourly, ends, dry_run=dry_run):
        print_line(f"{checkpoint.id} {'would be removed' if dry_run else 'removed'}")

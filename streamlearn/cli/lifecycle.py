"""`run`, `start`, `stop`, `status`, `pause`, `resume`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from streamlearn.cli.common import (
    ConfigArgument,
    JsonOption,
    StateOption,
    find_state_dir,
    format_megabytes,
    format_percent,
    load_config,
    print_json,
    print_line,
    to_streamlearn_error,
)
from streamlearn.control.client import COMMAND_SECONDS, Client
from streamlearn.control.statedir import (
    already_running,
    ended_cleanly,
    is_locked,
    open_daemon_log,
    read_process_record,
    send_signal,
)
from streamlearn.core.errors import (
    InputOutputError,
    NotRunningError,
    StreamlearnError,
    TemporaryError,
    error_with_exit_code,
)
from streamlearn.logs import format_outcomes, printable, printable_lines

if TYPE_CHECKING:
    from rich.table import Table

ENDING_SECONDS = 30.0  # for a process to exit after its last message


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (run, start, stop, status, pause, resume):
        app.command()(command)


def run(
    config: ConfigArgument,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live table.")] = False,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Learn in the foreground until stopped. Shows a live table on a terminal, otherwise JSON log lines."""
    pipe = os.fdopen(ready_fd, "w", buffering=1) if ready_fd is not None else None

    def send_event(event: dict[str, Any]) -> None:
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # the process of `start` has ended
                pipe.write(json.dumps(event) + "\n")

    try:
        loaded = load_config(config, warn=True)
        from streamlearn import logs
        from streamlearn.runtime import daemon

        logs.set_up(loaded.log.level, loaded.log.format)
        live = sys.stdout.isatty() and not quiet and ready_fd is None
        daemon.run(loaded, on_event=send_event, live_view=_live_table if live else None)
    except Exception as error:
        failure = to_streamlearn_error(error)
        send_event({"event": "failed", "error": str(failure), "code": failure.exit_code})
        raise
    finally:
        if pipe is not None:
            pipe.close()


def start(
    config: ConfigArgument,
    wait: Annotated[Literal["ready", "running"], typer.Option(help="What to wait for.")] = "running",
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 120.0,
) -> None:
    """Learn in the background; returns when the daemon runs, or fails with its error and exit code."""
    loaded = load_config(config, warn=True)
    if is_locked(loaded.state_dir):
        raise already_running(loaded.state_dir)
    log_file = open_daemon_log(loaded.state_dir)
    reading, writing = os.pipe()
    # `-m` puts the working directory first on the import path, and `-P` prevents that: the child gets our own path
    safe_path = [] if sys.path[:1] in ([""], [str(Path.cwd())]) else ["-P"]
    command = [sys.executable, *safe_path, "-m", "streamlearn", "run", str(config), "--ready-fd", str(writing)]
    child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True, pass_fds=(writing,)
    )
    os.close(writing)
    os.close(log_file)
    event = _await_event(reading, {wait, "failed"}, timeout)
    if event is None:
        reason = why_not_ready(loaded.state_dir)
        line = f"not {wait} after {timeout:.0f} s: {reason}; it continues to run as process {child.pid}"
        raise TemporaryError(line)
    if event["event"] == "ended":
        code = child.wait(ENDING_SECONDS)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise error_with_exit_code(max(code, 1), f"the daemon {how}; see {loaded.state_dir / 'daemon.log'}")
    if event["event"] == "failed":
        child.wait(ENDING_SECONDS)
        raise error_with_exit_code(event["code"], event["error"])
    child.returncode = 0  # so that Python does not wait for it
    print_line(f"process {event['pid']} is {wait}; metrics on {event['http']}/metrics")


def why_not_ready(directory: Path) -> str:
    """Return why a daemon is not ready, from its `/status` and `/readyz`."""
    client = Client(directory, timeout=2)
    try:
        tree, checks = client.get("/status"), client.get("/readyz")["checks"]
    except StreamlearnError as error:
        return f"{error}; see {directory / 'daemon.log'}"
    failed = ", ".join(name for name, check in checks.items() if not check["ok"])
    state = f"{tree['state']}, not ok: {failed}" if failed else str(tree["state"])
    return f"{tree['problem']} ({state})" if tree.get("problem") else state


def stop(
    state: StateOption = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait; the daemon itself ends after shutdown_grace.")
    ] = 120.0,
    force: Annotated[
        bool, typer.Option("--force", help="Kill it after the timeout; what was not saved is learned again.")
    ] = False,
) -> None:
    """Save a last checkpoint and end the daemon; returns when the daemon has ended."""
    directory = find_state_dir(state)
    if not is_locked(directory):
        print_line("not running")
        return
    record = read_process_record(directory)
    try:
        Client(directory, timeout=min(timeout, 10)).command("stop")
    except StreamlearnError:
        if record is not None and record.is_alive:
            send_signal(directory, record, signal.SIGTERM)
        elif is_locked(directory):  # otherwise the daemon has ended by itself meanwhile
            raise
    deadline, forced = time.monotonic() + timeout, False
    while is_locked(directory):
        if time.monotonic() > deadline:
            if not force or record is None or not record.is_alive:
                raise TemporaryError(f"still running after {timeout:.0f} s; --force kills it")
            send_signal(directory, record, signal.SIGKILL)
            deadline = time.monotonic() + 10
            force, forced = False, True
        time.sleep(0.05)
    if not forced and not ended_cleanly(directory):
        raise InputOutputError("the daemon ended with an error: see its log for the reason and for what was not saved")
    print_line("stopped")


def pause(state: StateOption = None) -> None:
    """Pause learning; metrics, status and checkpoints continue. A restart ends the pause."""
    print_line(Client(find_state_dir(state), timeout=COMMAND_SECONDS).command("pause")["state"])


def resume(state: StateOption = None) -> None:
    """Continue to learn after a pause, or after a burst of rejected samples has stopped the reading."""
    print_line(Client(find_state_dir(state), timeout=COMMAND_SECONDS).command("resume")["state"])


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


def _live_table(desk: Any) -> Any:
    """Return a context that shows the daemon's status as a live table below its log lines."""
    import threading
    from contextlib import contextmanager

    from rich.live import Live

    @contextmanager
    def drawn() -> Any:
        ended = threading.Event()
        with Live(render(desk.status()), refresh_per_second=4) as live:

            def draw() -> None:
                while not ended.wait(0.5):
                    live.update(render(desk.status()))

            thread = threading.Thread(target=draw, name="table", daemon=True)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
                live.update(render(desk.status()))

    return drawn()


def _await_event(reading: int, wanted: set[str], timeout: float) -> dict[str, Any] | None:
    """Return the first wanted event from the child; `ended` if it closes the pipe, or None after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    buffered = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reading], [], [], left)[0]:
            break
        if not (content := os.read(reading, 4096)):
            return {"event": "ended"}
        *lines, buffered = (buffered + content).split(b"\n")
        for line in lines:
            event: dict[str, Any] = json.loads(line)
            if event["event"] in wanted:
                return event
    return None

"""`streamlearn run`, `start`, `stop`, `pause` and `resume`: the life of a daemon."""

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
from typing import Annotated, Any, Literal

import typer

from streamlearn.cli.common import (
    ConfigArgument,
    StateOption,
    find_state_dir,
    load_config,
    print_line,
    to_streamlearn_error,
)
from streamlearn.cli.status import render, status
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
    StreamlearnError,
    TemporaryError,
    error_with_exit_code,
)

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

"""A state directory that another user has prepared, removed or replaced."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from streamlearn.checkpoint.store import Store
from streamlearn.cli import lifecycle
from streamlearn.control.client import Client
from streamlearn.control.statedir import (
    Lock,
    LockLost,
    ProcessRecord,
    is_locked,
    locked,
    open_daemon_log,
    process_start_time,
    read_process_record,
    record_clean_end,
    send_signal,
    write_process_record,
)
from streamlearn.core.errors import StreamlearnError, TemporaryError
from streamlearn.core.states import SaveTrigger
from tests.support.in_process import made

NOBODY = 65534


def open_files() -> list[str]:
    """Return the LOCK files that this process has open."""
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sorted(str(link) for link in links if link.name == "LOCK")


def refusal(state_dir: Path) -> StreamlearnError:
    """Return the error of a daemon that wants to use the directory, or to write its log there."""
    with pytest.raises(StreamlearnError) as caught, locked(state_dir):
        pass
    with pytest.raises(StreamlearnError) as logged:
        os.close(open_daemon_log(state_dir))
    assert str(logged.value) == str(caught.value)
    return caught.value


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner could change the checkpoints: 77, and one line that names both users."""
    if os.geteuid() == 0:
        os.chown(tmp_path, NOBODY, NOBODY)
        known, own = NOBODY, 0
    else:
        known, own = os.geteuid(), os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: own)
    error = refusal(tmp_path)
    assert error.exit_code == 77
    line = str(error)
    assert line.startswith(f"{tmp_path}: belongs to user ")
    assert (str(known) in line, str(own) in line, "\n" in line) == (True, True, False)
    assert not (tmp_path / "LOCK").exists()


def test_a_directory_that_others_may_write_into_is_refused(tmp_path: Path) -> None:
    """Others could put links and checkpoints there: 77, and how to correct it."""
    tmp_path.chmod(0o777)
    error = refusal(tmp_path)
    assert (error.exit_code, str(error)) == (
        77,
        f"{tmp_path}: other users may write there (mode 0777): use chmod go-w, or choose another state_dir",
    )
    tmp_path.chmod(0o700)
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


@pytest.mark.parametrize("name", ["daemon.tmp", "daemon.json", "daemon.log", "LOCK"])
def test_links_are_not_followed(tmp_path: Path, name: str) -> None:
    """If a file of the daemon is a link, its target is neither read nor written."""
    victim = tmp_path / "victim"
    record = {"pid": os.getpid(), "start_time": 1, "socket": "s", "http": "h"}
    victim.write_text(json.dumps(record))
    victim.chmod(0o644)
    state_dir = tmp_path / "state"
    state_dir.mkdir(mode=0o700)
    (state_dir / name).symlink_to(victim)
    assert read_process_record(state_dir) is None
    with suppress(StreamlearnError):  # refused, or the link itself is replaced: both are right
        write_process_record(state_dir / "daemon.json", {"pid": 1})
    with suppress(StreamlearnError):
        os.close(open_daemon_log(state_dir))
    with suppress(StreamlearnError), locked(state_dir):
        pass
    assert (json.loads(victim.read_text()), victim.stat().st_mode & 0o777) == (record, 0o644)


@pytest.mark.parametrize(
    "text",
    ["[]", '"x"', "{", '{"pid": -1, "start_time": 1, "socket": "s", "http": "h"}',
     '{"pid": "1", "start_time": 1, "socket": "", "http": ""}', '{"pid": 999999, "start_time": null, "socket": "", "http": ""}',
     '{"pid": 5, "start_time": 1, "socket": 3, "http": "h"}', "[" * 100_000],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_an_invalid_process_record_is_ignored(tmp_path: Path, text: str) -> None:
    """A pid is never used unless the record is complete."""
    (tmp_path / "daemon.json").write_text(text)
    assert read_process_record(tmp_path) is None


def test_only_a_daemon_gets_a_signal(tmp_path: Path) -> None:
    """`daemon.json` names another process with its true start time: `stop` refuses with 77, and the process lives."""
    (tmp_path / "LOCK").touch()
    with subprocess.Popen(["sleep", "60"]) as innocent:
        start_time = process_start_time(innocent.pid)
        assert start_time is not None
        record = ProcessRecord(innocent.pid, start_time, tmp_path / "none", "")
        with pytest.raises(
            StreamlearnError, match="is not the daemon of this directory, so no signal was sent"
        ) as caught:
            send_signal(tmp_path, record, signal.SIGTERM)
        assert (caught.value.exit_code, innocent.poll()) == (77, None)
        innocent.kill()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.ENOSYS])
def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Its error is not taken for a running daemon: 74 with the system's message, and no descriptor stays open."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for ask in (Lock, is_locked):
        with pytest.raises(StreamlearnError) as caught:
            ask(tmp_path)
        line = f"{tmp_path}/LOCK: cannot be locked: {os.strerror(number)}"
        assert (str(caught.value), caught.value.exit_code) == (line, 74)
    assert open_files() == []


@pytest.mark.parametrize("when", ["asked", "signalled", "unreaped"])
def test_stop_succeeds_if_the_daemon_ends_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    """It ends while `stop` sends the command, or before the signal."""
    lock = Lock(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as process:
        start_time = process_start_time(process.pid)
        tree = {"pid": process.pid, "start_time": start_time, "socket": "s", "http": "h"}
        write_process_record(tmp_path / "daemon.json", tree)

        def end(*_: object) -> Any:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            if when != "unreaped":
                process.wait()
            record_clean_end(tmp_path)
            lock.close()
            raise TemporaryError("the daemon does not answer")

        monkeypatch.setattr(Client, "command", end)
        if when == "signalled":
            monkeypatch.setattr(ProcessRecord, "is_alive", True)
        lifecycle.stop(tmp_path, timeout=10)
    assert capsys.readouterr().out == "stopped\n"


@pytest.mark.parametrize(("how", "code"), [("removed", 74), ("replaced", 73)])
def test_nothing_is_saved_after_the_lock_is_lost(tmp_path: Path, how: str, code: int) -> None:
    """After `rm -rf` another daemon may use a new directory: the first one ends at its next save."""
    job, stream = made(tmp_path / "other")
    state_dir = tmp_path / "state"
    with locked(state_dir) as lock:
        job.checkpointer.store = Store(state_dir, before_write=lock.check)
        job.save(stream, SaveTrigger.MANUAL)
        job.checkpointer.wait(stream)
        assert len(job.store.all()) == 1
        shutil.rmtree(state_dir)
        second = Lock(state_dir) if how == "replaced" else None
        job.save(stream, SaveTrigger.MANUAL)
        with pytest.raises(LockLost, match=how) as caught:
            job.checkpointer.wait(stream)
        assert caught.value.exit_code == code
        assert not (state_dir / "checkpoints").exists()
        if second is not None:
            second.close()

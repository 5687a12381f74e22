"""The state directory: whose it is, which process holds it, and what that process says of itself.

Everything here is written for a directory that somebody else may have prepared: no link is followed, what is read is
small, and what it says is checked before anything is done to a process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import signal
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamlearn.checkpoint import LockLost, read_plain_file
from streamlearn.data import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = "LOCK"
PROCESS_FILE = "daemon.json"
LOCK_SECONDS = 0.5  # a `status` holds the lock for a moment, to see whether it is held
MAX_PROCESS_FILE_BYTES = 64 << 10


@dataclass(frozen=True)
class ProcessRecord:
    """What `daemon.json` says of the process that holds a state directory; true only while its lock is held."""

    pid: int
    start_time: int
    socket: Path
    http: str

    @property
    def is_alive(self) -> bool:
        """Whether the process is still that one, and no other that got its number."""
        return process_start_time(self.pid) == self.start_time


class Lock:
    """Holds a state directory until it is closed. Only the process that holds the lock writes there."""

    def __init__(self, state_dir: Path) -> None:
        """Take the lock; raises `StreamlearnError`: 73 where another process has it, 77 where others may write there."""
        self.path = state_dir / LOCK
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            prepare_state_dir(state_dir)
            try:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise StreamlearnError.from_os_error(error) from error
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.check()
            except (BlockingIOError, LockLost) as error:  # the second where it was removed between the two lines before
                os.close(self._descriptor)
                if time.monotonic() > deadline:
                    raise already_running(state_dir) from error
                time.sleep(0.05)
            except OSError as error:  # such as ENOLCK of a network file system
                os.close(self._descriptor)
                raise _cannot_be_locked(self.path, error) from error
            except StreamlearnError:
                os.close(self._descriptor)
                raise
            else:
                return

    def check(self) -> None:
        """Raise `LockLost` where the file that is locked is not the directory's `LOCK` any more: anybody may have it."""
        try:
            found = self.path.lstat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise LockLost(
                f"{self.path}: was removed while the daemon ran, so another one may write there: nothing more is saved",
                code=74,
            ) from error
        except OSError as error:
            raise StreamlearnError.from_os_error(error, self.path) from error
        ours = os.fstat(self._descriptor)
        if (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino):
            raise LockLost(
                f"{self.path}: was replaced while the daemon ran, and another one may hold it: nothing more is saved",
                code=73,
            )

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._descriptor)


@contextmanager
def locked(state_dir: Path) -> Iterator[Lock]:
    """Hold a state directory for as long as the context lasts; raises what `Lock` does."""
    lock = Lock(state_dir)
    try:
        yield lock
    finally:
        lock.close()


def prepare_state_dir(state_dir: Path) -> None:
    """Make a state directory where there is none; refuse (77) one where another user can put files."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = state_dir.stat()
    except OSError as error:
        raise StreamlearnError.from_os_error(error) from error
    if found.st_uid not in {os.geteuid(), 0}:
        raise StreamlearnError(
            f"{state_dir}: belongs to user {_user(found.st_uid)}, and this is user {_user(os.geteuid())}: run it as that "
            "user, or give it a state directory of its own",
            code=77,
        )
    strange_group = found.st_gid not in {os.getegid(), *os.getgroups()}
    if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and strange_group):
        mode = stat.S_IMODE(found.st_mode)
        raise StreamlearnError(
            f"{state_dir}: other users may write there (mode {mode:04o}): use chmod go-w, or another directory", code=77
        )


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:  # as in a container
        return str(uid)


def open_daemon_log(state_dir: Path) -> int:
    """Return a descriptor of `daemon.log`, at its end; raises `StreamlearnError`."""
    prepare_state_dir(state_dir)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    try:
        return os.open(state_dir / "daemon.log", flags, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StreamlearnError(f"{state_dir / 'daemon.log'}: is a link, which is not followed", code=77) from error
        raise StreamlearnError.from_os_error(error) from error


def process_start_time(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot, or None when there is no such process, or it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in {"Z", "X"} else int(rest[18])
    except (OSError, IndexError, ValueError):
        return None


def read_process_record(state_dir: Path) -> ProcessRecord | None:
    """Return the hints in a state directory, or None where there are none that make sense."""
    tree = _read(state_dir / PROCESS_FILE)
    pid, start_time = tree.get("pid"), tree.get("start_time")
    socket, http = tree.get("socket"), tree.get("http")
    if not (isinstance(pid, int) and pid > 1 and isinstance(start_time, int)):
        return None
    if not (isinstance(socket, str) and isinstance(http, str)):
        return None
    return ProcessRecord(pid, start_time, Path(socket), http)


def ended_cleanly(state_dir: Path) -> bool:
    """Tell whether the last daemon of a state directory noted that it ended as it should, everything saved."""
    return "ended" in _read(state_dir / PROCESS_FILE)


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file, empty where it is none. A link, a pipe or a long file is none."""
    try:
        tree = json.loads(read_plain_file(path, MAX_PROCESS_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def write_process_record(path: Path, tree: dict[str, Any]) -> None:
    """Write a small JSON file so that a reader sees the old or the new one; raises `StreamlearnError` (74 or 77)."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(tree))
        temporary.replace(path)
    except OSError as error:
        raise StreamlearnError.from_os_error(error, path) from error


def record_process(state_dir: Path, tree: dict[str, Any]) -> str:
    """Write down who holds the state directory; return how its last holder ended: first, clean or crash."""
    before = _read(state_dir / PROCESS_FILE)
    process = {"pid": os.getpid(), "start_time": process_start_time(os.getpid())}
    write_process_record(state_dir / PROCESS_FILE, {**process, **tree})
    return "first" if not before else "clean" if "ended" in before else "crash"


def record_clean_end(state_dir: Path) -> None:
    """Note that this process ended as it should; raises `StreamlearnError` where that cannot be written."""
    write_process_record(state_dir / PROCESS_FILE, {**_read(state_dir / PROCESS_FILE), "ended": time.time()})


def is_locked(state_dir: Path) -> bool:
    """Tell whether a daemon holds the state directory; raises `StreamlearnError` (77) where that may not be asked."""
    try:
        descriptor = os.open(state_dir / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StreamlearnError.from_os_error(error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        raise _cannot_be_locked(state_dir / LOCK, error) from error
    else:
        return False
    finally:
        os.close(descriptor)


def _cannot_be_locked(path: Path, error: OSError) -> StreamlearnError:
    """Return the refusal (74) of a file system that has no locks, which does not say that another daemon runs."""
    return StreamlearnError(f"{path}: cannot be locked: {error.strerror or error}", code=74)


def already_running(state_dir: Path) -> StreamlearnError:
    """Return the refusal (73) of a second daemon, which names the first where that is known."""
    hints = read_process_record(state_dir)
    who = f"process {hints.pid}" if hints is not None and hints.is_alive else "its LOCK is held"
    return StreamlearnError(f"{state_dir}: another daemon runs here ({who})", code=73)


def send_signal(state_dir: Path, hints: ProcessRecord, number: signal.Signals) -> None:
    """Send a signal to the daemon that hints name, if it still runs; raises `StreamlearnError` (77) for another process.

    Whoever can write into the directory can name any process. So it must belong to the owner of `LOCK` and be a
    `streamlearn run`, and a process file descriptor makes sure that the checked process is the one that gets the signal.
    """
    try:
        descriptor = os.pidfd_open(hints.pid)
    except ProcessLookupError:
        return
    except OSError as error:
        raise StreamlearnError(f"process {hints.pid}: {error.strerror}", code=75) from error
    try:
        process = Path(f"/proc/{hints.pid}")
        words = [os.fsdecode(word) for word in (process / "cmdline").read_bytes().split(b"\0")]
        is_daemon = "run" in words and "streamlearn" in {Path(word).name for word in words}
        owned = process.stat().st_uid == (state_dir / LOCK).lstat().st_uid
        if not hints.is_alive:
            return
        if not (is_daemon and owned):
            raise StreamlearnError(
                f"{state_dir / PROCESS_FILE}: names process {hints.pid}, which is no daemon of this directory: "
                "it gets no signal",
                code=77,
            )
        signal.pidfd_send_signal(descriptor, number)
    except (ProcessLookupError, FileNotFoundError):  # it ended in between, or its state directory was removed
        return
    except OSError as error:
        raise StreamlearnError(f"process {hints.pid}: {error.strerror}", code=75) from error
    finally:
        os.close(descriptor)

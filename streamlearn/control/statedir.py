"""The state directory: its owner, its lock, and the record of the process that holds the lock.

Another user may have prepared the directory as an attack. So links are not followed, only small files are read, and the
record of a process is checked before that process gets a signal.
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

from streamlearn.core.errors import AccessError, AlreadyRunningError, InputOutputError, StreamlearnError, TemporaryError
from streamlearn.core.files import read_plain_file

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = "LOCK"
PROCESS_FILE = "daemon.json"
LOCK_SECONDS = 0.5  # retry so long, because `status` takes the lock for a moment to test it
MAX_PROCESS_FILE_BYTES = 64 << 10


class LockLost(StreamlearnError):  # noqa: N818 - the name says what happened
    """This process no longer holds the lock of the state directory: it may not write there, and the daemon ends."""


class LockRemoved(LockLost, InputOutputError):  # noqa: N818 - as `LockLost`
    """The file of the lock is no longer there."""


class LockReplaced(LockLost, AlreadyRunningError):  # noqa: N818 - as `LockLost`
    """The file of the lock is another one, which another daemon may hold."""


@dataclass(frozen=True)
class ProcessRecord:
    """The content of `daemon.json`: the process that holds the state directory. Only valid while the lock is held."""

    pid: int
    start_time: int
    socket: Path
    http: str

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs, and its pid was not reused."""
        return process_start_time(self.pid) == self.start_time


class Lock:
    """The lock of a state directory. Only the process that holds it writes there."""

    def __init__(self, state_dir: Path) -> None:
        """Take the lock.

        Raises `AlreadyRunningError` if another process has it, `InputOutputError` if the file system has no locks,
        `AccessError` if other users may write into the directory.
        """
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
            except (BlockingIOError, LockLost) as error:  # LockLost: LOCK was removed between the two lines above
                os.close(self._descriptor)
                if time.monotonic() > deadline:
                    raise already_running(state_dir) from error
                time.sleep(0.05)
            except OSError as error:  # for example ENOLCK of a network file system
                os.close(self._descriptor)
                raise _cannot_be_locked(self.path, error) from error
            except StreamlearnError:
                os.close(self._descriptor)
                raise
            else:
                return

    def check(self) -> None:
        """Raise `LockLost` if the locked file is no longer `LOCK` in the directory: another process may hold the new one."""
        try:
            found = self.path.lstat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise LockRemoved(
                f"{self.path}: was removed while the daemon ran; nothing more is saved, because another one may write there"
            ) from error
        except OSError as error:
            raise StreamlearnError.from_os_error(error, self.path) from error
        ours = os.fstat(self._descriptor)
        if (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino):
            raise LockReplaced(
                f"{self.path}: was replaced while the daemon ran; nothing more is saved, because another one may hold it"
            )

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


@contextmanager
def locked(state_dir: Path) -> Iterator[Lock]:
    """Hold the lock of a state directory during the context; raises as `Lock` does."""
    lock = Lock(state_dir)
    try:
        yield lock
    finally:
        lock.close()


def prepare_state_dir(state_dir: Path) -> None:
    """Create the state directory if it is missing; raises `AccessError` if another user may write into it."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = state_dir.stat()
    except OSError as error:
        raise StreamlearnError.from_os_error(error) from error
    if found.st_uid not in {os.geteuid(), 0}:
        raise AccessError(
            f"{state_dir}: belongs to user {_user(found.st_uid)}, and this is user {_user(os.geteuid())}: run as that user, "
            "or choose another state_dir",
        )
    foreign_group = found.st_gid not in {os.getegid(), *os.getgroups()}
    if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and foreign_group):
        mode = stat.S_IMODE(found.st_mode)
        raise AccessError(
            f"{state_dir}: other users may write there (mode {mode:04o}): use chmod go-w, or choose another state_dir",
        )


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:  # a user without a name, as in containers
        return str(uid)


def open_daemon_log(state_dir: Path) -> int:
    """Return a descriptor that appends to `daemon.log`; raises `StreamlearnError`."""
    prepare_state_dir(state_dir)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    try:
        return os.open(state_dir / "daemon.log", flags, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise AccessError(f"{state_dir / 'daemon.log'}: is a link, and links are not followed") from error
        raise StreamlearnError.from_os_error(error) from error


def process_start_time(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None if there is no such process or it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in {"Z", "X"} else int(rest[18])
    except (OSError, IndexError, ValueError):
        return None


def read_process_record(state_dir: Path) -> ProcessRecord | None:
    """Return the process record of a state directory, or None if it is missing or not valid."""
    tree = _read(state_dir / PROCESS_FILE)
    pid, start_time = tree.get("pid"), tree.get("start_time")
    socket, http = tree.get("socket"), tree.get("http")
    if not (isinstance(pid, int) and pid > 1 and isinstance(start_time, int)):
        return None
    if not (isinstance(socket, str) and isinstance(http, str)):
        return None
    return ProcessRecord(pid, start_time, Path(socket), http)


def ended_cleanly(state_dir: Path) -> bool:
    """Return whether the last daemon recorded that it saved everything and ended cleanly."""
    return "ended" in _read(state_dir / PROCESS_FILE)


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file; an empty one if the file is missing, too large, a link or not valid."""
    try:
        tree = json.loads(read_plain_file(path, MAX_PROCESS_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def write_process_record(path: Path, tree: dict[str, Any]) -> None:
    """Replace a small JSON file atomically: a reader sees the old or the new one.

    Raises `InputOutputError`, or `AccessError` if a permission is missing.
    """
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
    """Record this process as the holder of the state directory; return how the last one ended: first, clean or crash."""
    before = _read(state_dir / PROCESS_FILE)
    process = {"pid": os.getpid(), "start_time": process_start_time(os.getpid())}
    write_process_record(state_dir / PROCESS_FILE, {**process, **tree})
    return "first" if not before else "clean" if "ended" in before else "crash"


def record_clean_end(state_dir: Path) -> None:
    """Record that this process ended cleanly; raises `StreamlearnError`."""
    write_process_record(state_dir / PROCESS_FILE, {**_read(state_dir / PROCESS_FILE), "ended": time.time()})


def is_locked(state_dir: Path) -> bool:
    """Return whether a daemon holds the lock; raises `InputOutputError` or `AccessError` if the lock cannot be tested."""
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


def _cannot_be_locked(path: Path, error: OSError) -> InputOutputError:
    """Return the error for a file system without locks. It does not mean that another daemon runs."""
    return InputOutputError(f"{path}: cannot be locked: {error.strerror or error}")


def already_running(state_dir: Path) -> AlreadyRunningError:
    """Return the error for a second daemon; it names the first process if that is known."""
    record = read_process_record(state_dir)
    who = f"process {record.pid}" if record is not None and record.is_alive else "its LOCK is held"
    return AlreadyRunningError(f"{state_dir}: another daemon already runs here ({who})")


def send_signal(state_dir: Path, record: ProcessRecord, number: signal.Signals) -> None:
    """Send a signal to the recorded daemon, if it still runs. Raises `AccessError` if it is another process.

    Whoever can write into the directory can record any process. So the process must belong to the owner of `LOCK` and run
    `streamlearn run`. A process file descriptor ensures that the checked process is the one that gets the signal.
    """
    try:
        descriptor = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    except OSError as error:
        raise TemporaryError(f"process {record.pid}: {error.strerror}") from error
    try:
        process = Path(f"/proc/{record.pid}")
        words = [os.fsdecode(word) for word in (process / "cmdline").read_bytes().split(b"\0")]
        is_daemon = "run" in words and "streamlearn" in {Path(word).name for word in words}
        owned = process.stat().st_uid == (state_dir / LOCK).lstat().st_uid
        if not record.is_alive:
            return
        if not (is_daemon and owned):
            raise AccessError(
                f"{state_dir / PROCESS_FILE}: names process {record.pid}, which is not the daemon of this directory, so no "
                "signal was sent",
            )
        signal.pidfd_send_signal(descriptor, number)
    except (ProcessLookupError, FileNotFoundError):  # the process ended meanwhile, or its state directory was removed
        return
    except OSError as error:
        raise TemporaryError(f"process {record.pid}: {error.strerror}") from error
    finally:
        os.close(descriptor)

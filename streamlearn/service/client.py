"""The CLI's side of the control socket: HTTP by the standard library, because `status` must answer at once."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamlearn.data import StreamlearnError


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


@dataclass(frozen=True)
class Hints:
    """What `daemon.json` says of the process that holds a state directory; true only while its lock is held."""

    pid: int
    start_time: int
    socket: Path
    http: str

    @property
    def is_alive(self) -> bool:
        """Whether the process is still that one, and no other that got its number."""
        return process_start_time(self.pid) == self.start_time


def process_start_time(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot, or None when there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def read_hints(state_dir: Path) -> Hints | None:
    """Return the hints in a state directory, or None where there are none."""
    try:
        tree = json.loads((state_dir / "daemon.json").read_text())
        return Hints(tree["pid"], tree["start_time"], Path(tree["socket"]), tree["http"])
    except (OSError, ValueError, KeyError):
        return None


def ended_well(state_dir: Path) -> bool:
    """Tell whether the last daemon of a state directory noted that it ended as it should, everything saved."""
    try:
        return "ended" in json.loads((state_dir / "daemon.json").read_text())
    except (OSError, ValueError):
        return False


def is_locked(state_dir: Path) -> bool:
    """Tell whether a daemon holds the state directory; raises `StreamlearnError` (77) where that may not be asked."""
    try:
        descriptor = os.open(state_dir / "LOCK", os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StreamlearnError.of_system(error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def held(state_dir: Path) -> StreamlearnError:
    """Return the refusal (73) of a second daemon, which names the first where that is known."""
    hints = read_hints(state_dir)
    who = f"process {hints.pid}" if hints is not None and hints.is_alive else "its LOCK is held"
    return StreamlearnError(f"{state_dir}: another daemon runs here ({who})", code=73)


class Client:
    """Requests to the daemon of one state directory."""

    def __init__(self, state_dir: Path, timeout: float = 10.0) -> None:
        self.state_dir = state_dir
        self.timeout = timeout

    def get(self, path: str) -> Any:
        """Return the JSON answer to a GET, whatever its status; raises `StreamlearnError` (75) where nothing answers."""
        return self._ask("GET", path, None)[1]

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Have the daemon do something, and return its answer; raises `StreamlearnError` where it refuses."""
        status, answer = self._ask("POST", f"/v1/{name}", arguments)
        if status != http.HTTPStatus.OK:
            raise StreamlearnError(answer.get("error", f"HTTP {status}"), code=answer.get("code", 1))
        found: dict[str, Any] = answer
        return found

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if not is_locked(self.state_dir):
            raise StreamlearnError(f"{self.state_dir}: not running", code=3)
        hints = read_hints(self.state_dir)
        if hints is None:
            raise StreamlearnError(f"{self.state_dir}: the daemon is only starting", code=75)
        connection = _UnixConnection(hints.socket, self.timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except PermissionError as error:
            raise StreamlearnError(f"{hints.socket}: belongs to another user", code=77) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise StreamlearnError(f"{hints.socket}: the daemon does not answer: {error}", code=75) from error
        finally:
            connection.close()

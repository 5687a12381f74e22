"""The CLI's side of the control socket: HTTP by the standard library, because `status` must answer at once."""

from __future__ import annotations

import http.client
import json
import socket
from typing import TYPE_CHECKING, Any

from streamlearn.data import StreamlearnError
from streamlearn.service.statedir import is_locked, read_process_record

if TYPE_CHECKING:
    from pathlib import Path


COMMAND_SECONDS = 610.0  # a command waits until the loop has applied it; the daemon gives up after 600, and says so


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


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
        hints = read_process_record(self.state_dir)
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

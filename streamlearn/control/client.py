"""The CLI's client of the control socket. It uses the standard library, whose quick import keeps `status` fast."""

from __future__ import annotations

import http.client
import json
import socket
from typing import TYPE_CHECKING, Any

from streamlearn.control.statedir import is_locked, read_process_record
from streamlearn.core.errors import AccessError, NotRunningError, TemporaryError, error_with_exit_code

if TYPE_CHECKING:
    from pathlib import Path


COMMAND_SECONDS = 610.0  # a command's answer comes when it is done; the daemon answers with an error after 600 s


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Client:
    """Sends requests to the daemon of one state directory."""

    def __init__(self, state_dir: Path, timeout: float = 10.0) -> None:
        self.state_dir = state_dir
        self.timeout = timeout

    def get(self, path: str) -> Any:
        """Return the JSON answer to a GET request, whatever its HTTP status.

        Raises `NotRunningError`, `TemporaryError` if the daemon does not answer, `AccessError` if it belongs to another user.
        """
        return self._ask("GET", path, None)[1]

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer; raises `StreamlearnError` as `get` does, or if the daemon refuses it."""
        status, answer = self._ask("POST", f"/v1/{name}", arguments)
        if status != http.HTTPStatus.OK:
            raise error_with_exit_code(answer.get("code", 1), answer.get("error", f"HTTP {status}"))
        found: dict[str, Any] = answer
        return found

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if not is_locked(self.state_dir):
            raise NotRunningError(f"{self.state_dir}: not running")
        record = read_process_record(self.state_dir)
        if record is None:
            raise TemporaryError(f"{self.state_dir}: the daemon is still starting")
        connection = _UnixConnection(record.socket, self.timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except PermissionError as error:
            raise AccessError(f"{record.socket}: belongs to another user") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TemporaryError(f"{record.socket}: the daemon does not answer: {error}") from error
        finally:
            connection.close()

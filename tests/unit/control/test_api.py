"""The control socket: invalid, too long and interrupted requests."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from streamlearn.cli.status import read_status
from streamlearn.control.api import MAX_BODY_BYTES, Backend, control_app
from streamlearn.control.client import _UnixConnection
from streamlearn.control.server import Server, bind_control
from streamlearn.control.statedir import locked, record_process
from streamlearn.core.errors import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BODIES = [b"[1]", b"5", b"null", b"\xff\xfe{", b"{", b"[" * 100_000]


class Unused:
    """A backend that must not get a command."""

    def command(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Fail."""
        raise AssertionError((name, arguments))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a control socket; give its path."""
    listener, path = bind_control(tmp_path_factory.mktemp("state"))
    server = Server(control_app(cast("Backend", Unused())), listener, "control")
    server.start()
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                break
        time.sleep(0.01)
    yield path
    server.stop()


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:8]))
def test_an_invalid_body_is_400(path: Path, body: bytes) -> None:
    """For any bytes the answer is one line, and the daemon does not get the command."""
    connection = _UnixConnection(path, 10)
    connection.request("POST", "/v1/pause", body)
    answer = connection.getresponse()
    assert answer.status == 400
    assert json.loads(answer.read())["error"].startswith(("not JSON: ", "expected an object, got "))
    connection.close()


def test_a_client_that_disconnects_is_not_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client that disconnects within its request causes no traceback in the log."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"POST /v1/pause HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.1)  # until the route waits for the rest
    connection = _UnixConnection(path, 10)
    connection.request("POST", "/v1/nothing")
    assert connection.getresponse().status == 404  # so the one before it was dealt with
    connection.close()
    assert "Traceback" not in caplog.text


def test_a_body_that_is_too_long_is_refused_early(path: Path) -> None:
    """The answer comes at the limit, although the client goes on sending."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(b"POST /v1/pause HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"%x\r\n" % MAX_BODY_BYTES + b"x" * MAX_BODY_BYTES + b"\r\n1\r\nx\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_control_socket_on_a_file_system_without_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is created in the runtime directory; any other error is raised."""
    bind, code = socket.socket.bind, errno.EPERM

    def refuse(listener: socket.socket, address: str) -> None:
        if address.startswith(str(tmp_path / "state")):
            raise OSError(code, os.strerror(code))
        bind(listener, address)

    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    listener, path = bind_control(tmp_path / "state")
    listener.close()
    assert path.parent == tmp_path / f"streamlearn-{os.getuid()}"
    assert path.stat().st_mode & 0o777 == 0o600
    code = errno.ENOSPC
    with pytest.raises(StreamlearnError, match="No space left"):
        bind_control(tmp_path / "state")


class Large:
    """A backend with so many tasks that its status omits the matrix."""

    def status(self) -> dict[str, Any]:
        """Return what `status` needs."""
        return {"name": "job", "pid": os.getpid(), "tasks": [{}], "matrix": None}

    def matrix(self) -> list[list[float | None]]:
        """Return a matrix."""
        return [[0.5, None], [0.25, 1.0]]


def test_a_large_matrix_has_its_own_request(tmp_path: Path) -> None:
    """`/status` omits it, `/matrix` has it, and `status --json` prints both."""
    with locked(tmp_path):
        listener, path = bind_control(tmp_path)
        record_process(tmp_path, {"socket": str(path), "http": ""})
        server = Server(control_app(cast("Backend", Large())), listener, "control")
        server.start()
        try:
            assert read_status(tmp_path)["matrix"] is None
            assert read_status(tmp_path, matrix=True)["matrix"] == [[0.5, None], [0.25, 1.0]]
        finally:
            server.stop()

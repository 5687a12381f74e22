"""The control socket, asked by what no client of ours would send."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from streamlearn.cli.lifecycle import read_status
from streamlearn.data import StreamlearnError
from streamlearn.service.api import MAX_BODY_BYTES, Backend, control_app
from streamlearn.service.client import _UnixConnection
from streamlearn.service.server import Server, bind_control
from streamlearn.service.statedir import locked, record_process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BODIES = [b"[1]", b"5", b"null", b"\xff\xfe{", b"{", b"[" * 100_000]


class Nobody:
    """A daemon that must not be asked."""

    def command(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Do nothing."""
        raise AssertionError((name, arguments))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a control socket that is listened to."""
    listener, path = bind_control(tmp_path_factory.mktemp("state"))
    server = Server(control_app(cast("Backend", Nobody())), listener, "control")
    server.start()
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                break
        time.sleep(0.01)
    yield path
    server.stop()


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:8]))
def test_a_body_that_is_no_object_is_400(path: Path, body: bytes) -> None:
    """Whatever bytes arrive, the answer is one line, and the daemon is not asked."""
    connection = _UnixConnection(path, 10)
    connection.request("POST", "/v1/pause", body)
    answer = connection.getresponse()
    assert answer.status == 400
    assert json.loads(answer.read())["error"].startswith(("not JSON: ", "expected an object, got "))
    connection.close()


def test_who_leaves_in_mid_request_leaves_no_trace(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client that ends before its body does is no fault of ours, and so no traceback in the log."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"POST /v1/pause HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.1)  # until the route waits for the rest
    connection = _UnixConnection(path, 10)
    connection.request("POST", "/v1/nothing")
    assert connection.getresponse().status == 404  # so the one before it was dealt with
    connection.close()
    assert "Traceback" not in caplog.text


def test_a_body_that_is_too_long_is_refused_while_it_comes(path: Path) -> None:
    """Of a body without an end no more is read than may be: the answer comes though the body goes on."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(b"POST /v1/pause HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"%x\r\n" % MAX_BODY_BYTES + b"x" * MAX_BODY_BYTES + b"\r\n1\r\nx\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_control_socket_lies_elsewhere_where_the_file_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without sockets it lies in the runtime directory; any other refusal is an error."""
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
    """A daemon of so many tasks that its status leaves the matrix out."""

    def status(self) -> dict[str, Any]:
        """Return what `status` needs."""
        return {"name": "job", "pid": os.getpid(), "tasks": [{}], "matrix": None}

    def matrix(self) -> list[list[float | None]]:
        """Return a matrix."""
        return [[0.5, None], [0.25, 1.0]]


def test_a_large_matrix_is_asked_for_by_itself(tmp_path: Path) -> None:
    """`/status` is small, `/matrix` has the matrix, and what `status --json` prints has both."""
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

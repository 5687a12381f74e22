"""The listeners: what the TCP port refuses, and its limits."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
import pytest

from streamlearn.control import server
from streamlearn.control.api import COMMANDS, read_only_app
from streamlearn.control.server import MAX_CONNECTIONS, Server, bind_tcp
from streamlearn.metrics import Metrics
from streamlearn.runtime.control_desk import ControlDesk
from tests.support.in_process import made

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Server]:
    """Give a read-only listener."""
    job, _ = made(tmp_path)
    http = Server(read_only_app(ControlDesk(job.config, Metrics())), bind_tcp("127.0.0.1", 0), "http")
    http.start()
    yield http
    http.stop()


@pytest.fixture
def address(http: Server) -> str:
    """Give its address."""
    return f"http://127.0.0.1:{http.listener.getsockname()[1]}"


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/status"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_the_tcp_port_is_read_only(address: str, method: str, path: str) -> None:
    """Every method that could change something is refused."""
    assert httpx.request(method, address + path).status_code == 405


@pytest.mark.parametrize("name", COMMANDS)
def test_the_tcp_port_has_no_commands(address: str, name: str) -> None:
    """Only the owner's Unix socket has them."""
    assert httpx.post(f"{address}/v1/{name}").status_code == 404


def test_huge_headers_are_refused(address: str) -> None:
    """Headers above the limit end the connection, and the next request is answered."""
    with pytest.raises((httpx.HTTPError, AssertionError)):
        assert httpx.get(address + "/healthz", headers={"x": "y" * (1 << 20)}).status_code == 200
    assert httpx.get(address + "/healthz").status_code == 200


def connected(address: str, sent: bytes = b"") -> socket.socket:
    """Return a connection that has sent so much of a request."""
    url = httpx.URL(address)
    client = socket.create_connection((url.host, url.port or 0), timeout=30)
    client.sendall(sent)
    return client


@pytest.mark.parametrize("sent", [b"", b"GET /status HTTP/1.1\r\nHost: a\r\nX"], ids=["idle", "half"])
def test_idle_connections_do_not_block_the_listener(address: str, sent: bytes) -> None:
    """With three times the limit, the oldest are closed, and health checks and metrics are always answered."""
    clients = []
    for number in range(3 * MAX_CONNECTIONS):
        clients.append(connected(address, sent))
        if number % 16 == 15:
            assert httpx.get(f"{address}/healthz", timeout=30).status_code == 200
            assert httpx.get(f"{address}/metrics", timeout=30).status_code == 200
    assert is_closed(clients[0])
    for client in clients:
        client.close()


def is_closed(client: socket.socket) -> bool:
    """Wait until the server closes a connection; return whether it sent nothing."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_request_that_is_never_complete_is_closed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is for the whole request, even if every byte arrives in time."""
    monkeypatch.setattr(server, "TIMEOUT_SECONDS", 0.5)
    client = connected(address, b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: ")
    sent = 0
    with suppress(BrokenPipeError, ConnectionResetError):
        while sent < 600:
            client.sendall(b"a")
            sent += 1
            time.sleep(0.05)
    assert sent < 600


def test_an_answer_that_is_not_read_is_closed(http: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a request and does not read the answer is disconnected after a time limit."""
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(ControlDesk, "status", lambda _: {"long": "x" * (64 << 20)})
    with connected(address, b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        state = http._server.server_state
        while state.total_requests == 0 or state.connections:
            time.sleep(0.01)
        taken = 0
        with suppress(ConnectionResetError):
            while content := client.recv(1 << 20):
                taken += len(content)
    assert taken < 64 << 20

"""The listeners: what the one on the network refuses, whoever asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from streamlearn.daemon import Desk
from streamlearn.metrics import Metrics
from streamlearn.service.api import COMMANDS, read_only
from streamlearn.service.server import Server, bind_tcp
from tests.unit.test_job import made

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Give the address of a read-only listener."""
    job, _ = made(tmp_path)
    listener = bind_tcp("127.0.0.1", 0)
    server = Server(read_only(Desk(job.config, Metrics())), listener, "http")
    server.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.stop()


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/status"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_the_network_can_only_read(address: str, method: str, path: str) -> None:
    """No verb that changes something is known."""
    assert httpx.request(method, address + path).status_code == 405


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_not_on_the_network(address: str, name: str) -> None:
    """What the owner's socket does, nobody else can ask for."""
    assert httpx.post(f"{address}/v1/{name}").status_code == 404


def test_a_huge_request_is_refused(address: str) -> None:
    """Headers past their bound end the connection, and the next request is answered."""
    with pytest.raises((httpx.HTTPError, AssertionError)):
        assert httpx.get(address + "/healthz", headers={"x": "y" * (1 << 20)}).status_code == 200
    assert httpx.get(address + "/healthz").status_code == 200

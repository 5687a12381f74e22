"""Tokens by client credentials, from a real HTTP server."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.config import SaslConfig
from streamlearn.data import StreamlearnError
from streamlearn.stream import oauth
from streamlearn.stream.log import BrokerUnavailable
from tests.support.token_server import TokenServer

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "s3cr3t-canary"


def provider(url: str, **over: Any) -> oauth.ClientCredentials:
    """Return a provider with a cache of its own."""
    base = {"mechanism": "OAUTHBEARER", "token_url": url, "client_id": "trainer", "client_secret": SECRET}
    return oauth.ClientCredentials(SaslConfig.model_validate({**base, **over}))


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give the provider's clock."""
    made = Clock()
    monkeypatch.setattr(oauth, "time", made)
    return made


def test_a_token_is_asked_for_once_and_used_by_every_connection() -> None:
    """Many threads that connect at once ask the server once, with the scope."""
    with TokenServer("trainer", SECRET) as server:
        source = provider(server.url, scope="kafka.read kafka.write")
        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.append(source.token())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.asked == [{"grant_type": ["client_credentials"], "scope": ["kafka.read kafka.write"]}]
        assert found == server.given * 8


def test_a_token_is_renewed_at_four_fifths_of_its_lifetime(clock: Clock) -> None:
    """Not before, and not after it has run out."""
    with TokenServer("trainer", SECRET, lifetime=100) as server:
        source = provider(server.url)
        first = source.token()
        clock.now += 79
        assert source.token() == first
        clock.now += 2
        assert source.token() == server.given[1]


def test_a_lifetime_beyond_all_floats_is_long(clock: Clock) -> None:
    """JSON has integers of any size."""
    with TokenServer("trainer", SECRET, expires_in=10**400) as server:
        source = provider(server.url)
        first = source.token()
        clock.now += 1e8
        assert source.token() == first


def test_a_valid_token_outlives_a_server_that_is_down(clock: Clock) -> None:
    """While the token is valid it is used; after that the outage is told, as one to wait for."""
    with TokenServer("trainer", SECRET, lifetime=100) as server:
        source = provider(server.url)
        first = source.token()
        server.status = 503
        clock.now += 90
        assert source.token() == first
        clock.now += 20
        with pytest.raises(BrokerUnavailable, match=r"/token: no token: the server answers 503$"):
            source.token()
        server.status = 200
        assert source.token() == server.given[-1]


def test_a_server_that_is_not_there_is_waited_for() -> None:
    """Nobody who listens is an outage."""
    with TokenServer("trainer", SECRET) as server:
        url = server.url
    with pytest.raises(BrokerUnavailable, match=r"no token: ConnectError: .*refused"):
        provider(url).token()


def test_a_wrong_secret_is_refused_at_once_and_told_without_it() -> None:
    """The answer's own code is told, and nothing else of it: a server may repeat what it was sent."""
    with TokenServer("trainer", "another") as server:
        with pytest.raises(StreamlearnError) as caught:
            provider(server.url).token()
        told = f"{server.url}: no token for client trainer, scope None: refused with 401 (invalid_client)"
        assert (caught.value.code, str(caught.value)) == (77, told)


ANSWERS: list[tuple[dict[str, Any], str]] = [
    ({"access_token": None}, "has no valid access_token"),
    ({"access_token": "two\x01words"}, "has no valid access_token"),
    ({"expires_in": "soon"}, "expires_in is 'soon'"),
    ({"expires_in": 0}, "expires_in is 0"),
    ({"expires_in": float("nan")}, "expires_in is nan"),
]


@pytest.mark.parametrize(("answer", "told"), ANSWERS, ids=[told for _, told in ANSWERS])
def test_an_answer_that_is_none_is_refused(answer: dict[str, Any], told: str) -> None:
    """What is not a token, or has no end, goes to no broker."""
    with TokenServer("trainer", SECRET, **answer) as server, pytest.raises(StreamlearnError, match=told) as caught:
        provider(server.url).token()
    assert caught.value.code == 77


def test_the_secret_may_come_from_a_file_that_is_read_at_every_renewal(tmp_path: Path, clock: Clock) -> None:
    """A secret that was rotated needs no restart."""
    path = tmp_path / "secret"
    path.write_text("old\n")
    with TokenServer("trainer", "old") as server:
        source = provider(server.url, client_secret=None, client_secret_file=path)
        source.token()
        server.secret = "new"
        path.write_text("new\n")
        clock.now += 60
        assert source.token() == server.given[1]

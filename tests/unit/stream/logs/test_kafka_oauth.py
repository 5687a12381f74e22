"""Getting tokens by client credentials from a real HTTP server."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn.core.errors import StreamlearnError
from streamlearn.stream.logs import kafka_oauth as oauth
from streamlearn.stream.logs.base import BrokerUnavailable
from streamlearn.stream.logs.config import SaslConfig
from tests.support.token_server import TokenServer

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "s3cr3t-canary"


def provider(url: str, **over: Any) -> oauth.ClientCredentials:
    """Return a provider that shares no token with others."""
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


def test_one_token_is_requested_and_shared_by_all_connections() -> None:
    """Threads that connect at the same time cause one request, with the scope."""
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
    """Not earlier, and before it expires."""
    with TokenServer("trainer", SECRET, lifetime=100) as server:
        source = provider(server.url)
        first = source.token()
        clock.now += 79
        assert source.token() == first
        clock.now += 2
        assert source.token() == server.given[1]


def test_a_lifetime_too_large_for_a_float_is_accepted(clock: Clock) -> None:
    """An integer in JSON can have any size."""
    with TokenServer("trainer", SECRET, expires_in=10**400) as server:
        source = provider(server.url)
        first = source.token()
        clock.now += 1e8
        assert source.token() == first


def test_a_valid_token_is_used_while_the_server_is_down(clock: Clock) -> None:
    """After the token expires, the error is `BrokerUnavailable`, so that the reader waits."""
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


def test_an_unreachable_server_is_an_outage() -> None:
    """If nothing listens at the address, the error is `BrokerUnavailable`."""
    with TokenServer("trainer", SECRET) as server:
        url = server.url
    with pytest.raises(BrokerUnavailable, match=r"no token: ConnectError: .*refused"):
        provider(url).token()


def test_a_wrong_secret_is_refused_and_not_shown() -> None:
    """The message has only the answer's error code, because the answer can repeat the secret."""
    with TokenServer("trainer", "another") as server:
        with pytest.raises(StreamlearnError) as caught:
            provider(server.url).token()
        message = f"{server.url}: no token for client trainer, scope None: refused with 401 (invalid_client)"
        assert (caught.value.exit_code, str(caught.value)) == (77, message)


ANSWERS: list[tuple[dict[str, Any], str]] = [
    ({"access_token": None}, "has no valid access_token"),
    ({"access_token": "two\x01words"}, "has no valid access_token"),
    ({"expires_in": "soon"}, "expires_in is 'soon'"),
    ({"expires_in": 0}, "expires_in is 0"),
    ({"expires_in": float("nan")}, "expires_in is nan"),
]


@pytest.mark.parametrize(("answer", "message"), ANSWERS, ids=[message for _, message in ANSWERS])
def test_an_invalid_answer_is_refused(answer: dict[str, Any], message: str) -> None:
    """An invalid token or lifetime is never sent to a broker."""
    with TokenServer("trainer", SECRET, **answer) as server, pytest.raises(StreamlearnError, match=message) as caught:
        provider(server.url).token()
    assert caught.value.exit_code == 77


def test_a_secret_file_is_read_at_every_renewal(tmp_path: Path, clock: Clock) -> None:
    """A changed secret needs no restart."""
    path = tmp_path / "secret"
    path.write_text("old\n")
    with TokenServer("trainer", "old") as server:
        source = provider(server.url, client_secret=None, client_secret_file=path)
        source.token()
        server.secret = "new"
        path.write_text("new\n")
        clock.now += 60
        assert source.token() == server.given[1]

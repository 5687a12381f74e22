"""Tokens for OAUTHBEARER, by the client credentials grant (RFC 6749, section 4.4); no token is ever logged."""

from __future__ import annotations

import math
import re
import threading
import time
from functools import cache
from typing import TYPE_CHECKING, Any

import httpx
from kafka.net.sasl.oauth import AbstractTokenProvider

from streamlearn.data import StreamlearnError
from streamlearn.stream.log import BrokerUnavailable

if TYPE_CHECKING:
    from streamlearn.config import SaslConfig

TIMEOUT_SECONDS = 5.0
FOREVER_SECONDS = 1e9  # an integer of JSON may be larger than any float
LIFETIME_SECONDS = 300.0  # where the server does not say
USED = 0.8  # of a token's lifetime, after which the next is asked for
BUSY = {408, 425, 429}  # the server's answers, besides its own failures, after which another try may help
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750; another character could end the field it is sent in
ERROR = re.compile(r"[a-z_]{1,64}")


class ClientCredentials(AbstractTokenProvider):  # type: ignore[misc]  # the package has no types
    """Gives the same token to every connection, from any thread, until most of its lifetime is over."""

    def __init__(self, sasl: SaslConfig) -> None:
        super().__init__()
        self.sasl = sasl
        self._lock = threading.Lock()
        self._token = ""
        self._until = self._expires = (
            0.0  # when the next is asked for, and when this one is over, on the monotonic clock
        )

    def token(self) -> str:
        """Return a token; raises `StreamlearnError` (77) where the server refuses, `BrokerUnavailable` where none answers."""
        with self._lock:
            now = time.monotonic()
            if now >= self._until:
                try:
                    self._token, lifetime = self._ask()
                except BrokerUnavailable:
                    if now >= self._expires:
                        raise
                else:
                    self._until, self._expires = now + USED * lifetime, now + lifetime
            return self._token

    def _ask(self) -> tuple[str, float]:
        """Return a new token and its lifetime in seconds."""
        url, form = str(self.sasl.token_url), {"grant_type": "client_credentials"}
        if self.sasl.scope is not None:
            form["scope"] = self.sasl.scope
        who = (str(self.sasl.client_id), self.sasl.secret())
        try:
            answer = httpx.post(url, data=form, auth=who, timeout=TIMEOUT_SECONDS)
        except httpx.HTTPError as error:
            if "CERTIFICATE" in str(error):
                raise StreamlearnError(f"kafka.sasl.token_url: {url}: {error!s:.160}", code=77) from error
            raise BrokerUnavailable(f"{url}: no token: {type(error).__name__}: {error!s:.160}") from error
        if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR or answer.status_code in BUSY:
            raise BrokerUnavailable(f"{url}: no token: the server answers {answer.status_code}")
        tree = _object(answer)
        if answer.status_code != httpx.codes.OK:
            why = str(tree.get("error"))
            told = f" ({why})" if ERROR.fullmatch(why) else ""  # nothing else: it may repeat what it was sent
            who_ = f"client {self.sasl.client_id}, scope {self.sasl.scope}"
            raise StreamlearnError(f"{url}: no token for {who_}: refused with {answer.status_code}{told}", code=77)
        token, lifetime = tree.get("access_token"), tree.get("expires_in", LIFETIME_SECONDS)
        if not isinstance(token, str) or not TOKEN.fullmatch(token):
            raise StreamlearnError(f"{url}: the answer has no access_token as RFC 6750 describes it", code=77)
        if not isinstance(lifetime, int | float) or not 0 < lifetime < math.inf:
            raise StreamlearnError(f"{url}: expires_in is {lifetime!r:.40}; expected seconds, more than 0", code=77)
        return token, float(min(lifetime, FOREVER_SECONDS))


def _object(answer: httpx.Response) -> dict[str, Any]:
    """Return an answer's JSON object, empty where it is none."""
    try:
        tree = answer.json()
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


@cache
def token_provider(sasl: SaslConfig) -> ClientCredentials:
    """Return the one provider of this process for these settings."""
    return ClientCredentials(sasl)

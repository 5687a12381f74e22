"""Get tokens for SASL/OAUTHBEARER by the client credentials grant (RFC 6749, section 4.4). No token is ever logged."""

from __future__ import annotations

import math
import re
import threading
import time
from functools import cache
from typing import TYPE_CHECKING, Any

import httpx
from kafka.net.sasl.oauth import AbstractTokenProvider

from streamlearn.core.errors import AccessError
from streamlearn.stream.logs.base import BrokerUnavailable

if TYPE_CHECKING:
    from streamlearn.stream.logs.config import SaslConfig

TIMEOUT_SECONDS = 5.0
MAX_LIFETIME_SECONDS = 1e9  # an integer in JSON can be too large for a float
DEFAULT_LIFETIME_SECONDS = 300.0  # if the answer has no `expires_in`
RENEW_AFTER = 0.8  # the fraction of a token's lifetime after which a new token is requested
RETRY_STATUSES = {408, 425, 429}  # besides 5xx: after these HTTP statuses, a later attempt can succeed
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1; other characters could end the SASL field early
ERROR_CODE = re.compile(r"[a-z_]{1,64}")


class ClientCredentials(AbstractTokenProvider):  # type: ignore[misc]  # the package has no types
    """Returns the same token to all connections until most of its lifetime is over. Any thread may call it."""

    def __init__(self, sasl: SaslConfig) -> None:
        super().__init__()
        self.sasl = sasl
        self._lock = threading.Lock()
        self._token = ""
        self._renew_at = self._expires_at = 0.0  # seconds on the monotonic clock

    def token(self) -> str:
        """Return a token; raises `AccessError` if the server refuses, `BrokerUnavailable` if it does not answer."""
        with self._lock:
            now = time.monotonic()
            if now >= self._renew_at:
                try:
                    self._token, lifetime = self._request_token()
                except BrokerUnavailable:
                    if now >= self._expires_at:
                        raise
                else:
                    self._renew_at, self._expires_at = now + RENEW_AFTER * lifetime, now + lifetime
            return self._token

    def _request_token(self) -> tuple[str, float]:
        """Request a new token; return it and its lifetime in seconds."""
        url, form = str(self.sasl.token_url), {"grant_type": "client_credentials"}
        if self.sasl.scope is not None:
            form["scope"] = self.sasl.scope
        client = (str(self.sasl.client_id), self.sasl.secret())
        try:
            answer = httpx.post(url, data=form, auth=client, timeout=TIMEOUT_SECONDS)
        except httpx.HTTPError as error:
            if "CERTIFICATE" in str(error):
                raise AccessError(f"kafka.sasl.token_url: {url}: {error!s:.160}") from error
            raise BrokerUnavailable(f"{url}: no token: {type(error).__name__}: {error!s:.160}") from error
        if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR or answer.status_code in RETRY_STATUSES:
            raise BrokerUnavailable(f"{url}: no token: the server answers {answer.status_code}")
        tree = _json_object(answer)
        if answer.status_code != httpx.codes.OK:
            error_code = str(tree.get("error"))
            # show nothing else of the answer, because it can repeat the secret that was sent
            why = f" ({error_code})" if ERROR_CODE.fullmatch(error_code) else ""
            who = f"client {self.sasl.client_id}, scope {self.sasl.scope}"
            raise AccessError(f"{url}: no token for {who}: refused with {answer.status_code}{why}")
        token, lifetime = tree.get("access_token"), tree.get("expires_in", DEFAULT_LIFETIME_SECONDS)
        if not isinstance(token, str) or not TOKEN.fullmatch(token):
            raise AccessError(f"{url}: the answer has no valid access_token (RFC 6750)")
        if not isinstance(lifetime, int | float) or not 0 < lifetime < math.inf:
            raise AccessError(f"{url}: expires_in is {lifetime!r:.40}; expected a number of seconds above 0")
        return token, float(min(lifetime, MAX_LIFETIME_SECONDS))


def _json_object(answer: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of an answer, or an empty one if the answer is something else."""
    try:
        tree = answer.json()
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


@cache
def token_provider(sasl: SaslConfig) -> ClientCredentials:
    """Return the provider for these settings; all clients of the process share it."""
    return ClientCredentials(sasl)

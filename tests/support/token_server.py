"""A token server on loopback for the client credentials grant, with answers that tests choose."""

from __future__ import annotations

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from types import TracebackType


class TokenServer:
    """Gives unsigned tokens for the secret of one client, and records requests."""

    def __init__(self, client: str, secret: str, lifetime: float = 60, **answer: Any) -> None:
        self.client = client
        self.secret = secret
        self.lifetime = lifetime
        self.answer = answer
        self.status = 200
        self.asked: list[dict[str, list[str]]] = []
        self.given: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """The address for token requests."""
        return f"http://127.0.0.1:{self._server.server_port}/token"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def respond(self, authorization: str, form: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of the answer to one request."""
        self.asked.append(form)
        expected = base64.b64encode(f"{self.client}:{self.secret}".encode()).decode()
        if self.status != 200:
            return self.status, {}
        if authorization != f"Basic {expected}" or form.get("grant_type") != ["client_credentials"]:
            return 401, {"error": "invalid_client", "error_description": f"{authorization} is wrong"}
        self.given.append(unsigned(self.client, self.lifetime))
        return 200, {"access_token": self.given[-1], "token_type": "Bearer", "expires_in": self.lifetime, **self.answer}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                status, tree = server.respond(self.headers.get("Authorization", ""), parse_qs(body))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(tree).encode())

            def log_message(self, *_: Any) -> None:
                """Write no log."""

        return Handler


def unsigned(subject: str, lifetime: float) -> str:
    """Return an unsigned JSON Web Token; a broker without a configured validator accepts it."""
    now = time.time()
    claims = {"sub": subject, "iat": now, "exp": now + lifetime, "scope": "test", "jti": str(now)}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": "none"}, claims)]
    return b".".join((*parts, b"")).decode()

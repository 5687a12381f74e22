"""HTTP routes: the read-only application has those that only read; the control application adds the commands."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from streamlearn.core.errors import StreamlearnError

if TYPE_CHECKING:
    from starlette.requests import Request

logger = logging.getLogger(__name__)

COMMANDS = ("pause", "resume", "stop", "checkpoint", "end_task")
MAX_BODY_BYTES = 1 << 20
TOO_LARGE = {"error": f"the request is too large: at most {MAX_BODY_BYTES} bytes are accepted"}


class Backend(Protocol):
    """The part of the daemon that the routes use. Every method may be called from any thread."""

    def status(self) -> dict[str, Any]:
        """Return what `status --json` prints."""

    def matrix(self) -> list[list[float | None]]:
        """Return the accuracy matrix. It grows with the square of the tasks, so the status omits a large one."""

    def liveness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether the loop is alive, and details. An outage of the broker does not matter here."""

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether every readiness check passes, and the checks."""

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the format of an Accept header, and their content type."""

    def command(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Execute a command and return its answer when it is done; raises `StreamlearnError` if it is refused."""


def read_only_app(backend: Backend) -> Starlette:
    """Return the application for metrics and health checks."""
    return Starlette(routes=_reading(backend), middleware=[Middleware(GZipMiddleware, minimum_size=1000)])


def control_app(backend: Backend) -> Starlette:
    """Return the application for the Unix socket, which only its owner can use."""

    async def command(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in COMMANDS:
            return JSONResponse({"error": f"no command {name}; accepted: {', '.join(COMMANDS)}"}, status_code=404)
        body = b""
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:  # the rest is not read
                    return JSONResponse(TOO_LARGE, status_code=413, headers={"connection": "close"})
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads this answer
        try:
            arguments = json.loads(body or b"{}")
        except (ValueError, RecursionError) as error:
            return JSONResponse({"error": f"not JSON: {error}"}, status_code=400)
        if not isinstance(arguments, dict):
            return JSONResponse({"error": f"expected an object, got {type(arguments).__name__}"}, status_code=400)
        logger.info("control: %s", name, extra={"command": name})
        try:
            return JSONResponse(await run_in_threadpool(backend.command, name, arguments))
        except StreamlearnError as error:
            return JSONResponse({"error": str(error), "code": error.exit_code}, status_code=409)

    return Starlette(routes=[*_reading(backend), Route("/v1/{name}", command, methods=["POST"])])


def _reading(backend: Backend) -> list[Route]:
    async def metrics(request: Request) -> Response:
        content, content_type = backend.expose(request.headers.get("accept", ""))
        return Response(content, media_type=content_type)

    async def healthz(request: Request) -> Response:
        del request
        alive, details = backend.liveness()
        return JSONResponse({"status": "ok" if alive else "stalled", **details}, status_code=200 if alive else 503)

    async def readyz(request: Request) -> Response:
        del request
        ready, checks = backend.readiness()
        return JSONResponse({"ready": ready, "checks": checks}, status_code=200 if ready else 503)

    async def status(request: Request) -> Response:
        del request
        return JSONResponse(backend.status())

    async def matrix(request: Request) -> Response:
        del request
        # in a thread, because a large matrix takes a while and health checks must not wait for it
        return await run_in_threadpool(lambda: JSONResponse({"matrix": backend.matrix()}))

    return [
        Route("/metrics", metrics),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/status", status),
        Route("/matrix", matrix),
    ]

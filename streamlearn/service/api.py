"""Routes. The read-only application has no others; the control application adds what changes something."""

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

from streamlearn.data import StreamlearnError

if TYPE_CHECKING:
    from starlette.requests import Request

logger = logging.getLogger(__name__)

COMMANDS = ("pause", "resume", "stop", "checkpoint", "end_task")
MAX_BODY_BYTES = 1 << 20
TOO_LARGE = {"error": f"the request is too large: at most {MAX_BODY_BYTES} bytes are accepted"}


class Backend(Protocol):
    """What the routes need of the daemon; every method is safe to call from any thread."""

    def status(self) -> dict[str, Any]:
        """Return what `status --json` shows."""

    def matrix(self) -> list[list[float | None]]:
        """Return the accuracy matrix: it grows with the square of the tasks, and the status leaves a large one out."""

    def liveness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether the process works, whatever its broker does, and why."""

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether every condition holds, and each of them."""

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return metrics and their content type."""

    def command(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Do what was asked and return once it is done; raises `StreamlearnError`."""


def read_only_app(backend: Backend) -> Starlette:
    """Return the application for scraping and health checks."""
    return Starlette(routes=_reading(backend), middleware=[Middleware(GZipMiddleware, minimum_size=1000)])


def control_app(backend: Backend) -> Starlette:
    """Return the application for the owner's Unix socket."""

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
            return Response(status_code=400)  # which nobody reads
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
            return JSONResponse({"error": str(error), "code": error.code}, status_code=409)

    return Starlette(routes=[*_reading(backend), Route("/v1/{name}", command, methods=["POST"])])


def _reading(backend: Backend) -> list[Route]:
    async def metrics(request: Request) -> Response:
        content, content_type = backend.expose(request.headers.get("accept", ""))
        return Response(content, media_type=content_type)

    async def healthz(request: Request) -> Response:
        del request
        sound, detail = backend.liveness()
        return JSONResponse({"status": "ok" if sound else "stalled", **detail}, status_code=200 if sound else 503)

    async def readyz(request: Request) -> Response:
        del request
        ready, checks = backend.readiness()
        return JSONResponse({"ready": ready, "checks": checks}, status_code=200 if ready else 503)

    async def status(request: Request) -> Response:
        del request
        return JSONResponse(backend.status())

    async def matrix(request: Request) -> Response:
        del request
        # beside the event loop: a large one takes a while, and health checks must not wait for it
        return await run_in_threadpool(lambda: JSONResponse({"matrix": backend.matrix()}))

    return [
        Route("/metrics", metrics),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/status", status),
        Route("/matrix", matrix),
    ]

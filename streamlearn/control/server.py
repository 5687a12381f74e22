"""The HTTP listeners. Sockets are bound before anything slow happens, so that a busy port is reported at once."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from streamlearn.core.errors import AccessError, ConfigurationError, StreamlearnError

if TYPE_CHECKING:
    import asyncio

    from starlette.applications import Starlette
    from uvicorn.protocols.http.h11_impl import RequestResponseCycle

logger = logging.getLogger(__name__)

SOCKETS_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}
"""Errors of file systems without sockets: SMB, exFAT, many FUSE mounts."""

MAX_SOCKET_PATH = 107  # bytes, on Linux
TIMEOUT_SECONDS = 5  # to send a whole request; also for an idle connection
ANSWER_SECONDS = 10  # for a client to read its answer
MAX_CONNECTIONS = 64  # on each listener
BACKLOG = 16  # connections that wait to be accepted; asyncio accepts so many at once, and each needs a descriptor


def control_socket_path(state_dir: Path) -> Path:
    """Return the path of the control socket: in the state directory, or elsewhere if that path is too long."""
    path = state_dir.resolve() / "run" / "control.sock"
    return path if len(os.fsencode(path)) <= MAX_SOCKET_PATH else _socket_path_elsewhere(state_dir)


def _socket_path_elsewhere(state_dir: Path) -> Path:
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")  # noqa: S108 - the directory in it is only ours
    digest = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:16]
    return base / f"streamlearn-{os.getuid()}" / f"{digest}.sock"


def bind_control(state_dir: Path) -> tuple[socket.socket, Path]:
    """Return the bound control socket and its path; only the owner can use it (mode 0600, in a directory with mode 0700).

    The caller holds the lock of the state directory, so an existing socket was left by a dead process. Raises
    `StreamlearnError`.
    """
    path = control_socket_path(state_dir)
    try:
        return _bind(path), path
    except OSError as error:
        elsewhere = _socket_path_elsewhere(state_dir)
        if error.errno not in SOCKETS_UNSUPPORTED or path == elsewhere:
            raise StreamlearnError.from_os_error(error, path) from error
        logger.info("%s: no socket can be created there (%s); using %s", path, error.strerror, elsewhere)
    try:
        return _bind(elsewhere), elsewhere
    except OSError as error:
        raise StreamlearnError.from_os_error(error, elsewhere) from error


def _bind(path: Path) -> socket.socket:
    """Return a socket bound to a path; raises `OSError`, and `AccessError` if others may use the directory."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_uid != os.getuid() or path.parent.stat().st_mode & 0o022:
        raise AccessError(f"{path.parent}: must belong to you, and nobody else may write there")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)  # from now on clients wait, and are not refused
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def bind_tcp(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket; raises `ConfigurationError` if the port is busy or needs other permissions."""
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigurationError(
            f"service: {host}:{port} cannot be used: {error.strerror}; port 0 means any free port"
        ) from error
    return listener


class TimedConnection(H11Protocol):
    """An HTTP connection with time limits, so that no client can block the listener.

    A request must be complete within `TIMEOUT_SECONDS`, counted from the start of the idle time before it. Its answer must be
    read within `ANSWER_SECONDS`. A new connection is always accepted. If there are then more than `MAX_CONNECTIONS`, the
    oldest one that waits for a request is closed, or else the oldest. So health checks and Prometheus, which send their
    request at once, are always answered.
    """

    _since = 0.0
    _timer: asyncio.TimerHandle | None = None
    _phase: tuple[int, bool] | None = None  # number of answers, and whether the application works on a request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._restart_timer()
        alive = [
            each for each in self.connections if isinstance(each, TimedConnection) and not each.transport.is_closing()
        ]
        if len(alive) > MAX_CONNECTIONS:
            min(alive, key=lambda each: (each._is_busy, each._since)).transport.abort()  # noqa: SLF001 - our own class

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._restart_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._restart_timer(answered=1)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def _is_busy(self) -> bool:
        """Whether the application works on a complete request; this has no time limit."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not (cycle.response_complete or cycle.more_body)

    def _restart_timer(self, answered: int = 0) -> None:
        """Start the time limit of a phase when the connection enters it; later bytes do not extend it."""
        previous = self._phase or (0, True)
        if previous == (phase := (previous[0] + answered, self._is_busy)):
            return
        self._phase, self._since = phase, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        seconds = ANSWER_SECONDS if self.transport.get_write_buffer_size() else TIMEOUT_SECONDS
        self._timer = None if self._is_busy else self.loop.call_later(seconds, self.transport.abort)


class Server:
    """Serves one application on one socket, in a thread."""

    def __init__(self, app: Starlette, listener: socket.socket, name: str) -> None:
        self.listener = listener
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", server_header=False,
            http=TimedConnection, ws="none", backlog=BACKLOG,
            timeout_keep_alive=TIMEOUT_SECONDS, timeout_graceful_shutdown=TIMEOUT_SECONDS,
            h11_max_incomplete_event_size=16 << 10,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name=name, daemon=True)

    def start(self) -> None:
        """Start to answer."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Answer the requests that have arrived, then end."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(timeout=TIMEOUT_SECONDS + 1)
        self.listener.close()

"""Listeners: sockets are bound before anything slow happens, so that a busy port is known at once."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from streamlearn.data import StreamlearnError

if TYPE_CHECKING:
    from starlette.applications import Starlette

MAX_SOCKET_PATH = 107  # bytes, Linux
TIMEOUT_SECONDS = 5


def control_socket_path(state_dir: Path) -> Path:
    """Return where the control socket of a state directory lies: below it, or where its path would be too long, elsewhere."""
    path = state_dir.resolve() / "run" / "control.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")  # noqa: S108 - the directory below it is ours alone
    digest = hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:16]
    return base / f"streamlearn-{os.getuid()}" / f"{digest}.sock"


def bind_control(state_dir: Path) -> tuple[socket.socket, Path]:
    """Return the bound control socket (0600, in a directory of the owner's alone) and its path.

    The caller holds the state directory's lock, so a socket that lies there is a dead one's.
    """
    path = control_socket_path(state_dir)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.stat().st_uid != os.getuid() or path.parent.stat().st_mode & 0o022:
            raise StreamlearnError(f"{path.parent}: must belong to you, and be writable by nobody else", code=77)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        raise StreamlearnError.of_system(error, path) from error
    return listener, path


def bind_tcp(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket; raises `StreamlearnError` (78) where the port is busy or not ours to take."""
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise StreamlearnError(
            f"service: {host}:{port} cannot be taken: {error.strerror}; 0 takes any free port", code=78
        ) from error
    return listener


class Server:
    """One application on one socket, in a thread."""

    def __init__(self, app: Starlette, listener: socket.socket, name: str) -> None:
        self.listener = listener
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", server_header=False,
            limit_concurrency=16, timeout_keep_alive=TIMEOUT_SECONDS, timeout_graceful_shutdown=TIMEOUT_SECONDS,
            h11_max_incomplete_event_size=16 << 10,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name=name, daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Answer what was asked, and end."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(timeout=TIMEOUT_SECONDS + 1)
        self.listener.close()

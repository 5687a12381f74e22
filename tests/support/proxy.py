"""A TCP proxy on loopback that resets connections, delays data or drops it: a faulty network to a broker."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Self

from benchmarks.kafka_broker import free_port

if TYPE_CHECKING:
    from types import TracebackType

CHUNK = 64 << 10


class Proxy:
    """Forwards bytes between its own port and a target port. `mode` is `pass`, `delay`, `drop` or `cut`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.mode = "pass"
        self.seconds = 0.0  # delay of each chunk in mode `delay`
        self.disturbed = 0  # chunks and connections that were not forwarded normally
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def heal(self) -> None:
        """Forward everything again. Connections whose data was dropped are reset, as after a real outage."""
        if self.mode == "drop":
            self._loop.call_soon_threadsafe(self._reset_connections)
        self.mode = "pass"

    def delay(self, seconds: float) -> None:
        """Delay each chunk by this time."""
        self.seconds, self.mode = seconds, "delay"

    def drop(self) -> None:
        """Accept all bytes and forward none, without an error to the client."""
        self.mode = "drop"

    def cut(self) -> None:
        """Reset all connections and accept no new one."""
        self.mode = "cut"
        self._loop.call_soon_threadsafe(self._reset_connections)

    def _reset_connections(self) -> None:
        self.disturbed += len(self._writers)
        for writer in self._writers:
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self._ready.set()
        self._loop.run_forever()
        server.close()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self.mode == "cut":
                self.disturbed += 1
                return
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(back)
            try:
                await asyncio.gather(self._forward(reader, back), self._forward(there, writer))
            finally:
                self._writers.discard(back)
                back.transport.abort()
        except OSError:
            pass  # one side has closed; the other is closed below
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK):
                if self.mode == "delay":
                    self.disturbed += 1
                    await asyncio.sleep(self.seconds)
                if self.mode == "drop":
                    self.disturbed += 1
                    continue
                writer.write(chunk)
                await writer.drain()
        writer.transport.abort()

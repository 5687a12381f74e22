"""A TCP proxy on loopback that cuts, delays and swallows: the network between a client and its broker."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Self

from tests.support.kafka_broker import free_port

if TYPE_CHECKING:
    from types import TracebackType

CHUNK = 64 << 10


class Proxy:
    """Passes bytes between its own port and a target's; `mode` is `pass`, `delay`, `swallow` or `cut`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.mode = "pass"
        self.seconds = 0.0  # by which `delay` holds back each chunk
        self.hindered = 0  # chunks and connections that did not pass as they should
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
        """Let everything pass again; what was swallowed is gone with its connection, as after a real outage."""
        if self.mode == "swallow":
            self._loop.call_soon_threadsafe(self._drop)
        self.mode = "pass"

    def delay(self, seconds: float) -> None:
        """Hold back every chunk by so long."""
        self.seconds, self.mode = seconds, "delay"

    def swallow(self) -> None:
        """Take every byte and pass none on: nobody is told."""
        self.mode = "swallow"

    def cut(self) -> None:
        """Reset every connection and take no new one."""
        self.mode = "cut"
        self._loop.call_soon_threadsafe(self._drop)

    def _drop(self) -> None:
        self.hindered += len(self._writers)
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
                self.hindered += 1
                return
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(back)
            try:
                await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
            finally:
                self._writers.discard(back)
                back.transport.abort()
        except OSError:
            pass  # one side is gone, and so is the other then
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK):
                if self.mode == "delay":
                    self.hindered += 1
                    await asyncio.sleep(self.seconds)
                if self.mode == "swallow":
                    self.hindered += 1
                    continue
                writer.write(chunk)
                await writer.drain()
        writer.transport.abort()

"""A link between agents and a coordinator that a test can cut, hold and heal: a TCP proxy on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

WAIT_S = 60.0
READ_BYTES = 64 << 10


class Link:
    """Used with `with`; agents dial `address`, and `lead` says where that goes, also later on."""

    def __init__(self) -> None:
        self.address = ""
        self._target = ("", 0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link")
        self._flowing = asyncio.Event()
        self._open = True
        self._hold_after_bytes: int | None = None
        self._streams: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Link:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    def lead(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))

    def hold(self) -> None:
        """From now on nothing comes through either way, and nobody is told: what a dead radio link does."""
        self._do(self._set(flowing=False))

    def hold_in_upload(self, up_bytes: int) -> None:
        """The same, once so many more bytes have come from agents."""
        self._hold_after_bytes = up_bytes

    def release(self) -> None:
        """What was held comes through, late."""
        self._do(self._set(flowing=True))

    def cut(self) -> None:
        """Every connection ends at once, and new ones are refused until `heal`."""
        self._do(self._cut())

    def heal(self) -> None:
        self._open = True

    def _do(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    async def _listen(self) -> None:
        self._flowing.set()
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _end(self) -> None:
        self._server.close()
        await self._cut()
        await self._server.wait_closed()

    async def _set(self, *, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _cut(self) -> None:
        self._open = False
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = asyncio.ensure_future(self._carry(reader, writer))
        self._streams.add(stream)
        stream.add_done_callback(self._streams.discard)
        stream.add_done_callback(lambda _: writer.transport.abort())  # also where it was cut before its first step

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            return
        try:
            their_reader, their_writer = await asyncio.open_connection(*self._target)
        except OSError:
            return
        pumps = [
            asyncio.ensure_future(self._pump(reader, their_writer, up=True)),
            asyncio.ensure_future(self._pump(their_reader, writer, up=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            their_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(READ_BYTES):
                if up and self._hold_after_bytes is not None:
                    self._hold_after_bytes -= len(data)
                    if self._hold_after_bytes <= 0:
                        self._hold_after_bytes = None
                        self._flowing.clear()
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()

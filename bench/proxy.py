"""A TCP proxy that counts what agents send and cuts the connection on which a chosen byte arrives."""

from __future__ import annotations

import asyncio
import contextlib
import socket

READ_BYTES = 16 << 10
BUFFER_BYTES = 64 << 10
"""Of each socket and queue: what lies in the proxy is lost by a cut, and a link of its own would not hold much more."""


class Proxy:
    """Between agents and a coordinator. Used with `async with`; the connections end with it."""

    def __init__(self) -> None:
        self.up_bytes = 0
        """From agents, over all connections."""
        self.cuts = 0
        self._cut_at_bytes: int | None = None
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._target = ("", 0)

    async def __aenter__(self) -> Proxy:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def open(self, target: str) -> str:
        """Listen, and lead whoever comes to `target`; returns the address to dial."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        listener.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._take, sock=listener, limit=BUFFER_BYTES)
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def cut_at(self, up_bytes: int) -> None:
        """Cut the connection that brings the count to `up_bytes`. One at a time."""
        self._cut_at_bytes = up_bytes

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: of a cancelled one that asyncio makes by itself it prints the trace.
        link = asyncio.create_task(self._lead(reader, writer), name="link")
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            their_reader, their_writer = await asyncio.open_connection(*self._target, limit=BUFFER_BYTES)
        except OSError:
            writer.transport.abort()
            return
        their_writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        pumps = [asyncio.create_task(self._up(reader, their_writer)), asyncio.create_task(_pump(their_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Both ends hear of it, as they would of a cut; what is still on its way is lost.
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            writer.transport.abort()
            their_writer.transport.abort()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(READ_BYTES):
                self.up_bytes += len(data)
                if self._cut_at_bytes is not None and self.up_bytes >= self._cut_at_bytes:
                    writer.write(data[: max(0, len(data) - (self.up_bytes - self._cut_at_bytes))])
                    self._cut_at_bytes = None
                    self.cuts += 1
                    return
                writer.write(data)
                await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(BUFFER_BYTES):
            writer.write(data)
            await writer.drain()

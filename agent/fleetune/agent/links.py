"""The connections to the coordinator: opened with the present certificate, and replaced under running calls when it is renewed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

import grpc.aio


class _Opened:
    """A channel and how many calls are on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.users = 0


class Line:
    """One channel at a time. One that was replaced lives on until its last call has ended."""

    def __init__(self, dial: Callable[[], grpc.aio.Channel]) -> None:
        self._dial = dial
        self._present: _Opened | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncGenerator[grpc.aio.Channel, None]:
        """The present channel, kept open while in use. Waits while the line is paused."""
        await self._free.wait()
        opened = self._present
        if opened is None:
            opened = self._present = _Opened(self._dial())
        opened.users += 1
        try:
            yield opened.channel
        finally:
            opened.users -= 1
            if opened is not self._present and not opened.users:
                self._close(opened)

    def replace(self) -> None:
        """The next call opens a new channel; calls under way stay on theirs."""
        opened, self._present = self._present, None
        if opened is not None and not opened.users:
            self._close(opened)

    def pause(self) -> None:
        """No calls and no dialling until `resume`."""
        self._free.clear()
        self.replace()

    def resume(self) -> None:
        self._free.set()

    async def close(self) -> None:
        """Ends every call that is left on the present channel."""
        opened, self._present = self._present, None
        if opened is not None:
            self._close(opened)
        if self._closing:
            await asyncio.wait(set(self._closing))

    def _close(self, opened: _Opened) -> None:
        # In the background: a call that ends must not wait for the end of its connection, nor be cancelled in it.
        closing = asyncio.create_task(opened.channel.close(), name="close a channel")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


class Links:
    """The control connection and the one for bulk, which would starve heartbeats on the same one."""

    def __init__(self, dial: Callable[[], grpc.aio.Channel]) -> None:
        self.control = Line(dial)
        self.bulk = Line(dial)

    def replace(self) -> None:
        """Go over to new connections, since the certificate is another one now."""
        self.control.replace()
        self.bulk.replace()

    def pause(self) -> None:
        """Leave a coordinator alone that refuses this agent: a channel left to itself would dial every few seconds."""
        self.control.pause()
        self.bulk.pause()

    def resume(self) -> None:
        self.control.resume()
        self.bulk.resume()

    async def close(self) -> None:
        await asyncio.gather(self.control.close(), self.bulk.close())

"""Whose bytes move next: few transfers at once, as long as they are quick."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Turns:
    """Admits `quick` transfers at once, first come first served, and lets each go on beside the others once it has taken `quick_s`.

    On a fast network few at once finish one after the other sooner than many side by side, in less memory. A device on a slow link would
    keep its place for minutes, though, while the coordinator has bandwidth to spare: so it loses the place, not the transfer. `at_most`
    bounds all transfers, and with them the memory that slow ones hold.
    """

    def __init__(self, quick: int, at_most: int, quick_s: float) -> None:
        self._quick = asyncio.Semaphore(quick)
        self._all = asyncio.Semaphore(at_most)
        self._quick_s = quick_s
        self.moving = 0
        """Transfers that have their turn, the slow ones included."""
        self.waiting = 0

    def one(self) -> _Turn:
        """A turn, to be used with `async with`."""
        return _Turn(self, self._quick, self._all, self._quick_s)


class _Turn:
    def __init__(self, turns: Turns, quick: asyncio.Semaphore, all_: asyncio.Semaphore, quick_s: float) -> None:
        self._turns = turns
        self._quick = quick
        self._all = all_
        self.aside = False
        """Whether it has lost its place: it takes long, and should hold little memory meanwhile."""
        self._quick_s = quick_s
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> _Turn:
        self._turns.waiting += 1
        try:
            await self._all.acquire()
            try:
                await self._quick.acquire()
            except BaseException:
                self._all.release()
                raise
        finally:
            self._turns.waiting -= 1
        self._turns.moving += 1
        self._timer = asyncio.get_running_loop().call_later(self._quick_s, self._step_aside)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._step_aside()
        self._turns.moving -= 1
        self._all.release()

    def _step_aside(self) -> None:
        self._timer = None
        self.aside = True
        self._quick.release()

"""Turns of transfers: few at once, unless they are slow."""

from __future__ import annotations

import asyncio
import contextlib

from fleetune.coordinator.rpc.turns import Turns
from support import loopclock


class Crowd:
    """Transfers that note that they are under way until they are let go."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._over: dict[str, asyncio.Event] = {}
        self.under_way: list[str] = []
        self._changed = asyncio.Event()

    async def begin(self, *names: str) -> None:
        for name in names:
            self._over[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._transfer(name))
        await self._settled()

    async def end(self, *names: str, cancelled: bool = False) -> None:
        for name in names:
            if cancelled:
                self._tasks[name].cancel()
            self._over[name].set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*(self._tasks[name] for name in names))
        await self._settled()

    async def until(self, *names: str) -> None:
        """Return once exactly these are under way; the test's own limit bounds the wait."""
        while self.under_way != list(names):
            self._changed.clear()
            await self._changed.wait()

    async def _settled(self) -> None:
        for _ in range(20):  # more turns of the loop than any hand-over takes; no time need pass
            await asyncio.sleep(0)

    async def _transfer(self, name: str) -> None:
        async with self._turns.one():
            self.under_way.append(name)
            self._changed.set()
            try:
                await self._over[name].wait()
            finally:
                self.under_way.remove(name)
                self._changed.set()


async def test_the_next_one_begins_when_one_has_ended() -> None:
    crowd = Crowd(Turns(2, 10, quick_s=60))
    await crowd.begin("a", "b", "c", "d")
    assert crowd.under_way == ["a", "b"]
    await crowd.end("b")
    assert crowd.under_way == ["a", "c"]
    await crowd.end("a", "c")
    assert crowd.under_way == ["d"]
    await crowd.end("d")


async def test_slow_ones_hold_nobody_up() -> None:
    with loopclock.held() as clock:
        crowd = Crowd(Turns(2, 10, quick_s=60))
        await crowd.begin("slow-1", "slow-2", "quick")
        assert crowd.under_way == ["slow-1", "slow-2"]
        clock.forward(61)
        await crowd.until("slow-1", "slow-2", "quick")
        # Their places are counted once: two at once again, not four.
        await crowd.end("slow-1", "slow-2", "quick")
        await crowd.begin("e", "f", "g")
        assert crowd.under_way == ["e", "f"]
        await crowd.end("e", "f", "g")


async def test_all_together_are_bounded() -> None:
    crowd = Crowd(Turns(1, 3, quick_s=0.01))
    await crowd.begin("a", "b", "c", "d")
    await crowd.until("a", "b", "c")
    await asyncio.sleep(0.1)  # long enough for a fourth, if there could be one
    assert crowd.under_way == ["a", "b", "c"]
    await crowd.end("c")
    await crowd.until("a", "b", "d")
    await crowd.end("a", "b", "d")


async def test_a_cancelled_one_leaves_its_place() -> None:
    crowd = Crowd(Turns(1, 2, quick_s=60))
    await crowd.begin("a", "waiting", "third")
    await crowd.end("waiting", cancelled=True)
    await crowd.end("a", cancelled=True)
    assert crowd.under_way == ["third"]
    await crowd.end("third")

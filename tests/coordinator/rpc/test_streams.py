"""How long a stream waits for its other end."""

from __future__ import annotations

import asyncio

import pytest

from fleetune.coordinator.rpc.streams import Patience
from support import loopclock


async def test_a_wait_that_takes_too_long_is_a_timeout() -> None:
    with pytest.raises(asyncio.TimeoutError):
        with Patience(0.01) as patience:
            await patience.on(asyncio.Event().wait())


async def test_the_task_goes_on_as_ever_after_a_timeout() -> None:
    with pytest.raises(asyncio.TimeoutError):
        with Patience(0.01) as patience:
            await patience.on(asyncio.Event().wait())
    assert await asyncio.wait_for(asyncio.sleep(0, "on"), 5) == "on"


async def test_time_between_two_waits_does_not_count() -> None:
    with loopclock.held() as clock, Patience(0.01) as patience:
        assert await patience.on(asyncio.sleep(0, "first")) == "first"
        for _ in range(5):  # a look of the timer each time; nothing of it is the other end's fault
            clock.forward(0.011)
            for _ in range(3):
                await asyncio.sleep(0)
        assert await patience.on(asyncio.sleep(0, "second")) == "second"


async def test_a_cancellation_from_outside_stays_one() -> None:
    waiting = asyncio.Event()

    async def wait() -> None:
        with Patience(60.0) as patience:
            waiting.set()
            await patience.on(asyncio.Event().wait())

    task = asyncio.create_task(wait())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

"""What a task tells on its way."""

from __future__ import annotations

import asyncio

from fleetune.agent.execution import Throttle

Told = tuple[str, int, int, "float | None"]


async def test_progress_tells_the_latest_and_not_each_step() -> None:
    told: asyncio.Queue[Told] = asyncio.Queue()
    throttle = Throttle(lambda *progress: told.put_nowait(progress))
    for done in range(100):
        throttle("training", done, 100, 0.5)
    assert await told.get() == ("training", 99, 100, 0.5)
    assert told.empty()


async def test_a_task_that_has_ended_tells_no_progress() -> None:
    told: asyncio.Queue[Told] = asyncio.Queue()
    throttle = Throttle(lambda *progress: told.put_nowait(progress))
    throttle("training", 1, 2)
    throttle.close()
    later = Throttle(lambda *progress: told.put_nowait(progress))
    later("uploading", 1, 2)
    assert (await told.get())[0] == "uploading"

"""Blocking calls of an event loop in threads."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from fleetune.workers import Workers


async def test_a_result_and_an_error_come_back() -> None:
    workers = Workers("test")
    assert await workers.run(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        await workers.run(divmod, 7, 0)
    workers.close()


async def test_one_thread_keeps_the_order_and_several_run_side_by_side() -> None:
    seen: list[int] = []
    one, many = Workers("one"), Workers("many", 3)
    await asyncio.gather(*(one.run(seen.append, index) for index in range(100)))
    assert seen == list(range(100))
    meeting = threading.Barrier(3, timeout=10)
    await asyncio.gather(*(many.run(meeting.wait) for _ in range(3)))
    one.close()
    many.close()


async def test_threads_are_started_as_they_are_needed_and_end_with_close() -> None:
    workers = Workers("lazy", 4)
    names = {await workers.run(lambda: threading.current_thread().name) for _ in range(20)}
    assert names == {"lazy-0"}
    workers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lazy")]
    workers.close()
    with pytest.raises(RuntimeError, match="lazy"):
        workers.run(time.sleep, 0)


async def test_a_call_runs_to_its_end_where_nobody_waits_any_more() -> None:
    workers, begun, done = Workers("left"), threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.05)
        done.set()

    waiting = workers.run(slow)
    await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)
    waiting.cancel()
    workers.close()
    assert done.is_set()


async def test_the_error_of_a_call_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers("told")
    with caplog.at_level(logging.ERROR):
        workers.tell(divmod, 1, 0)
        assert await workers.run(divmod, 1, 1) == (1, 0)
    workers.close()
    assert "a call failed thread=told" in caplog.text


def test_a_loop_that_has_gone_does_not_kill_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    workers, go = Workers("late"), threading.Event()

    def late() -> None:
        go.wait(10)
        raise OSError("too late")

    async def begin() -> None:
        workers.run(late)

    asyncio.run(begin())
    with caplog.at_level(logging.ERROR):
        go.set()
        workers.close()
    assert "too late" in caplog.text

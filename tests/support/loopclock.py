"""The running event loop's own clock, held by the test: its timers fire when the test says so, however fast or busy the machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator

import pytest


class LoopClock:
    """What the loop takes for the time. gRPC's own deadlines go by another clock."""

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s

    def __call__(self) -> float:
        return self._now_s

    def forward(self, by_s: float) -> None:
        """What is due by then fires in the loop's next turn."""
        self._now_s += by_s


@contextlib.contextmanager
def held() -> Generator[LoopClock, None, None]:
    """No time passes inside but by `forward`; nothing inside may count on a timer of its own."""
    loop = asyncio.get_running_loop()
    clock = LoopClock(loop.time())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "time", clock)
        yield clock

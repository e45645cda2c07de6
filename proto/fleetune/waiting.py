"""Waits with a bound that always let a cancellation through.

`asyncio.wait_for` before Python 3.12 drops a cancellation that arrives together with the result. A loop around it then goes on
although it was told to end, and whoever waits for that end waits for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(limit_s: float, work: Coroutine[Any, Any, T]) -> T:  # Any: what a coroutine yields and is sent is asyncio's own
    """The coroutine's result; asyncio.TimeoutError after `limit_s`, and then it has ended too."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=limit_s)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def happened(event: asyncio.Event, within_s: float) -> bool:
    """True once `event` is set, False after `within_s`."""
    waiter = asyncio.ensure_future(event.wait())
    try:
        done, _ = await asyncio.wait({waiter}, timeout=within_s)
        return bool(done)
    finally:
        waiter.cancel()

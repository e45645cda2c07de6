"""Reading a request stream with a deadline."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)


class Readable(Protocol):
    """The part of a servicer context that reads; the end of the stream is an object of its own."""

    async def read(self) -> Any: ...  # Any: the stubs leave the end of the stream out


async def next_message(context: Readable, within_s: float, kind: type[M]) -> M | None:
    """The next message, or None at the end of the stream. asyncio.TimeoutError where nothing comes within `within_s`."""
    message = await asyncio.wait_for(context.read(), within_s)
    return message if isinstance(message, kind) else None

"""Reading a request stream with a deadline."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from fleetune.waiting import within

M = TypeVar("M", bound=Message)


class Readable(Protocol):
    """The part of a servicer context that reads; the end of the stream is an object of its own."""

    def read(self) -> Coroutine[Any, Any, Any]: ...  # Any: the stubs leave the end of the stream out


async def next_message(context: Readable, within_s: float, kind: type[M]) -> M | None:
    """The next message, or None at the end of the stream. asyncio.TimeoutError where nothing comes within `within_s`."""
    message = await within(within_s, context.read())
    return message if isinstance(message, kind) else None

"""Waiting for the other end of a stream, but not for ever."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Coroutine
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from fleetune.waiting import within

HANG_UP_S = 1.0
"""How long the last word to the other end may wait for it to read."""

M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Readable(Protocol):
    """The part of a servicer context that reads; the end of the stream is an object of its own."""

    def read(self) -> Coroutine[Any, Any, Any]: ...  # Any: the stubs leave the end of the stream out


class Abortable(Protocol):
    """The part of a servicer context that ends a call."""

    async def abort(self, code: grpc.StatusCode, details: str = ..., trailing_metadata: tuple[()] = ...) -> NoReturn: ...


class Beginning(Protocol):
    """The part of a servicer context that begins a call's answer."""

    def send_initial_metadata(self, initial_metadata: tuple[()]) -> Coroutine[Any, Any, None]: ...  # Any: what asyncio is sent


async def hang_up(context: Abortable, code: grpc.StatusCode, details: str) -> NoReturn:
    """End a call with `code`, also where the other end reads nothing: the status waits behind what it has not read.

    Then the call ends without one: a handler that is cancelled lets go of its stream, and gRPC resets it.
    """
    try:
        await within(HANG_UP_S, context.abort(code, details))
    except asyncio.TimeoutError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort has returned")


async def begin(context: Beginning) -> None:
    """Send what comes before a call's first message; a cancellation meanwhile is let through once that is done, or after a moment.

    gRPC would send it with the first message, and again with a status that ends the call while that message is on its way: an error
    inside gRPC, after which the other end hears nothing at all.
    """
    sent = asyncio.ensure_future(context.send_initial_metadata(()))
    try:
        await asyncio.shield(sent)
    except asyncio.CancelledError:
        await asyncio.wait({sent}, timeout=HANG_UP_S)
        raise
    finally:
        if not sent.done():
            sent.cancel()
            await asyncio.wait({sent})


async def next_message(context: Readable, within_s: float, kind: type[M]) -> M | None:
    """The next message, or None at the end of the stream. asyncio.TimeoutError where nothing comes within `within_s`."""
    message = await within(within_s, context.read())
    return message if isinstance(message, kind) else None


class Patience:
    """Ends the task it was made in with asyncio.TimeoutError where one wait for the other end takes longer than `within_s`.

    `within` would do for one message. For every message of a stream it costs a task and a timer each time; here one timer looks now and
    then at when the present wait began. Used with `with`, and `await patience.on(...)` around each wait.
    """

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._since_s: float | None = None
        self._timer = self._loop.call_later(within_s, self._look)
        self._over = False

    def __enter__(self) -> Patience:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()
        if self._over and kind is asyncio.CancelledError:
            if sys.version_info >= (3, 11) and self._task is not None:
                self._task.uncancel()
            raise asyncio.TimeoutError from error

    async def on(self, wait: Awaitable[T]) -> T:
        """The result of `wait`, which is the other end's to bring about."""
        self._since_s = self._loop.time()
        try:
            return await wait
        finally:
            self._since_s = None

    def _look(self) -> None:
        now_s = self._loop.time()
        left_s = self._within_s if self._since_s is None else self._since_s + self._within_s - now_s
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        elif self._task is not None:
            self._over = True
            self._task.cancel()

"""The status with which the other end ended a call, kept against a write that fails afterwards.

grpc.aio (seen in 1.85; grpc/grpc issue 36066) puts "Internal error from Core" over the status of a call when a write that is under way
fails because the call has ended. A server that refuses an upload before it has all of it would so be heard as broken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio

T = TypeVar("T")


class Answer:
    """Listens to one call from its start; `of(error)` is the error that the other end meant."""

    def __init__(self, call: grpc.aio.Call) -> None:
        self._status: tuple[grpc.StatusCode, str, grpc.aio.Metadata] | None = None
        # Called while the status is being set, hence before anything can be put over it.
        call.add_done_callback(self._keep)

    def _keep(self, call: Any) -> None:  # grpc's own type of this argument differs from version to version
        if self._status is None:
            self._status = (_ready(call.code()), _ready(call.details()) or "", _ready(call.trailing_metadata()))

    def of(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """`error`, or the status that came before it.

        Where the failure of the write came first, grpc puts the status of the other end over it, and `error` is right as it is.
        """
        if error.code() is not grpc.StatusCode.INTERNAL or self._status is None or self._status[0] is grpc.StatusCode.OK:
            return error
        code, details, trailing = self._status
        return grpc.aio.AioRpcError(code, error.initial_metadata(), trailing, details, error.debug_error_string())

    def error(self) -> grpc.aio.AioRpcError | None:
        """What the other end ended the call with; None while it is open, and where it ended well."""
        if self._status is None or self._status[0] is grpc.StatusCode.OK:
            return None
        code, details, trailing = self._status
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)

    async def heard(self, saying: Awaitable[T]) -> T:
        """What `saying`, a write or a read of the call, comes to.

        AioRpcError with the status of the other end, also where the call had ended before the write began, which grpc.aio answers with
        InvalidStateError; that one is left where there is no status to tell.
        """
        try:
            return await saying
        except grpc.aio.AioRpcError as error:
            raise self.of(error) from None
        except asyncio.InvalidStateError:
            told = self.error()
            if told is None:
                raise
            raise told from None


def let_go(call: grpc.aio.Call) -> None:
    """Cancel a call for good. To be called once nobody wants to know its status any more.

    grpc's own `cancel` does nothing where a write has failed, since it then holds the call to be over; below, the call stays open for as
    long as messages of the other end lie unread, and with it a task.
    """
    if call.cancel() or _ready(call.code()) is not grpc.StatusCode.INTERNAL:
        return
    below: Any = getattr(call, "_cython_call", None)  # Any: there is no public way
    if below is not None:
        below.cancel("let go")


def _ready(coroutine: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        value: T = ended.value
        return value
    coroutine.close()
    raise RuntimeError("The status of a call that has ended is not there.")

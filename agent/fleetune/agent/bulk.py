"""What chunk streams of both directions share: which errors are worth another try, and how long to wait before it."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import grpc.aio

from fleetune.agent.backoff import Backoff
from fleetune.errors import UnreachableError, WireError
from fleetune.waiting import happened

LOG = logging.getLogger(__name__)

STRANGE_TRIES_MAX = 5
"""Tries in a row without a byte of progress after errors that may be a bug of the other side, or damage on the way."""

CALL_DEADLINE_S = 20.0
"""Of a unary call. Streams have none: an upload may wait long to be admitted, and a dead peer is noticed by the keep-alive pings."""

T = TypeVar("T")


class Verdict(enum.Enum):
    # The coordinator is away, busy or full: it will come back, so try for ever.
    WAIT = "wait"
    # Should not happen twice: try a few times.
    STRANGE = "strange"
    # The same answer will come again.
    FINAL = "final"


_VERDICTS = {
    grpc.StatusCode.UNAVAILABLE: Verdict.WAIT,
    grpc.StatusCode.DEADLINE_EXCEEDED: Verdict.WAIT,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Verdict.WAIT,
    grpc.StatusCode.ABORTED: Verdict.WAIT,
    # A server that stops cancels the calls it has.
    grpc.StatusCode.CANCELLED: Verdict.WAIT,
    grpc.StatusCode.INTERNAL: Verdict.STRANGE,
    grpc.StatusCode.UNKNOWN: Verdict.STRANGE,
    grpc.StatusCode.DATA_LOSS: Verdict.STRANGE,
    grpc.StatusCode.OUT_OF_RANGE: Verdict.STRANGE,
    # Also the answer to a damaged chunk.
    grpc.StatusCode.INVALID_ARGUMENT: Verdict.STRANGE,
}


def verdict(code: grpc.StatusCode) -> Verdict:
    return _VERDICTS.get(code, Verdict.FINAL)


class TransferError(UnreachableError):
    """A transfer that will not succeed by trying again."""


class Retry:
    """Retries one transfer. `wake` cuts the wait, for example because the control stream is back."""

    def __init__(self, subject: str, wake: asyncio.Event) -> None:
        self._subject = subject
        self._wake = wake
        self._backoff = Backoff()
        self._strange = 0
        self._position = 0

    def progressed(self, position: int) -> None:
        """The receiver holds the bytes up to `position`: if that is further than ever, what failed before does not count any more."""
        if position > self._position:
            self._position = position
            self._backoff.reset()
            self._strange = 0

    async def run(self, attempt: Callable[[int], Awaitable[T]]) -> T:
        """Calls `attempt(number)` until it returns. TransferError for a final answer; other errors pass."""
        number = 0
        while True:
            try:
                return await attempt(number)
            except grpc.aio.AioRpcError as error:
                cause = f"{error.code().name}: {error.details()}"
                found = verdict(error.code())
                origin: Exception = error
            except WireError as error:
                cause, found, origin = str(error), Verdict.STRANGE, error
            if found is Verdict.STRANGE:
                self._strange += 1
            if found is Verdict.FINAL or self._strange >= STRANGE_TRIES_MAX:
                tries = f" after {self._strange} tries" if self._strange else ""
                raise TransferError(f"{self._subject} failed{tries}: {cause}.") from origin
            number += 1
            wait_s = self._backoff.next_s()
            level = logging.WARNING if number == 1 or found is Verdict.STRANGE else logging.DEBUG
            LOG.log(level, "transfer cut, trying again subject=%r try=%d wait_s=%.2f cause=%r", self._subject, number, wait_s, cause)
            await self._wait(wait_s)

    async def _wait(self, wait_s: float) -> None:
        self._wake.clear()
        await happened(self._wake, wait_s)

"""Keeping an upload to its rate: a token bucket, whose rate may change while bytes wait."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from fleetune.waiting import happened

PIECE_BYTES_MAX = 64 << 10
PIECE_BYTES_MIN = 4 << 10
PIECE_S = 0.05
"""A piece takes no longer than this at its rate, as far as the sizes allow: the link sends each at its own rate once it may go."""

BURST_PIECES = 2
"""What may go at once after a wait in which nothing was sent."""

RATE_MIN_BITS_PER_S = 1000.0
"""A slower wish is taken for this: an upload must come to an end."""


class TokenBucket:
    """Tokens are bytes. They begin at none, so that n bytes are through after n / rate seconds and not a burst before.

    A piece larger than the burst may go once the bucket is full, and leaves a debt. `clock` gives seconds.
    """

    def __init__(self, bits_per_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bytes_per_s = rate_of(bits_per_s)
        self._tokens = 0.0
        self._counted_s = clock()

    @property
    def bytes_per_s(self) -> float:
        """0 is no bound."""
        return self._bytes_per_s

    @property
    def piece_bytes(self) -> int:
        """How much to send at a time."""
        return int(min(PIECE_BYTES_MAX, max(PIECE_BYTES_MIN, self._bytes_per_s * PIECE_S)))

    def set_rate(self, bits_per_s: float) -> None:
        """From now on; what has been saved up until now stays, as far as the new burst allows. 0 is no bound."""
        self._count()
        self._bytes_per_s = rate_of(bits_per_s)
        self._tokens = min(self._tokens, self._burst_bytes)

    def empty(self) -> None:
        """Begin with nothing saved up, as an upload does."""
        self._tokens = min(self._tokens, 0.0)
        self._counted_s = self._clock()

    def wait_s(self, size_bytes: int) -> float:
        """Seconds until a piece may go; 0 is now."""
        if not self._bytes_per_s:
            return 0.0
        self._count()
        missing = min(float(size_bytes), self._burst_bytes) - self._tokens
        return max(0.0, missing / self._bytes_per_s)

    def take(self, size_bytes: int) -> None:
        """A piece goes."""
        if self._bytes_per_s:
            self._count()
            self._tokens -= size_bytes

    @property
    def _burst_bytes(self) -> float:
        return float(BURST_PIECES * self.piece_bytes)

    def _count(self) -> None:
        now_s = self._clock()
        if self._bytes_per_s:
            self._tokens = min(self._burst_bytes, self._tokens + max(0.0, now_s - self._counted_s) * self._bytes_per_s)
        self._counted_s = now_s


class Pace:
    """The rate of one task's upload. Owner of its bucket; whoever waits hears of a new rate at once."""

    def __init__(self, bits_per_s: float) -> None:
        self.bucket = TokenBucket(bits_per_s)
        self._changed = asyncio.Event()

    def set_rate(self, bits_per_s: float) -> None:
        self.bucket.set_rate(bits_per_s)
        self._changed.set()

    async def admit(self, size_bytes: int) -> None:
        """Returns when a piece may go."""
        # A wait that rounds to nothing would spin.
        while (wait_s := self.bucket.wait_s(size_bytes)) > 1e-6:
            self._changed.clear()
            await happened(self._changed, wait_s)
        self.bucket.take(size_bytes)


def rate_of(bits_per_s: float) -> float:
    """Bytes a second of what was wished; 0 for no bound, which is also what a wish that makes no sense is taken for."""
    if math.isnan(bits_per_s) or math.isinf(bits_per_s) or bits_per_s <= 0:
        return 0.0
    return max(bits_per_s, RATE_MIN_BITS_PER_S) / 8

"""What the link carries, learned from the transfers that happen anyway."""

from __future__ import annotations

import math
from collections import deque

from fleetune.agent.probe.freshness import NEWEST_WEIGHT, percentile

BYTES_MIN = 256 * 1024
"""Shorter transfers measure the way there and back, and TCP's slow start, rather than the rate."""

SAMPLES_KEPT = 32


class Goodput:
    """Payload bytes per second in one direction. Owned by one task."""

    def __init__(self) -> None:
        self._average: float | None = None
        self._samples: deque[float] = deque(maxlen=SAMPLES_KEPT)

    def add(self, size_bytes: int, seconds: float, limit_bytes_per_s: float = math.inf, *, at_least: bool = False) -> bool:
        """Whether this counted: one transfer that has ended, the bytes that really went, without those that a resumption spared.

        `limit_bytes_per_s` is the rate it was held to, if any: a transfer at its limit says nothing of the link. Nor does one whose time
        holds other things than sending (`at_least`), unless it was faster than the link is known to be.
        """
        if size_bytes < BYTES_MIN or not (math.isfinite(seconds) and seconds > 0):
            return False
        rate = size_bytes / seconds
        held_back = at_least or rate > 0.9 * limit_bytes_per_s
        if held_back and self._average is not None and rate < self._average:
            return False
        self._samples.append(rate)
        self._average = rate if self._average is None else (1 - NEWEST_WEIGHT) * self._average + NEWEST_WEIGHT * rate
        return True

    def recall(self, bytes_per_s: float) -> None:
        """What was known before a restart, where nothing is known yet."""
        if self._average is None and math.isfinite(bytes_per_s) and bytes_per_s > 0:
            self._average = bytes_per_s

    @property
    def bytes_per_s(self) -> float | None:
        """The moving average; None before the first transfer of some size."""
        return self._average

    @property
    def slow_bytes_per_s(self) -> float | None:
        """The rate that one transfer in ten stays below."""
        return percentile(tuple(self._samples), 0.1) if self._samples else None

    @property
    def samples(self) -> int:
        return len(self._samples)


class RoundTrip:
    """Seconds from a message to its answer. The smallest of the last ones is the way; what lies above it is waiting in queues."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES_KEPT)

    def add(self, seconds: float) -> None:
        if math.isfinite(seconds) and seconds >= 0:
            self._samples.append(seconds)

    @property
    def least_s(self) -> float | None:
        return min(self._samples, default=None)

    @property
    def median_s(self) -> float | None:
        return percentile(tuple(self._samples), 0.5) if self._samples else None

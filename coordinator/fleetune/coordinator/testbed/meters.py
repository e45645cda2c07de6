"""Counters that were read now and then, and that a restart sets back to zero: how much they grew, until when."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleetune.coordinator.testbed.backend import Sample
from fleetune.coordinator.testbed.record import Sampled


@dataclass(frozen=True)
class Meter:
    """What one counter has counted since it was first read: (seconds, sum) pairs, both growing. Empty where nobody could read it."""

    points: tuple[tuple[float, float], ...]

    @property
    def known(self) -> bool:
        return bool(self.points)

    @property
    def total(self) -> float:
        return self.points[-1][1] if self.points else 0.0

    def until(self, at_s: float) -> float:
        """The sum at a moment, in proportion between two readings; the whole of it after the last one."""
        place = bisect.bisect_right(self.points, at_s, key=lambda point: point[0]) if self.points else 0
        if place == 0:
            return 0.0
        begin_s, before = self.points[place - 1]
        if place == len(self.points):
            return before
        end_s, after = self.points[place]
        return before + (after - before) * (at_s - begin_s) / (end_s - begin_s)

    def fastest(self, at_least_s: float = 0.9) -> float | None:
        """The highest growth in a second between two neighbouring readings that are `at_least_s` apart."""
        pairs = itertools.pairwise(self.points)
        rates = [(after - before) / (end_s - begin_s) for (begin_s, before), (end_s, after) in pairs if end_s - begin_s >= at_least_s]
        return max(rates, default=None)


def meter(samples: Sequence[Sampled], member: str, read: Callable[[Sample], float | None], origin_unix_s: float) -> Meter:
    """Of one member. A reading below the one before is a counter that began anew: all of it has been counted since."""
    points: list[tuple[float, float]] = []
    last = total = 0.0
    for sampled in samples:
        sample = sampled.members.get(member)
        value = read(sample) if sample is not None else None
        at_s = sampled.at_unix_s - origin_unix_s
        if value is None or (points and at_s <= points[-1][0]):
            continue
        if points:
            total += value - last if value >= last else value
        last = value
        points.append((at_s, total))
    return Meter(tuple(points))

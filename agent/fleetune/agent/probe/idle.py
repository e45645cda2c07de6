"""How much of the machine other programs use."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import psutil

WINDOW_S = 30.0
"""Long enough that opening a page is no "in use", short enough that a person who sits down is noticed."""

MEASURED_S_MIN = 4.0
"""Below this, ticks of the kernel's clock and of ours make the figure noise."""


@dataclass(frozen=True)
class Sample:
    """CPU seconds since the start, over all cores: of everybody, the possible ones, and of this agent with its children."""

    at_s: float
    busy_s: float
    possible_s: float
    own_s: float


class OthersLoad:
    """CPU load of everybody else over the last half minute. Owned by one caller, which samples it at its own rhythm."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def percent(self, now_s: float) -> float | None:
        """0 to 100 over all cores of the machine; None until it was measured long enough. `now_s` is a monotonic clock."""
        return self.add(sample(now_s))

    def add(self, latest: Sample) -> float | None:
        """The figure after one more sample."""
        self._samples.append(latest)
        # One sample at or before the window's edge stays, so that the whole window is covered.
        while len(self._samples) > 2 and self._samples[1].at_s <= latest.at_s - WINDOW_S:
            self._samples.popleft()
        first = self._samples[0]
        possible_s = latest.possible_s - first.possible_s
        if latest.at_s - first.at_s < MEASURED_S_MIN or possible_s <= 0:
            return None
        others_s = (latest.busy_s - first.busy_s) - (latest.own_s - first.own_s)
        return min(100.0, max(0.0, 100.0 * others_s / possible_s))


def sample(now_s: float) -> Sample:
    """The counters now."""
    times = psutil.cpu_times()
    possible_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    busy_s = possible_s - times.idle - getattr(times, "iowait", 0.0)
    return Sample(now_s, busy_s, possible_s, _own_s())


def _own_s() -> float:
    """CPU seconds of this process and all its descendants, also of those that have ended: a reaped child counts in its parent."""
    me = psutil.Process()
    total_s = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total_s += times.user + times.system + times.children_user + times.children_system
    return total_s

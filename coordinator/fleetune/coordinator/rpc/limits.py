"""How fast one device may talk: a bucket that fills with time, and patience with who draws more than that. Pure: `now` is an argument."""

from __future__ import annotations

from fleetune.coordinator.principal import Principal

MESSAGES_PER_S = 100.0
"""On one control stream, in the long run. An agent sends a heartbeat and a few words of progress a second."""

BURST = 1000.0
"""After a reconnect an agent may have the outcomes and logs of many tasks to tell."""

PERSISTS_S = 60.0
"""Who has been held back all the time for so long floods on purpose, or is broken."""


class Bucket:
    """Of one stream: `draw` for each message."""

    def __init__(self, now_s: float, rate: float = MESSAGES_PER_S, burst: float = BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at_s = now_s
        self._empty_since_s: float | None = None

    def draw(self, now_s: float) -> float:
        """Take one message; how long to wait before the next is read, seconds. Meanwhile flow control holds the other end."""
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        self._left -= 1.0
        if self._left >= 0.0:
            if self._left >= self._burst / 10:
                self._empty_since_s = None
            return 0.0
        if self._empty_since_s is None:
            self._empty_since_s = now_s
        return -self._left / self._rate

    def floods(self, now_s: float) -> bool:
        """Whether it has been drawn from without a pause for too long."""
        return self._empty_since_s is not None and now_s - self._empty_since_s > PERSISTS_S

    def take(self, now_s: float) -> bool:
        """Take one if there is one. Who asks in vain owes nothing for it."""
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


PROBES_PER_S = 1 / 120
"""Of one device, in the long run: it probes when it joins, and else knows its link from what it sends anyway."""

PROBES_BURST = 5.0

PROBES_AT_ONCE = 8
"""Of all devices: they measure one another, and take bandwidth from who has something to send."""

CALLERS_KEPT = 4096


class Probes:
    """Who may measure its way up now."""

    def __init__(self) -> None:
        self.open = 0
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def objection(self, caller: Principal, now_s: float) -> str:
        """Why not now, for a person; an empty string takes one of the caller's probes. A server without TLS cannot tell callers apart."""
        if self.open >= PROBES_AT_ONCE:
            return f"{PROBES_AT_ONCE} devices are measuring their links just now; try again later"
        if caller.kind == "local":
            return ""
        key = (caller.kind, caller.name)
        if key not in self._buckets:
            if len(self._buckets) >= CALLERS_KEPT:
                self._buckets.clear()
            self._buckets[key] = Bucket(now_s, PROBES_PER_S, PROBES_BURST)
        if self._buckets[key].take(now_s):
            return ""
        return f"this device may measure its link {PROBES_BURST:g} times, then every {1 / PROBES_PER_S:g} s; try again later"

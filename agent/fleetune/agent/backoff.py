"""Waiting before another try: full jitter, so that a fleet does not come back all at once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from fleetune.wire.channel import BACKOFF_MAX_S, BACKOFF_MIN_S


@dataclass
class Backoff:
    """Grows with every failure in a row. Owned by the loop that retries."""

    min_s: float = BACKOFF_MIN_S
    max_s: float = BACKOFF_MAX_S
    failures: int = 0
    rng: random.Random = field(default_factory=random.Random)

    def next_s(self) -> float:
        """Seconds to wait after one more failure: evenly spread up to the doubled bound, never under `min_s`."""
        bound_s = min(self.max_s, self.min_s * 2.0 ** min(self.failures + 1, 16))
        self.failures += 1
        return self.rng.uniform(self.min_s, bound_s)

    def reset(self) -> None:
        self.failures = 0

"""How often a stage tells how far it is."""

from __future__ import annotations

import math
import time

from fleetune.child.entry import Emit

PROGRESS_INTERVAL_S = 0.25


class Pace:
    """Sends progress events of one stage, at most four a second, and always the last."""

    def __init__(self, emit: Emit, stage: str) -> None:
        self._emit = emit
        self._stage = stage
        self._sent_at = -math.inf

    def due(self, done: int, total: int) -> bool:
        """Whether `at` would send now."""
        return done >= total or time.monotonic() - self._sent_at >= PROGRESS_INTERVAL_S

    def at(self, done: int, total: int, loss: float | None = None) -> None:
        if not self.due(done, total):
            return
        self._sent_at = time.monotonic()
        extra = {} if loss is None else {"loss": loss}
        self._emit("progress", stage=self._stage, done=done, total=total, **extra)

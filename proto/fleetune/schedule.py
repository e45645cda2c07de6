"""The learning rate of each optimiser step of a job, over all its rounds."""

from __future__ import annotations

import math

from fleetune.errors import UnsupportedError

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(step: int, *, peak: float, name: str, warmup_steps: int, total_steps: int, offset: int) -> float:
    """Rate of step `step` (from 0) of a round that begins after `offset` steps of the job.

    Rises linearly to `peak` over `warmup_steps`, reaching it in the last of them, then stays (constant) or falls towards 0,
    which it would reach in the step after the job's last (linear, cosine).

    >>> [learning_rate(s, peak=1.0, name="linear", warmup_steps=2, total_steps=6, offset=0) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    position = offset + step
    if position < warmup_steps:
        return peak * (position + 1) / warmup_steps
    if name == "constant":
        return peak
    done = min(1.0, (position - warmup_steps) / max(1, total_steps - warmup_steps))
    if name == "linear":
        return peak * (1.0 - done)
    if name == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    raise UnsupportedError(f"schedule {name!r} is not known; allowed: {', '.join(SCHEDULES)}.", "Correct `schedule` in the job.")

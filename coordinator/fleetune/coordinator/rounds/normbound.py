"""How large an update may be: a multiple of the median norm of the updates that the last committed rounds folded.

The bound of a round is fixed when the round is opened, from rounds that are over. The simple version, a median over what has arrived so
far, would let the first sender decide what the others may send, and the outcome would depend on who is faster.

In planned rounds devices train different blocks, whose updates differ in size by their nature: each is held to those of the same blocks.
Gradients are held to no norm. Theirs are of one batch: late in a training most batches have hardly any, and one row that the model gets
wrong has a hundred times as much, so a bound would refuse honest devices.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

ROUNDS = 3
"""Committed rounds that the median is taken of."""

OFFENCES = 3
"""Updates beyond the bound after which a device is quarantined: it gets no more train tasks of the job."""


def limit(folded: Sequence[Sequence[float]], factor: float) -> float:
    """The largest norm allowed. `folded` holds the norms of each committed round's updates; 0 is no bound.

    None is set by `factor` 0, before the first committed round, and where the median is 0: then any step would be too large.
    """
    norms = [norm for of_round in folded[-ROUNDS:] for norm in of_round]
    return factor * statistics.median(norms) if norms and factor > 0 else 0.0


def blocks_key(depths: Sequence[int]) -> str:
    """Names a part of a planned round among those of other rounds: only updates of the same blocks are compared."""
    return ",".join(str(depth) for depth in sorted(depths))


def objection(norm: float, limit: float, factor: float) -> str:
    """What is wrong with an update of this norm, or an empty string."""
    if limit <= 0 or norm <= limit:
        return ""
    return (
        f"the update's norm is {norm:.3g}; at most {limit:.3g} is allowed, {factor:g} times the median of the last rounds' updates "
        "(rounds.update_norm_bound). Look at the device's rows, or raise the bound."
    )

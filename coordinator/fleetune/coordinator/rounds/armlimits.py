"""What a device's memory leaves of the arms that it may be given: by what its last round took, and by what it ran out of memory with; pure.

The peak of a round is that of the device's last counted round, less the weights that would be cut since, plus what a rank more needs:

    peak(rho, r) = peak_0 - P (rho - rho_0) + q (r (1 - rho) - r_0 (1 - rho_0))

Activations are left at what they were, so that the prediction errs to the safe side where more is cut. What none of this foresees is
learned the hard way: an arm that a device ran out of memory with is not given again, nor is a larger one.

| symbol | name |
| --- | --- |
| peak_0 | `Memory.peak_bytes` |
| P, q | `Memory.prunable_bytes`, `Memory.rank_bytes` |
| rho_0, r_0 | `Memory.sparsity`, `Memory.rank` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fleetune.coordinator.figures import bytes_text
from fleetune.coordinator.rounds import bandit
from fleetune.coordinator.rounds.bandit import MEMORY_SHARE, Arm

Allowed = Callable[[float, int], bool]
"""Whether an arm of this pace and rank is one; if so, one of a higher pace and one of a lower rank is, too."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's training process in its last counted round, at this sparsity and rank; never 0."""

    peak_bytes: float
    room_bytes: float
    """What was free for it, its own bytes among them."""
    prunable_bytes: float
    """Of everything in the whole model that may be cut, as the device has loaded it."""
    rank_bytes: float
    """Of a unit of rank over the whole model: matrices, gradients, moments."""
    sparsity: float
    rank: int


@dataclass(frozen=True)
class Ceiling:
    """What is left of the arms of a device that has run out of memory: ranks up to one, paces from one on."""

    rank_max: int
    pace_min: float


BYTES_MAX = 2.0**50
"""Of anything that a device tells of its memory; more is a mistake."""

NO_CEILING = Ceiling(1 << 30, 0.0)


def told(metrics: Mapping[str, float], sparsity: float, rank: int) -> Memory | None:
    """What an update says of its device's memory; None where it does not."""
    peak, room, prunable, each = (metrics.get(name, 0.0) for name in ("peak_bytes", "room_bytes", "prunable_bytes", "rank_bytes"))
    known = all(0 < figure <= BYTES_MAX for figure in (peak, room, prunable, each))
    return Memory(peak, room, prunable, each, sparsity, rank) if known else None


def predicted_bytes(memory: Memory, sparsity: float, rank: int) -> float:
    """Peak of a round whose first steps run at this sparsity."""
    cut = memory.prunable_bytes * (sparsity - memory.sparsity)
    pairs = memory.rank_bytes * (rank * (1.0 - sparsity) - memory.rank * (1.0 - memory.sparsity))
    return memory.peak_bytes - cut + pairs


def limited(memory: Memory | None, ceiling: Ceiling, sparsity_of: Callable[[float], float], allowed: Allowed) -> Allowed:
    """`allowed`, and within the device's memory. `sparsity_of(pace)` is that of a round's first steps."""

    def within(pace: float, rank: int) -> bool:
        if rank > ceiling.rank_max or pace < ceiling.pace_min or not allowed(pace, rank):
            return False
        return memory is None or predicted_bytes(memory, sparsity_of(pace), rank) <= MEMORY_SHARE * memory.room_bytes

    return within


def lowered(ceiling: Ceiling, arm_rank: int, rank_min: int) -> Ceiling:
    """After the device has run out of memory with an arm: half its rank at most; with the least rank the most is to be cut."""
    if arm_rank > rank_min:
        return replace(ceiling, rank_max=min(ceiling.rank_max, max(rank_min, arm_rank // 2)))
    return Ceiling(rank_min, 1.0)


def bounded(ceiling: Ceiling, settings: bandit.Settings, arm: Arm) -> Arm:
    """An arm that was not drawn, under the ceiling."""
    rank, pace = max(settings.rank_min, min(arm.rank, ceiling.rank_max)), max(arm.pace, ceiling.pace_min)
    if (rank, pace) == (arm.rank, arm.pace):
        return arm
    return Arm(pace, rank, pace, min(1.0, max(0.0, bandit.height_of(settings, rank))))


def note(memory: Memory | None, ceiling: Ceiling, sparsity_of: Callable[[float], float], arm: Arm) -> str:
    """What a person should know of an arm and the device's memory; empty where there is nothing: it is not short."""
    if memory is not None:
        needed, room = predicted_bytes(memory, sparsity_of(arm.pace), arm.rank), MEMORY_SHARE * memory.room_bytes
        if needed > room:
            return f"short of memory: this arm needs about {bytes_text(needed)}, {bytes_text(room)} may be taken"
    if ceiling != NO_CEILING:
        return f"ran out of memory before: rank {ceiling.rank_max} at most" + (", pruned as fast as may be" if ceiling.pace_min > 0 else "")
    return ""

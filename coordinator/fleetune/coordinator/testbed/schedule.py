"""From faults to timed acts: a pure function of the chaos file and the testbed, the same at every run."""

# A fault is drawn for its time and its target with a generator of its own, seeded by the file's seed and its place in the file: to add
# a fault at the end moves none of those before. Then faults are taken in the order of time. One that meets a member still in another
# fault waits for its end: two faults of one member never overlap, so undoing one cannot undo the other.

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fleetune.coordinator.testbed.backend import FaultKind
from fleetune.coordinator.testbed.chaosfile import Chaos, Fault, candidates
from fleetune.coordinator.testbed.spec import TestbedSpec

Verb = Literal["kill", "restart", "pause", "resume", "cut", "mend", "throttle", "unthrottle", "fill_disk", "free_disk", "out_of_memory"]

UNDONE: dict[FaultKind, Verb] = {
    "kill": "restart",
    "pause": "resume",
    "cut": "mend",
    "throttle": "unthrottle",
    "fill_disk": "free_disk",
}
"""What ends each fault; what is not here ends by itself."""

GAP_S = 1.0
"""Between the end of a fault and the next of the same member."""

OUT_OF_MEMORY_S = 10.0
"""How long a member counts as busy with an out-of-memory, which ends by itself."""

ACTS_MAX = 10_000


@dataclass(frozen=True)
class Act:
    """One thing done to one member, `at_s` after the first round's begin."""

    at_s: float
    member: str
    verb: Verb
    to_mbit: float | None = None


def acts(chaos: Chaos, spec: TestbedSpec) -> tuple[Act, ...]:
    """All acts in the order of time, each fault's end included."""
    drawn: list[tuple[float, int, Fault, str]] = []
    for place, fault in enumerate(chaos.faults):
        # A text seeds by its digest, hence alike on every machine.
        rng = random.Random(f"{chaos.seed}/{place}")
        members = candidates(fault, spec)
        drawn += [(at_s, place, fault, rng.choice(members)) for at_s in _times(fault, rng)]
    drawn.sort(key=lambda item: item[:2])
    free_s: dict[str, float] = {}
    found: list[Act] = []
    for at_s, _, fault, member in drawn[: ACTS_MAX // 2]:
        begin_s = round(max(at_s, free_s.get(member, 0.0)), 3)
        end_s = round(begin_s + (fault.for_s or OUT_OF_MEMORY_S), 3)
        found.append(Act(begin_s, member, fault.kind, fault.to_mbit if fault.kind == "throttle" else None))
        if undone := UNDONE.get(fault.kind):
            found.append(Act(end_s, member, undone))
        free_s[member] = end_s + GAP_S
    return tuple(sorted(found, key=lambda act: act.at_s))


def _times(fault: Fault, rng: random.Random) -> Sequence[float]:
    if fault.every_s is None:
        return [] if fault.at_s is None else [fault.at_s]
    found: list[float] = []
    at_s = rng.expovariate(1.0 / fault.every_s)
    while at_s < fault.until_s and len(found) < ACTS_MAX:
        found.append(at_s)
        at_s += rng.expovariate(1.0 / fault.every_s)
    return found

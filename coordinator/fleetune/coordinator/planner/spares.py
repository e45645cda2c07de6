"""Hot spares: the idle device that would take over a block soonest, if its own device leaves or falls behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fleetune.coordinator.planner.links import send_s
from fleetune.coordinator.planner.plan import Plan
from fleetune.coordinator.planner.problem import Fleet, Ints


@dataclass(frozen=True)
class Spare:
    """An idle device, and when it would finish, from its own start, with the share of the device whose block it takes."""

    device: str
    finish_seconds: float


def spares(fleet: Fleet, plan: Plan) -> Mapping[str, Spare]:
    """The best spare of each assigned block; blocks that no idle device can take are left out. Two blocks may name the same spare."""
    row = {name: index for index, name in enumerate(fleet.devices)}
    column = {name: index for index, name in enumerate(fleet.blocks)}
    idle: Ints = np.array(sorted((row[name] for name in plan.idle_devices), key=lambda index: fleet.devices[index]), dtype=np.intp)
    found: dict[str, Spare] = {}
    usable = fleet.usable
    for assignment in plan.assignments if idle.size else ():
        block = column[assignment.block]
        shares = np.minimum(assignment.share, fleet.max_share[idle])
        sent = send_s(np.full(idle.size, fleet.payload_bits[block]), shares, fleet.bits_per_unit[idle], fleet.snr_hz[idle])
        finish = np.where(usable[idle, block], fleet.ready_s[idle, block] + sent, np.inf)
        best = int(finish.argmin())
        if np.isfinite(finish[best]):
            found[assignment.block] = Spare(fleet.devices[int(idle[best])], float(finish[best]))
    return found

"""Why each device got what it got, in sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fleetune.coordinator.planner.links import send_s
from fleetune.coordinator.planner.plan import Assignment, Plan
from fleetune.coordinator.planner.problem import Fleet
from fleetune.coordinator.planner.spares import Spare, spares

_CRITICAL = 1.0 - 1e-9


@dataclass(frozen=True)
class Explanation:
    """One sentence or two on a device, or on a block that stays uncovered."""

    kind: str
    name: str
    text: str


def explanations(fleet: Fleet, plan: Plan) -> tuple[Explanation, ...]:
    """First the assigned devices in the order of their blocks, then idle devices, then uncovered blocks."""
    row = {name: index for index, name in enumerate(fleet.devices)}
    column = {name: index for index, name in enumerate(fleet.blocks)}
    usable = fleet.usable
    able = usable.sum(axis=0)
    substitutes = spares(fleet, plan)
    found: list[Explanation] = []
    if plan.solver == "best-single" and plan.assignments:
        chosen = plan.assignments[0]
        text = f"trains all {len(plan.assignments)} planned blocks in one backward pass and is alone on the uplink"
        found.append(Explanation("device", chosen.device, f"{text}: the soonest of {len(fleet.devices)} devices to finish them."))
    else:
        for assignment in plan.assignments:
            text = _assigned(fleet, plan, assignment, int(able[column[assignment.block]]), row[assignment.device])
            spare = substitutes.get(assignment.block)
            found.append(Explanation("device", assignment.device, f"{text} {_spare(spare)}"))
    for device in plan.idle_devices:
        found.append(Explanation("device", device, _idle(fleet, plan, row[device], column)))
    for block in plan.uncovered_blocks:
        count = int(able[column[block]])
        text = "no device can hold it and send it" if not count else f"the {count} device(s) that can take it are needed by other blocks"
        found.append(Explanation("block", block, f"stays uncovered this round: {text}. Its weights do not change."))
    return tuple(found)


def _assigned(fleet: Fleet, plan: Plan, assignment: Assignment, able: int, device: int) -> str:
    round_s = plan.round_seconds or 0.0
    last = assignment.finish_seconds >= round_s * _CRITICAL
    part = assignment.share / fleet.total if fleet.total > 0 else 0.0
    sends_s = assignment.finish_seconds - assignment.ready_seconds
    text = f"trains {assignment.block}, which {able} device(s) can take: ready after {assignment.ready_seconds:.3g} s, "
    text += f"then {part:.1%} of the uplink sends it in {sends_s:.3g} s"
    if assignment.share >= fleet.max_share[device] * _CRITICAL:
        text += ", as much as this device can use"
    return text + (", just in time for the end of the round." if last else f", {round_s - assignment.finish_seconds:.3g} s before the end.")


def _spare(spare: Spare | None) -> str:
    if spare is None:
        return "No idle device could take over."
    return f"{spare.device} could take over and would need {spare.finish_seconds:.3g} s with the same share."


def _idle(fleet: Fleet, plan: Plan, device: int, column: dict[str, int]) -> str:
    usable = fleet.usable[device]
    if not fleet.fits[device].any():
        return "stays idle: no block fits into its memory."
    if not usable.any():
        return "stays idle: its link carries nothing."
    wanted = [assignment for assignment in plan.assignments if usable[column[assignment.block]]]
    if not wanted or plan.solver == "best-single":
        return "stays idle: no planned block needs it."
    # Where it comes nearest to the device that was chosen.
    columns = np.array([column[assignment.block] for assignment in wanted], dtype=np.intp)
    shares = np.minimum(np.array([assignment.share for assignment in wanted]), fleet.max_share[device])
    sent = send_s(fleet.payload_bits[columns], shares, fleet.bits_per_unit[[device]], fleet.snr_hz[[device]])
    finish = fleet.ready_s[device, columns] + sent
    lag = finish - np.array([assignment.finish_seconds for assignment in wanted])
    nearest = int(lag.argmin())
    chosen = wanted[nearest]
    text = f"stays idle: it would come nearest on {chosen.block}, in {finish[nearest]:.3g} s with the share of {chosen.device}"
    return f"{text}, which takes {chosen.finish_seconds:.3g} s."

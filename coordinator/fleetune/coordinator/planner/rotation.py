"""Rotation: on data that differ between devices, no device may train the same block again and again.

A pair that was used in one of the last R rounds is forbidden. Where that would leave a block uncovered that could be covered, R is
lowered for this round, and where it costs time, the result says how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fleetune.coordinator.planner.matching import priority_cover
from fleetune.coordinator.planner.plan import Plan, SolverName, plan
from fleetune.coordinator.planner.problem import Bools, Fleet


@dataclass(frozen=True)
class Rotated:
    """The plan; how many past rounds it avoids; and by which part its round is longer than the best without rotation (0.1: a tenth)."""

    plan: Plan
    rounds_avoided: int
    longer_by: float


def plan_rotated(
    fleet: Fleet, history: Sequence[Mapping[str, str]], rounds: int, solver: SolverName = "exact", *, seed: int = 0
) -> Rotated:
    """`history` maps block to device for each past round, the newest last; at most the last `rounds` of them are avoided."""
    free = plan(fleet, solver, seed=seed)
    wanted = set(free.uncovered_blocks)
    for avoided in range(min(rounds, len(history)), 0, -1):
        turned = fleet.forbidding(_used(fleet, history[-avoided:]))
        covered = priority_cover(turned.by_name().usable, turned.rounds_since_trained)
        if {block for index, block in enumerate(fleet.blocks) if index not in covered} != wanted:
            continue
        made = plan(turned, solver, seed=seed)
        if set(made.uncovered_blocks) == wanted:
            return Rotated(made, avoided, _longer(made, free))
    return Rotated(free, 0, 0.0)


def _used(fleet: Fleet, rounds: Sequence[Mapping[str, str]]) -> Bools:
    used = np.zeros(fleet.fits.shape, dtype=np.bool_)
    row = {name: index for index, name in enumerate(fleet.devices)}
    for past in rounds:
        for column, block in enumerate(fleet.blocks):
            device = past.get(block)
            if device in row:
                used[row[device], column] = True
    return used


def _longer(made: Plan, free: Plan) -> float:
    if not made.round_seconds or not free.round_seconds:
        return 0.0
    return made.round_seconds / free.round_seconds - 1.0

"""From what devices and links have told to the plan of a round: who trains which depths, with how much of the uplink. Pure.

A plan follows from its request alone: figures, links, the table of blocks, the job's settings. Four layouts:

    blocks         one block each (DEFT proper): the planner's solvers, with rotation
    depth          from the loss down to a depth each, several devices to a block (`planner.depthwise`)
    data-parallel  everything, on every device that holds it
    single         everything, on the device that is done first

`auto` plans all four and takes the one that needs the fewest seconds for a row's full gradient (a row that trains d of L blocks counts
d / L); one that leaves blocks out only where every one does, and the simplest of those within `AS_GOOD` of the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from fleetune.coordinator.domain import Candidate, DeviceFigures, Layout, PlannedPart, PlanRequest, RoundPlan
from fleetune.coordinator.figures import bytes_text
from fleetune.coordinator.planner import depthwise
from fleetune.coordinator.planner.plan import plan as plan_fleet
from fleetune.coordinator.planner.problem import Fleet, Floats, Ints, fleet_of
from fleetune.coordinator.planner.rotation import plan_rotated
from fleetune.coordinator.planner.split import Pairs, split_pairs
from fleetune.coordinator.rounds import timing

AS_GOOD = 1.01
"""A layout whose seconds are within this factor of the best one's is as good: predictions are not that exact."""

IDLE_NAMES_MAX = 20
"""Kept with a round, as every answer about it holds them."""

LAYOUTS: tuple[Layout, ...] = ("single", "data-parallel", "blocks", "depth")
"""The simplest first."""

Planned = RoundPlan | str
"""A plan, or why there is none, for a person."""


def plan_round(request: PlanRequest) -> Planned:
    """The plan of a round, or why there is none. The same request gives the same plan."""
    known = [c for c in request.candidates if _knows(request.figures.get(c.device_id), len(request.blocks))]
    if not known or not request.blocks:
        return "no device has told how fast it trains this model"
    ground = _Ground.of(request, sorted(known, key=lambda c: c.device_id))
    if request.settings.layout != "auto":
        return _LAYOUTS[request.settings.layout](ground)
    return _auto(ground)


def _knows(figures: DeviceFigures | None, depths: int) -> bool:
    return figures is not None and len(figures.step_s) == depths and len(figures.step_bytes) == depths


@dataclass(frozen=True)
class _Ground:
    """A request with what all layouts need of it: `fleet` has a column for each group of depths."""

    request: PlanRequest
    candidates: Sequence[Candidate]
    groups: tuple[tuple[int, ...], ...]
    fleet: Fleet
    shared: bool
    """Whether uploads share anything at all; else each goes at its device's own rate, and no rate is told."""

    @classmethod
    def of(cls, request: PlanRequest, candidates: Sequence[Candidate]) -> _Ground:
        settings = request.settings
        groups = timing.groups(request.blocks, settings.layers_per_block)
        deepest = np.array([group[-1] - 1 for group in groups], dtype=np.intp)
        ready = np.empty((len(candidates), len(groups)))
        fits = np.empty((len(candidates), len(groups)), dtype=np.bool_)
        for row, candidate in enumerate(candidates):
            figures = request.figures[candidate.device_id]
            before_s = timing.download_s(candidate.link, request.state_bytes) + request.extra_s.get(candidate.device_id, 0.0)
            ready[row] = before_s + np.array(figures.step_s)[deepest] * timing.step_scale(figures, settings)
            held = figures.loaded_bytes + np.array(figures.step_bytes, dtype=np.float64)[deepest]
            fits[row] = held <= (figures.room_bytes or np.inf)
        bits = [math.fsum(timing.payload_bits(request.blocks[depth - 1], settings) for depth in group) for group in groups]
        rates = timing.up_rates(candidates)
        up = np.array([rates[candidate.device_id] for candidate in candidates])
        airtime = settings.resource == "airtime"
        shared = airtime or settings.uplink_bits_per_s > 0
        fleet = fleet_of(
            ready,
            bits,
            up if airtime else np.ones(len(candidates)),
            1.0 if airtime else settings.uplink_bits_per_s or float(up.sum()),
            fits=fits,
            max_share=None if airtime else up,
            rounds_since_trained=[max(request.untrained_rounds[depth - 1] for depth in group) for group in groups],
            devices=[candidate.device_id for candidate in candidates],
            blocks=[str(index) for index in range(len(groups))],
            kind="airtime" if airtime else "bit/s",
        )
        return cls(request, candidates, groups, fleet, shared)

    def part(self, device: int, columns: Sequence[int], share: float) -> PlannedPart:
        """The part of one device that trains these groups of depths with a share of the resource."""
        fleet = self.fleet
        depths = tuple(sorted(depth for column in columns for depth in self.groups[column]))
        ready = float(fleet.ready_s[device, max(columns)])
        rate = share * float(fleet.bits_per_unit[device]) if self.shared else float(fleet.max_share[device])
        bits = math.fsum(float(fleet.payload_bits[column]) for column in columns)
        finish = ready + (bits / rate if bits > 0 else 0.0)
        return PlannedPart(fleet.devices[device], depths, share, rate if self.shared else 0.0, ready, finish)

    def plan(self, layout: Layout, solver: str, parts: Sequence[PlannedPart], lower_bound_s: float | None = None) -> RoundPlan:
        ordered = tuple(sorted(parts, key=lambda part: (part.depths, part.device_id)))
        trained = {depth for part in ordered for depth in part.depths}
        busy = {part.device_id for part in ordered}
        idle = [candidate for candidate in self.candidates if candidate.device_id not in busy]
        return RoundPlan(
            layout,
            solver,
            ordered,
            max(part.finish_s for part in ordered),
            uncovered_depths=tuple(depth for depth in range(1, len(self.request.blocks) + 1) if depth not in trained),
            idle_devices=tuple(candidate.device_id for candidate in idle),
            idle_names=tuple(sorted(candidate.name for candidate in idle)[:IDLE_NAMES_MAX]),
            lower_bound_s=lower_bound_s,
        )

    def why_not(self, columns: Sequence[int], what: str) -> str:
        """Why none of the devices can train down to the deepest of these groups."""
        deepest = self.groups[max(columns)][-1]
        known = [(self.request.figures[c.device_id], c) for c in self.candidates]
        if not any(timing.fits(figures, deepest) for figures, _ in known):
            figures, nearest = min(known, key=lambda item: (_short_of(item[0], deepest), item[1].device_id))
            needed = bytes_text(figures.loaded_bytes + figures.step_bytes[deepest - 1])
            return (
                f"no device has memory for {what}: {nearest.name} comes nearest, and needs {needed} of the "
                f"{bytes_text(figures.room_bytes)} that its training may take"
            )
        return f"no device that has memory for {what} has a link to send it with"


def _short_of(figures: DeviceFigures, deepest: int) -> int:
    return figures.loaded_bytes + figures.step_bytes[deepest - 1] - figures.room_bytes


# ------------------------------------------------------------------------------------------------------------- the layouts


def _blocks(ground: _Ground) -> Planned:
    request = ground.request
    settings = request.settings
    named = [_by_group(turn, ground.groups) for turn in request.turns]
    turned = plan_rotated(ground.fleet, named, settings.rotate_rounds, settings.solver, seed=request.seed + request.round_number)
    made = turned.plan
    if not made.assignments:
        return ground.why_not([0], f"a block ({request.blocks[0].name})")
    row = {name: index for index, name in enumerate(ground.fleet.devices)}
    parts = [ground.part(row[a.device], [int(a.block)], a.share) for a in made.assignments]
    plan = ground.plan("blocks", settings.solver, parts, made.certificate.lower_bound_seconds if ground.shared else None)
    return replace(plan, rounds_avoided=turned.rounds_avoided)


def _by_group(turn: Mapping[int, str], groups: Sequence[Sequence[int]]) -> dict[str, str]:
    """A past round's devices by the name of a block, as the planner's history has them."""
    return {str(index): turn[group[-1]] for index, group in enumerate(groups) if group[-1] in turn}


def _depth(ground: _Ground) -> Planned:
    deep = depthwise.plan_depths(ground.fleet)
    if deep is None:
        return ground.why_not([0], f"a block ({ground.request.blocks[0].name})")
    shares = cast("list[float]", deep.split.shares.tolist())
    chosen = cast("list[int]", deep.chosen.tolist())
    parts = [ground.part(device, range(int(deep.depths[device])), share) for device, share in zip(chosen, shares, strict=True)]
    return ground.plan("depth", "exact" if deep.exact else "priced", parts)


def _data_parallel(ground: _Ground) -> Planned:
    fleet = ground.fleet
    everything = range(len(ground.groups))
    holders: Ints = np.flatnonzero(fleet.usable.all(axis=1))
    if not holders.size:
        return ground.why_not(everything, "the whole model")
    bits: Floats = np.full(holders.size, float(fleet.payload_bits.sum()))
    pairs = Pairs(fleet.ready_s[holders, -1], bits, fleet.bits_per_unit[holders], fleet.snr_hz[holders], fleet.max_share[holders])
    split = split_pairs(pairs, fleet.total)
    shares = cast("list[float]", split.shares.tolist())
    rows = cast("list[int]", holders.tolist())
    parts = [ground.part(device, everything, share) for device, share in zip(rows, shares, strict=True)]
    return ground.plan("data-parallel", "exact", parts)


def _single(ground: _Ground) -> Planned:
    made = plan_fleet(ground.fleet, "best-single")
    if not made.assignments:
        return ground.why_not([0], f"a block ({ground.request.blocks[0].name})")
    device = ground.fleet.devices.index(made.assignments[0].device)
    share = math.fsum(a.share for a in made.assignments)
    part = ground.part(device, [int(a.block) for a in made.assignments], share)
    return ground.plan("single", "exact", [part], made.certificate.lower_bound_seconds if ground.shared else None)


_LAYOUTS: dict[Layout, Callable[[_Ground], Planned]] = {
    "blocks": _blocks,
    "depth": _depth,
    "data-parallel": _data_parallel,
    "single": _single,
}


# -------------------------------------------------------------------------------------------------------------------- auto


def _auto(ground: _Ground) -> Planned:
    made = {layout: _LAYOUTS[layout](ground) for layout in LAYOUTS}
    plans = {layout: plan for layout, plan in made.items() if isinstance(plan, RoundPlan)}
    if not plans:
        return next(why for why in made.values() if isinstance(why, str))
    fewest = min(len(plan.uncovered_depths) for plan in plans.values())
    whole = {layout: plan for layout, plan in plans.items() if len(plan.uncovered_depths) == fewest}
    seconds = {layout: seconds_per_row(plan, ground.request) for layout, plan in whole.items()}
    best = min(seconds.values())
    chosen = next(layout for layout in LAYOUTS if layout in seconds and seconds[layout] <= best * AS_GOOD)
    predictions = tuple(
        (layout, plan.round_s, seconds_per_row(plan, ground.request)) if isinstance(plan, RoundPlan) else (layout, None, None)
        for layout, plan in made.items()
    )
    words = [
        f"{layout} {seconds[layout]:.3g} s"
        if layout in seconds
        else f"{layout} leaves blocks out"
        if layout in plans
        else f"{layout} cannot run"
        for layout in LAYOUTS
    ]
    reason = f"{chosen} takes least time for a row's full gradient: {', '.join(words)}"
    return replace(whole[chosen], predictions=predictions, reason=reason)


def seconds_per_row(plan: RoundPlan, request: PlanRequest) -> float:
    """Predicted seconds of the round by its rows' full gradients: a row that trains d of L depths counts d / L."""
    batches = math.fsum(len(part.depths) for part in plan.parts) / len(request.blocks)
    return plan.round_s / (batches * request.settings.passes * request.settings.rows)

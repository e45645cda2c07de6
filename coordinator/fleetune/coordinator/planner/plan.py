"""From a fleet to a plan: which blocks can be covered, who trains them, with which shares, and how far that is from the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from fleetune.coordinator.planner import baselines, crunch, dual, jbba
from fleetune.coordinator.planner.links import send_s
from fleetune.coordinator.planner.matching import priority_cover
from fleetune.coordinator.planner.problem import Fleet, Ints
from fleetune.coordinator.planner.split import Split, equal_split, equal_times
from fleetune.errors import ConfigError

SolverName = Literal["exact", "crunch-equal", "dual", "random-equal", "greedy-equal", "best-single"]


@dataclass(frozen=True)
class Assignment:
    """One block of the round. `share` is in units of the resource; times are counted from the round's start."""

    block: str
    device: str
    share: float
    ready_seconds: float
    finish_seconds: float


@dataclass(frozen=True)
class Certificate:
    """How good a plan is, provably.

    `lower_bound_seconds`: no plan within `scope` is faster; None where nothing is planned. `gap`: the part of the plan's latency that lies
    above it. `share_needed_below`: what the cheapest plan of that latency would take of the resource, more than there is; None where
    no matching at all is in time, or where the bound was found otherwise. `assignments_solved`: assignment problems behind it.
    """

    kind: Literal["exact", "dual", "single", "none"]
    scope: str
    lower_bound_seconds: float | None
    gap: float | None
    share_needed_below: float | None
    assignments_solved: int


@dataclass(frozen=True)
class Plan:
    """Who trains what. Where `feasible` is False, assignments are the best cover, and `round_seconds` is its latency (None if empty)."""

    solver: SolverName
    feasible: bool
    round_seconds: float | None
    assignments: tuple[Assignment, ...]
    idle_devices: tuple[str, ...]
    uncovered_blocks: tuple[str, ...]
    certificate: Certificate


@dataclass(frozen=True, eq=False)
class _Answer:
    device_of: Ints
    split: Split
    certificate: Certificate


def plan(fleet: Fleet, solver: SolverName = "exact", *, seed: int = 0) -> Plan:
    """Plans one round. The order of the devices does not matter: ties go by name. `seed` is for random-equal alone.

    Where not all blocks can be covered, those with the highest `rounds_since_trained` are, as many as can be (`priority_cover`).

    >>> from fleetune.coordinator.planner.problem import fleet_of
    >>> made = plan(fleet_of([[1.0, 2.0], [1.0, 2.0]], [2.0, 1.0], [1.0, 1.0], 2.0))
    >>> [(a.block, a.device, round(a.share, 6)) for a in made.assignments], round(made.round_seconds, 6)
    ([('block.0', 'd1', 1.0), ('block.1', 'd0', 1.0)], 3.0)
    """
    if solver not in SOLVERS and solver != "best-single":
        raise ConfigError(f"solver {solver!r} is unknown; {', '.join(SOLVER_NAMES)} are allowed.")
    ordered = fleet.by_name()
    if solver == "best-single":
        return _single(ordered)
    covered = priority_cover(ordered.usable, ordered.rounds_since_trained)
    feasible = len(covered) == len(ordered.blocks)
    part = ordered if feasible else ordered.only(range(len(ordered.devices)), covered)
    answer = SOLVERS[solver](part, seed) if covered else None
    return _plan(solver, ordered, part, answer, feasible=feasible)


def _plan(solver: SolverName, whole: Fleet, part: Fleet, answer: _Answer | None, *, feasible: bool) -> Plan:
    if answer is None:
        done_s = 0.0 if feasible else None
        nothing = Certificate("none", "any plan", done_s, done_s, None, 0)
        return Plan(solver, feasible, done_s, (), tuple(whole.devices), tuple(whole.blocks), nothing)
    ready = part.ready_s[answer.device_of, np.arange(answer.device_of.size)]
    devices = cast("Sequence[int]", answer.device_of.tolist())
    rows = zip(
        part.blocks,
        devices,
        cast("Sequence[float]", answer.split.shares.tolist()),
        cast("Sequence[float]", ready.tolist()),
        cast("Sequence[float]", answer.split.finish_s.tolist()),
        strict=True,
    )
    chosen = tuple(Assignment(block, part.devices[device], share, ready_s, finish_s) for block, device, share, ready_s, finish_s in rows)
    busy = {assignment.device for assignment in chosen}
    trained = {assignment.block for assignment in chosen}
    return Plan(
        solver,
        feasible,
        answer.split.round_s,
        chosen,
        tuple(device for device in whole.devices if device not in busy),
        tuple(block for block in whole.blocks if block not in trained),
        answer.certificate,
    )


# ------------------------------------------------------------------------------------------------------- solvers of covers


def _exact(fleet: Fleet, _seed: int) -> _Answer | None:
    solved = jbba.solve(fleet)
    return None if solved is None else _Answer(solved.device_of, solved.split, _proof(solved, solved.split.round_s))


def _dual(fleet: Fleet, _seed: int) -> _Answer | None:
    """Ascent, then one exact descent from its plan, as its steps alone may end beside the optimum; the bound is the ascent's own."""
    found = dual.solve(fleet)
    if found is None:
        return None
    finished = jbba.descend(fleet, found.device_of)
    bound_s = min(found.lower_bound_s, finished.split.round_s)
    gap = _gap(finished.split.round_s, bound_s)
    solved = found.iterations + finished.assignments_solved
    return _Answer(finished.device_of, finished.split, Certificate("dual", "any plan", bound_s, gap, None, solved))


def _crunch_equal(fleet: Fleet, _seed: int) -> _Answer | None:
    found = crunch.match(equal_times(fleet))
    return None if found is None else _equal(fleet, found.device_of)


def _random_equal(fleet: Fleet, seed: int) -> _Answer | None:
    found = baselines.random_matching(fleet, np.random.default_rng(seed))
    return None if found is None else _equal(fleet, found)


def _greedy_equal(fleet: Fleet, _seed: int) -> _Answer | None:
    found = baselines.greedy_matching(fleet)
    return None if found is None else _equal(fleet, found)


def _equal(fleet: Fleet, device_of: Ints) -> _Answer:
    """Equal shares, with the bound of the best plan of all: a baseline's gap is what it loses."""
    split = equal_split(fleet, device_of)
    return _Answer(device_of, split, _proof(jbba.descend(fleet, device_of), split.round_s))


def _proof(solved: jbba.Solved, round_s: float) -> Certificate:
    needed = solved.share_needed_below if np.isfinite(solved.share_needed_below) else None
    bound_s = solved.lower_bound_s
    return Certificate("exact", "any plan", bound_s, _gap(round_s, bound_s), needed, solved.assignments_solved)


def _gap(round_s: float, bound_s: float) -> float:
    return (round_s - bound_s) / round_s if round_s > 0 else 0.0


SOLVERS: dict[str, Callable[[Fleet, int], _Answer | None]] = {
    "exact": _exact,
    "crunch-equal": _crunch_equal,
    "dual": _dual,
    "random-equal": _random_equal,
    "greedy-equal": _greedy_equal,
}
SOLVER_NAMES: tuple[str, ...] = (*SOLVERS, "best-single")


# ----------------------------------------------------------------------------------------------- one device for everything


def _single(fleet: Fleet) -> Plan:
    """Every block on one device. It finishes all of them at once, when its whole upload is through."""
    device = baselines.best_single(fleet)
    blocks: Sequence[int] = range(len(fleet.blocks))
    if device is None:
        device, blocks = _widest(fleet)
    if device is None or not blocks:
        return _plan("best-single", fleet, fleet, None, feasible=not fleet.blocks)
    part = fleet.only(range(len(fleet.devices)), blocks)
    share = min(float(part.max_share[device]), part.total)
    bits = part.payload_bits.sum()
    sent_s = send_s(np.array([bits]), np.array([share]), part.bits_per_unit[[device]], part.snr_hz[[device]])
    round_s = float(part.ready_s[device].max() + sent_s[0])
    count = len(part.blocks)
    # The device's one share, divided among its payloads, so that shares sum to what is used.
    shares = share * part.payload_bits / bits if bits > 0 else np.zeros(count)
    split = Split(round_s, shares, np.full(count, round_s))
    certificate = Certificate("single", "one device for all blocks", round_s, 0.0, None, 0)
    answer = _Answer(np.full(count, device, dtype=np.intp), split, certificate)
    return _plan("best-single", fleet, part, answer, feasible=count == len(fleet.blocks))


def _widest(fleet: Fleet) -> tuple[int | None, list[int]]:
    """The device that can take most blocks, and these; ties to the one that reaches its deepest block sooner."""
    usable = fleet.usable
    counts = cast("Sequence[int]", usable.sum(axis=1).tolist())
    if not counts or not max(counts):
        return None, []
    latest = np.where(usable, fleet.ready_s, 0.0).max(axis=1)
    device = min(range(len(counts)), key=lambda index: (-counts[index], float(latest[index])))
    return device, cast("list[int]", np.flatnonzero(usable[device]).tolist())

"""JBBA, blocks and bandwidth together: the exact solver, a finite descent over matchings that proves its own result.

The problem is that of Wu, Chen, Huang (LoLa-DEFT, arXiv:2407.09873), as far as its abstract states it; this solver is ours. For a fixed
round latency T, a pair needs at least the share w[k,l](T) = `share_needed(D, T - t)`, and W(T), the cost of the cheapest matching under
w, is one assignment problem. T can be reached iff W(T) <= B. So in this form (one device a block, shares divisible at will) the
problem is polynomial.

From any matching and its exact split, with latency T: the cheapest matching just below T either costs no more than B, and then its
exact split is faster; or it costs more, and then no plan is faster than that. There are finitely many matchings; 1 to 3 are usual.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fleetune.coordinator.planner import crunch
from fleetune.coordinator.planner.links import send_s, share_needed
from fleetune.coordinator.planner.matching import least_cost
from fleetune.coordinator.planner.problem import Fleet, Floats, Ints
from fleetune.coordinator.planner.split import Split, best_split, equal_times

PROOF_GAP = 1e-11
"""Each test looks for a plan that is faster by this part: far above rounding, far below what can be measured."""

_CAP_SLACK = 1.0 + 1e-12

_TESTS_MAX = 10_000


@dataclass(frozen=True, eq=False)
class Solved:
    """A plan, with a latency that no plan of the same fleet undercuts.

    `proven` is False only if the descent was cut off. `share_needed_below` is W(lower_bound_s): more than the total, or infinite where no
    matching is in time at all.
    """

    device_of: Ints
    split: Split
    lower_bound_s: float
    share_needed_below: float
    assignments_solved: int
    proven: bool


def solve(fleet: Fleet) -> Solved | None:
    """The fastest plan that covers every block; None where there is none.

    >>> from fleetune.coordinator.planner.problem import fleet_of
    >>> fleet = fleet_of([[1.0, 2.0], [1.0, 2.0]], [2.0, 1.0], [1.0, 1.0], 2.0)
    >>> round(solve(fleet).split.round_s, 6)  # 2 / (T - 1) + 1 / (T - 2) = 2
    3.0
    """
    start = crunch.match(equal_times(fleet))
    return None if start is None else descend(fleet, start.device_of)


def descend(fleet: Fleet, device_of: Ints) -> Solved:
    """The fastest plan, from a matching that can be carried out."""
    split = best_split(fleet, device_of)
    for test in range(1, _TESTS_MAX + 1):
        below_s = split.round_s * (1.0 - PROOF_GAP)
        if split.round_s <= 0:
            return Solved(device_of, split, 0.0, np.inf, test - 1, proven=True)
        found = least_cost(costs_at(fleet, below_s))
        if found is None or found[0] > fleet.total:
            return Solved(device_of, split, below_s, np.inf if found is None else found[0], test, proven=True)
        better = best_split(fleet, found[1])
        if not better.round_s < split.round_s:
            break
        device_of, split = found[1], better
    # Unreached but for a defect: what is returned can be carried out, and its bound is weak but true.
    return Solved(device_of, split, alone_bound_s(fleet), np.nan, _TESTS_MAX, proven=False)


def costs_at(fleet: Fleet, latency_s: float) -> Floats:
    """Share (K, L) that each pair needs to finish by `latency_s`; infinite where it cannot, or where it takes more than there is."""
    need = share_needed(fleet.payload_bits[None, :], latency_s - fleet.ready_s, fleet.bits_per_unit[:, None], fleet.snr_hz[:, None])
    most = np.minimum(fleet.max_share, fleet.total)[:, None] * _CAP_SLACK
    return np.where(fleet.usable & (need <= most), need, np.inf)


def alone_bound_s(fleet: Fleet) -> float:
    """No plan is faster than the slowest block on its fastest device with all that this device may use."""
    shares = np.minimum(fleet.max_share, fleet.total)[:, None]
    alone = fleet.ready_s + send_s(fleet.payload_bits[None, :], shares, fleet.bits_per_unit[:, None], fleet.snr_hz[:, None])
    return float(np.where(fleet.usable, alone, np.inf).min(axis=0, initial=np.inf).max(initial=0.0))

"""What a round of each method would take on the same fleet, and what it would be worth: DEFT is not always the best choice.

Depth changes the computing of a step by less than a factor of two, because the forward pass runs through all layers anyway. So a
device that holds everything often finishes the same step sooner alone, and in a DEFT round of n devices every row trains one block,
while in a data-parallel round it trains all of them. Two counts are therefore given for each method:

- rows: passed forward, summed over devices;
- full-gradient rows: rows passed forward, times the part of the blocks that they train. A DEFT round over all blocks yields one
  device's batch of them, a data-parallel round as many batches as devices.

The computing of the deepest block stands for a step over all blocks. It is a little less than that (by a twenty-fifth on a small
RoBERTa), and gradients and optimiser state of the other blocks are not counted: pass `whole_s` and `holds_whole` where they are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np

from fleetune.coordinator.planner import depthwise
from fleetune.coordinator.planner.plan import Plan
from fleetune.coordinator.planner.problem import Bools, Fleet, Floats, Ints
from fleetune.coordinator.planner.split import Pairs, Split, split_pairs

MethodName = Literal["deft", "data-parallel", "data-parallel-fastest", "best-single", "depth"]
Measure = Literal["full-gradient-rows", "rows"]

_SIZES_TRIED = 24
_TESTS_MAX = 1000


@dataclass(frozen=True)
class Prediction:
    """One method. Times are None where the fleet cannot run it."""

    method: MethodName
    devices: tuple[str, ...]
    round_seconds: float | None
    rows_per_round: float
    full_gradient_rows_per_round: float
    seconds_per_row: float | None
    seconds_per_full_gradient_row: float | None
    rows: float
    seconds_to_rows: float | None
    seconds_to_full_gradient_rows: float | None


def predictions(
    fleet: Fleet, plan: Plan, rows_per_device: float, rows: float, *, whole_s: Floats | None = None, holds_whole: Bools | None = None
) -> tuple[Prediction, ...]:
    """DEFT as in `plan`, the best single device, data-parallel federated LoRA over all devices that hold the whole, the same over the
    subset that is fastest per row, and depth-aware data parallelism, to a common number of `rows`.

    `rows_per_device`: rows that each device passes forward in a round. `whole_s` (K,): seconds of computing over all blocks, the time of
    the deepest block if left out; `holds_whole` (K,): whether everything fits at once, whether every block fits if left out.
    """
    # A device that pairs with every block also has a link.
    usable = fleet.usable.all(axis=1) if holds_whole is None else holds_whole & fleet.usable.any(axis=1)
    ready = fleet.ready_s.max(axis=1, initial=0.0) if whole_s is None else whole_s
    holders: Ints = np.flatnonzero(usable & np.isfinite(ready)) if fleet.blocks else np.zeros(0, dtype=np.intp)
    pairs = Pairs(
        ready[holders],
        np.full(holders.size, fleet.payload_bits.sum()),
        fleet.bits_per_unit[holders],
        fleet.snr_hz[holders],
        fleet.max_share[holders],
    )
    names = [fleet.devices[int(index)] for index in holders]
    everyone = _data_parallel("data-parallel", names, np.arange(holders.size), pairs, fleet.total, rows_per_device, rows)
    sizes = sorted({int(size) for size in np.geomspace(1, holders.size, _SIZES_TRIED)}) if holders.size else []
    subsets = [_fastest(pairs, fleet.total, size) for size in sizes]
    rated = [_data_parallel("data-parallel-fastest", names, subset, pairs, fleet.total, rows_per_device, rows) for subset in subsets] or [
        _prediction("data-parallel-fastest", (), None, rows_per_device, 0.0, rows)
    ]
    single = [_data_parallel("best-single", names, subset, pairs, fleet.total, rows_per_device, rows) for subset in subsets[:1]]
    busy = tuple(dict.fromkeys(assignment.device for assignment in plan.assignments))
    covered = len({assignment.block for assignment in plan.assignments}) / len(fleet.blocks) if fleet.blocks else 0.0
    return (
        _prediction("deft", busy, plan.round_seconds if plan.feasible else None, rows_per_device, covered, rows),
        single[0] if single else _prediction("best-single", (), None, rows_per_device, 0.0, rows),
        everyone,
        min(rated, key=lambda one: math.inf if one.seconds_per_row is None else one.seconds_per_row),
        _depth(fleet, whole_s, holds_whole, rows_per_device, rows),
    )


def choice(found: Sequence[Prediction], measure: Measure = "full-gradient-rows") -> Prediction | None:
    """The method that reaches the common number first by `measure`; None where none can run. Ties to the first in order."""

    def seconds(one: Prediction) -> float:
        taken = one.seconds_to_rows if measure == "rows" else one.seconds_to_full_gradient_rows
        return math.inf if taken is None else taken

    best = min(found, key=seconds, default=None)
    return best if best is not None and math.isfinite(seconds(best)) else None


def _depth(fleet: Fleet, whole_s: Floats | None, holds_whole: Bools | None, rows_per_device: float, rows: float) -> Prediction:
    """Each device from the loss down to a depth of its own; times are None where no device reaches the deepest block.

    Down to the deepest block is the whole; for what is shallower, a step of the deepest trained block stands.
    """
    ready: Floats = np.array(fleet.ready_s)
    fits: Bools = np.array(fleet.fits)
    if fleet.blocks:
        ready[:, -1] = ready[:, -1] if whole_s is None else whole_s
        fits[:, -1] &= True if holds_whole is None else holds_whole
    deep = depthwise.plan_depths(replace(fleet, ready_s=ready, fits=fits)) if fleet.blocks else None
    if deep is None or deep.covered < len(fleet.blocks):
        return _prediction("depth", (), None, rows_per_device, 0.0, rows)
    devices = tuple(fleet.devices[index] for index in cast("Sequence[int]", deep.chosen.tolist()))
    return _prediction("depth", devices, deep.split.round_s, rows_per_device, float(deep.depths.sum()) / len(fleet.blocks), rows)


def _data_parallel(
    method: MethodName, names: Sequence[str], chosen: Ints, pairs: Pairs, total: float, rows_per_device: float, rows: float
) -> Prediction:
    split = split_pairs(_part(pairs, chosen), total) if chosen.size else None
    round_s = split.round_s if split is not None and math.isfinite(split.round_s) else None
    devices = tuple(names[int(index)] for index in chosen)
    return _prediction(method, devices, round_s, rows_per_device, float(chosen.size), rows)


def _prediction(
    method: MethodName, devices: tuple[str, ...], round_s: float | None, rows_per_device: float, gradients: float, rows: float
) -> Prediction:
    """`gradients`: devices' batches of full gradient in a round."""
    passed, full = rows_per_device * len(devices), rows_per_device * gradients
    per_row = round_s / passed if round_s is not None and passed > 0 else None
    per_full = round_s / full if round_s is not None and full > 0 else None
    return Prediction(
        method,
        devices,
        round_s,
        passed,
        full,
        per_row,
        per_full,
        rows,
        None if per_row is None else per_row * rows,
        None if per_full is None else per_full * rows,
    )


def _fastest(pairs: Pairs, total: float, size: int) -> Ints:
    """The `size` devices whose round together is shortest, by the descent of the exact solver with "the cheapest n" for the matching."""
    share = np.minimum(pairs.max_share, total)
    chosen: Ints = np.argsort(pairs.ready_s + pairs.send_s(share), kind="stable")[:size]
    split: Split = split_pairs(_part(pairs, chosen), total)
    for _ in range(_TESTS_MAX):
        needs = pairs.need(split.round_s * (1.0 - 1e-9) - pairs.ready_s)
        needs = np.where(needs <= pairs.max_share, needs, np.inf)
        other: Ints = np.argsort(needs, kind="stable")[:size]
        if not float(needs[other].sum()) <= total:
            break
        better = split_pairs(_part(pairs, other), total)
        if not better.round_s < split.round_s:
            break
        chosen, split = other, better
    return np.sort(chosen)


def _part(pairs: Pairs, chosen: Ints) -> Pairs:
    return Pairs(
        pairs.ready_s[chosen], pairs.payload_bits[chosen], pairs.bits_per_unit[chosen], pairs.snr_hz[chosen], pairs.max_share[chosen]
    )

"""Random fleets, and a second exact solver of the planning problem that shares no code with the planner."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.special import lambertw

from fleetune.coordinator.planner.plan import Plan
from fleetune.coordinator.planner.problem import Fleet, fleet_of

Floats = npt.NDArray[np.float64]

HALVINGS = 64


def random_times(rng: np.random.Generator, devices: int, blocks: int) -> Floats:
    """Monotone times with ties, and tails that do not fit."""
    steps = rng.integers(0, 4, (devices, blocks)) if rng.random() < 0.5 else rng.exponential(1.0, (devices, blocks))
    times: Floats = np.asarray(steps.cumsum(axis=1), dtype=np.float64) * rng.choice([0.5, 1.0, 2.0], (devices, 1))
    if rng.random() < 0.7:
        reach = rng.integers(0 if rng.random() < 0.3 else blocks // 2, blocks + 1, devices)
        times[np.arange(blocks)[None, :] >= reach[:, None]] = np.inf
    return times


def random_fleet(rng: np.random.Generator, *, devices_max: int = 12, blocks_max: int = 8, radio: bool | None = None) -> Fleet:
    """Uneven or equal payloads, caps, holes in memory, dead links, nothing to send, Shannon rates: each now and then."""
    blocks = int(rng.integers(1, blocks_max + 1))
    devices = int(rng.integers(1 if rng.random() < 0.1 else blocks, devices_max + 1)) if blocks < devices_max else devices_max
    ready = np.exp(rng.uniform(0, math.log(4), (devices, 1))) * (1 + rng.uniform(0, 0.2) * np.arange(blocks))[None, :]
    ready = ready + (rng.random((devices, blocks)) if rng.random() < 0.3 else 0.0)
    if rng.random() < 0.1:
        ready = np.zeros((devices, blocks))
    bits = np.full(blocks, 10 ** rng.uniform(-2, 2)) if rng.random() < 0.5 else 10 ** rng.uniform(-2, 2, blocks)
    if rng.random() < 0.3:
        bits[0] *= 25  # a head in the first block
    if rng.random() < 0.1:
        bits[rng.integers(blocks)] = 0.0
    per_unit = np.exp(rng.uniform(0, math.log(4), devices))
    if rng.random() < 0.1:
        per_unit[rng.integers(devices)] = 0.0
    fits = np.arange(blocks)[None, :] < rng.integers(0, 2 * blocks + 2, devices)[:, None]
    if rng.random() < 0.3:
        fits &= rng.random(fits.shape) < 0.8
    caps = np.where(rng.random(devices) < 0.5, np.inf, rng.uniform(0.05, 1.0, devices)) if rng.random() < 0.5 else None
    snr = None
    if rng.random() < 0.3 if radio is None else radio:
        snr = np.where(rng.random(devices) < 0.7, 10 ** rng.uniform(-1, 2, devices), np.nan)
    waited = rng.integers(0, 4, blocks)
    total = float(10 ** rng.uniform(-1, 1))
    names = [f"d{index}" for index in rng.permutation(devices)]
    return fleet_of(
        ready, bits, per_unit, total, fits=fits, snr_hz=snr, max_share=caps, rounds_since_trained=waited, devices=names, kind="airtime"
    )


def extreme_fleet(rng: np.random.Generator) -> Fleet:
    """Figures from everywhere that a fleet file may hold: nine to fifteen orders of magnitude to either side, and zeros."""

    def anywhere(low: float, high: float, size: int | tuple[int, int]) -> Floats:
        return np.where(rng.random(size) < 0.1, 0.0, 10 ** rng.uniform(low, high, size))

    devices, blocks = int(rng.integers(0, 8)), int(rng.integers(0, 6))
    radio = np.where(rng.random(devices) < 0.4, anywhere(-9, 15, devices), np.nan) if rng.random() < 0.5 else None
    caps = np.where(rng.random(devices) < 0.4, anywhere(-9, 15, devices), np.inf) if rng.random() < 0.5 else None
    return fleet_of(
        anywhere(-2, 2, (devices, blocks)) if rng.random() < 0.5 else anywhere(-9, 9, (devices, blocks)),
        anywhere(-9, 15, blocks),
        anywhere(-9, 15, devices),
        float(10 ** rng.uniform(-9, 15)),
        fits=rng.random((devices, blocks)) < 0.9,
        snr_hz=radio,
        max_share=caps,
    )


# ----------------------------------------------------------------------------------------------- the independent solver


def need(fleet: Fleet, latency_s: float) -> Floats:
    """Least shares (K, L) by the textbook formulas, Lambert's W for power-limited links; infinite beyond cap or total."""
    with np.errstate(all="ignore"):
        slack = latency_s - fleet.ready_s
        share = fleet.payload_bits / (fleet.bits_per_unit[:, None] * slack)
        for row in np.flatnonzero(~np.isnan(fleet.snr_hz)):
            share[row] = [
                _radio(float(bits), float(x), float(fleet.snr_hz[row])) for bits, x in zip(fleet.payload_bits, slack[row], strict=True)
            ]
        share = np.where(slack > 0, share, np.inf)
        share = np.where(fleet.payload_bits == 0, np.where(slack >= 0, 0.0, np.inf), share)
        share[np.isnan(share) | ~fleet.fits] = np.inf
        share[share > fleet.max_share[:, None]] = np.inf
    return share


def _radio(bits: float, slack_s: float, snr_hz: float) -> float:
    if bits == 0:
        return 0.0
    if slack_s <= 0 or snr_hz <= 0:
        return math.inf
    c = bits / slack_s * math.log(2) / snr_hz
    if c >= 1 - 1e-9:
        return math.inf
    y = -float(np.real(lambertw(-c * math.exp(-c), -1)))
    return snr_hz / (y / c - 1)


def reachable(fleet: Fleet, latency_s: float) -> bool:
    """Whether some matching needs no more than the total."""
    costs = need(fleet, latency_s)
    if costs.shape[0] < costs.shape[1]:
        return False
    try:
        rows, columns = cast("tuple[Any, Any]", linear_sum_assignment(costs.T))  # Any: scipy has no types
    except ValueError:
        return False
    return float(costs.T[rows, columns].sum()) <= fleet.total


def bisected_s(fleet: Fleet) -> float:
    """The least latency, by doubling and halving; infinite where no latency will do."""
    high = 1.0
    while not reachable(fleet, high):
        high *= 2
        if high > 1e13:
            return math.inf
    low = 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if reachable(fleet, middle):
            high = middle
        else:
            low = middle
    return high


def brute_force_s(fleet: Fleet) -> float:
    """The least latency over every matching there is, each split by halving."""
    blocks = len(fleet.blocks)
    best = math.inf
    for chosen in itertools.permutations(range(len(fleet.devices)), blocks):
        alone = fleet.only(chosen, range(blocks))
        # Only the diagonal may be used: block l on the l-th of the chosen.
        best = min(best, _halved(alone, np.arange(blocks), best))
    return best


def _halved(fleet: Fleet, diagonal: npt.NDArray[np.intp], below: float) -> float:
    def enough(latency_s: float) -> bool:
        return float(need(fleet, latency_s)[diagonal, diagonal].sum()) <= fleet.total

    low, high = 0.0, below if math.isfinite(below) else 1e13
    if not enough(high):
        return math.inf
    while high - low > 1e-13 * high and high > 1e-300:
        middle = (low + high) / 2 if low > 0 or high < 1 else math.sqrt(high * max(low, 1e-6))
        if middle in {low, high}:
            break
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def matched_s(times: Floats) -> float:
    """The least greatest time over all matchings: bisection over the values with Hopcroft and Karp; infinite if there is none."""

    def served(limit: float) -> bool:
        graph = csr_matrix((times <= limit).T)
        return times.shape[0] >= times.shape[1] and bool((maximum_bipartite_matching(graph, perm_type="column") >= 0).all())

    values = np.unique(times[np.isfinite(times)])
    if not values.size or not served(float(values[-1])):
        return math.inf
    low, high = 0, values.size - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if served(float(values[middle])) else (middle + 1, high)
    return float(values[low])


def cover_size(usable: npt.NDArray[np.bool_], blocks: Sequence[int]) -> int:
    """How many of these blocks can have a device each."""
    if not blocks or not usable.shape[0]:
        return 0
    graph = csr_matrix(usable[:, list(blocks)].T)
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


# ------------------------------------------------------------------------------------------------------ what a plan must be


def complaints(fleet: Fleet, plan: Plan) -> list[str]:
    """What is wrong with a plan as such, whatever its latency."""
    row = {name: index for index, name in enumerate(fleet.devices)}
    column = {name: index for index, name in enumerate(fleet.blocks)}
    found: list[str] = []
    devices = [one.device for one in plan.assignments]
    if len(set(devices)) < len(devices):
        found.append("a device has two blocks")
    if sorted([*devices, *plan.idle_devices]) != sorted(fleet.devices):
        found.append("devices are not each assigned or idle")
    if sorted([*(one.block for one in plan.assignments), *plan.uncovered_blocks]) != sorted(fleet.blocks):
        found.append("blocks are not each covered or uncovered")
    if plan.feasible != (not plan.uncovered_blocks):
        found.append("feasible is wrong")
    if math.fsum(one.share for one in plan.assignments) > fleet.total * (1 + 1e-14):
        found.append("shares sum to more than the total")
    for one in plan.assignments:
        device, block = row[one.device], column[one.block]
        if not fleet.fits[device, block]:
            found.append(f"{one.block} does not fit {one.device}")
        if one.share < 0 or one.share > fleet.max_share[device]:
            found.append(f"{one.device} has a share of {one.share}")
        if one.ready_seconds != fleet.ready_s[device, block]:
            found.append(f"{one.device} is said to be ready at {one.ready_seconds}")
        snr = float(fleet.snr_hz[device])
        rate = one.share * float(fleet.bits_per_unit[device])
        if not math.isnan(snr):
            rate = one.share * math.log1p(snr / one.share) / math.log(2) if one.share > 0 else 0.0
        bits = float(fleet.payload_bits[block])
        finish = one.ready_seconds + (bits / rate if bits else 0.0)
        if not math.isclose(finish, one.finish_seconds, rel_tol=1e-11):
            found.append(f"{one.device} would finish at {finish}, not {one.finish_seconds}")
    if plan.assignments and plan.round_seconds != max(one.finish_seconds for one in plan.assignments):
        found.append("the round does not end with the last finish")
    return found

"""JBBA by dual ascent: a bound from below and a plan from above that approach each other.

After the abstract of Wu, Chen, Huang (LoLa-DEFT, arXiv:2407.09873): Lagrangian, dual ascent, blocks by the Hungarian method, bandwidth in
closed form. The multipliers, one for each block, and the steps are ours: the paper's variables of device involvement are not used.

| symbol | here | meaning |
| --- | --- | --- |
| lambda[l] | `late` | price of the completion time of block l; they sum to 1 |
| mu | `price` | price of a unit of the shared resource |

For a pair, min over b of lambda D / (s b) + mu b is at b = sqrt(lambda D / (s mu)) (or at its cap): more for weak links and late blocks.
So q = min over matchings of sum (lambda t + that minimum) - mu B is one assignment problem, and never above the least latency. Each
matching found is split exactly, which gives a plan. On a power-limited link the minimum has no closed form and is read from a table.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np

from fleetune.coordinator.planner import crunch, jbba
from fleetune.coordinator.planner.links import rate_bits_per_s, rate_slope, send_s
from fleetune.coordinator.planner.matching import least_cost
from fleetune.coordinator.planner.problem import Fleet, Floats, Ints
from fleetune.coordinator.planner.split import Split, best_split, equal_times

ITERATIONS_MAX = 200
GAP_ENOUGH = 1e-4

_SHRINK_AFTER = 8
_SHRINK = 0.6
_LEAST_PRICE = 1e-12
_TABLE_SAFETY = 1e-9
"""The table's minimum is above the true one by less than this part: what is claimed as a bound is lowered by it."""


@dataclass(frozen=True, eq=False)
class Ascended:
    """A plan, and the greatest bound that the ascent has found. `device_of` and `split` are of the best matching met on the way."""

    device_of: Ints
    split: Split
    lower_bound_s: float
    iterations: int


@dataclass
class _Prices:
    late: Floats
    price: float
    scale: float = 1.0
    idle_steps: int = 0


def solve(fleet: Fleet) -> Ascended | None:
    """A plan that covers every block, with a bound; None where there is no such plan."""
    start = crunch.match(equal_times(fleet))
    if start is None:
        return None
    device_of, split = start.device_of, best_split(fleet, start.device_of)
    bound_s = jbba.alone_bound_s(fleet)
    if split.round_s <= bound_s or not fleet.total > 0:
        return Ascended(device_of, split, min(bound_s, split.round_s), 0)
    prices = _first_prices(fleet, device_of, split)
    pairs = _pairs(fleet)
    met: set[bytes] = set()
    for iteration in range(1, ITERATIONS_MAX + 1):
        chosen = least_cost(_values(pairs, prices, split.round_s))
        if chosen is None:  # nothing else is as fast: what we have is the best
            return Ascended(device_of, split, split.round_s, iteration)
        finish_s, shares = _at(fleet, chosen[1], prices)
        q = (chosen[0] - prices.price * fleet.total) * (1.0 - _TABLE_SAFETY)
        prices.idle_steps = 0 if q > bound_s else prices.idle_steps + 1
        # The bound holds for plans that are faster than ours; ours is the best if there are none.
        bound_s = max(bound_s, min(q, split.round_s))
        if chosen[1].tobytes() not in met:
            met.add(chosen[1].tobytes())
            other = best_split(fleet, chosen[1])
            if other.round_s < split.round_s:
                device_of, split = chosen[1], other
        bound_s = min(bound_s, split.round_s)
        if split.round_s - bound_s <= GAP_ENOUGH * split.round_s:
            return Ascended(device_of, split, bound_s, iteration)
        _ascend(prices, finish_s, shares, fleet.total, split.round_s - q)
    return Ascended(device_of, split, bound_s, ITERATIONS_MAX)


def _first_prices(fleet: Fleet, device_of: Ints, split: Split) -> _Prices:
    """Those at which the first matching's exact split is stationary, for linear links: lambda ~ D / (s (T - t)^2) = b / (T - t)."""
    ready = fleet.ready_s[device_of, np.arange(device_of.size)]
    with np.errstate(all="ignore"):
        late = np.where(split.shares > 0, split.shares / (split.round_s - ready), 0.0)
    late = _normalised(np.where(np.isfinite(late), late, 0.0))
    # b = sqrt(lambda D / (s mu)) and D / (s b) = T - t: mu = lambda (T - t) / b, and the sum of b is the total.
    price = float((late * np.maximum(split.round_s - ready, 0.0)).sum()) / fleet.total
    return _Prices(late, max(price, sys.float_info.min))


def _normalised(late: Floats) -> Floats:
    floored = np.maximum(late, _LEAST_PRICE)
    return floored / float(floored.sum())


def _ascend(prices: _Prices, finish_s: Floats, shares: Floats, total: float, wanted: float) -> None:
    """One step of Polyak's length along the subgradient, multiplicative so that prices stay positive."""
    if prices.idle_steps >= _SHRINK_AFTER:
        prices.scale, prices.idle_steps = prices.scale * _SHRINK, 0
    lateness = finish_s - float((prices.late * finish_s).sum())
    overdrawn = prices.price * (float(shares.sum()) - total)
    length = float((prices.late * lateness * lateness).sum()) + overdrawn * overdrawn
    if length <= 0:
        return
    step = prices.scale * wanted / length
    prices.late = _normalised(prices.late * np.exp(np.minimum(np.maximum(step * lateness, -1.0), 1.0)))
    prices.price *= math.exp(min(max(step * overdrawn, -0.5), 0.5))


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Every pair (K, L): its facts, and when it ends at the soonest."""

    ready_s: Floats
    payload_bits: Floats
    bits_per_unit: Floats
    snr_hz: Floats
    most: Floats
    soonest_s: Floats


def _pairs(fleet: Fleet) -> _Pairs:
    bits, per_unit, snr = fleet.payload_bits[None, :], fleet.bits_per_unit[:, None], fleet.snr_hz[:, None]
    most = np.minimum(fleet.max_share, fleet.total)[:, None]
    soonest = np.where(fleet.usable, fleet.ready_s + send_s(bits, most, per_unit, snr), np.inf)
    return _Pairs(np.where(fleet.usable, fleet.ready_s, 0.0), bits, per_unit, snr, most, soonest)


def _values(pairs: _Pairs, prices: _Prices, round_s: float) -> Floats:
    """Cost (K, L) of each pair at its best share; infinite for pairs that cannot be part of a faster plan."""
    weight = prices.late[None, :] * pairs.payload_bits
    share = _best_share(weight, prices.price, pairs.bits_per_unit, pairs.snr_hz, pairs.most)
    cost = prices.late[None, :] * pairs.ready_s + send_s(weight, share, pairs.bits_per_unit, pairs.snr_hz) + prices.price * share
    return np.where((pairs.soonest_s < round_s) & np.isfinite(cost), cost, np.inf)


def _at(fleet: Fleet, device_of: Ints, prices: _Prices) -> tuple[Floats, Floats]:
    """Finishing times and shares of a matching at these prices."""
    per_unit, snr = fleet.bits_per_unit[device_of], fleet.snr_hz[device_of]
    most = np.minimum(fleet.max_share[device_of], fleet.total)
    shares = _best_share(prices.late * fleet.payload_bits, prices.price, per_unit, snr, most)
    ready_s = fleet.ready_s[device_of, np.arange(device_of.size)]
    return ready_s + send_s(fleet.payload_bits, shares, per_unit, snr), shares


def _best_share(weight: Floats, price: float, bits_per_unit: Floats, snr_hz: Floats, most: Floats) -> Floats:
    """The share, `most` at the most, at which weight / rate + price x share is least."""
    with np.errstate(all="ignore"):
        share = np.sqrt(weight / (bits_per_unit * price))
        radio = ~np.isnan(snr_hz)
        if radio.any():
            log_kappa, log_share = _table()
            kappa = np.log(weight) - np.log(price) - 2.0 * np.log(snr_hz)
            log_best = cast("Floats", np.interp(kappa, log_kappa, log_share))
            share = np.where(radio, snr_hz * np.exp(log_best), share)
        return np.where(weight > 0, np.minimum(np.where(np.isnan(share), np.inf, share), most), 0.0)


@cache
def _table() -> tuple[Floats, Floats]:
    """For a radio with p = 1: ln of kappa = lambda D / mu, and ln of the share that is best there: rate^2 / (d rate / d share) = kappa."""
    log_share: Floats = np.linspace(-60.0, 60.0, 24_001)
    share: Floats = np.exp(log_share)
    rate = rate_bits_per_s(share, np.zeros(1), np.ones(1))
    slope: Floats = rate_slope(1.0 / share)
    return 2.0 * np.log(rate) - np.log(slope), log_share

"""Depth-aware data parallelism: each device trains everything from the loss down to a depth of its own, several devices to a block.

It is ours, not the paper's. Of a row that is trained down to depth d of L, the part d / L gets its gradient; all devices pass the same
number of rows in a round. So a round of latency T in which device k goes down to depth d[k] is worth sum d[k] / L batches, and the
objective is the number of them in a second:

    maximise  (sum over k of d[k]) / T   over depths d and T
    subject to  d[k] <= what fits into its memory      max over k of d[k] = L, so that every block is covered
                sum over k of w[k, d[k]](T) <= B       w[k, d](T) <= cap[k]

with w[k, d](T) = the share that sends the payload of blocks 1..d within T - t[k, d], `share_needed`; d[k] = 0 takes no part and needs
nothing. Where no device reaches the deepest block, L is the deepest that one does.

For fixed T it is a knapsack with one choice per device. V(T), the greatest sum of depths, only grows with T: needs fall with time. From
any plan of ratio r, nothing at T' <= T is better unless V(T) / T' > r, so the next latency worth a look is V(T) / r, just below
it, and so on down: each look either raises r or leaps. This is `_leaping`; if V is exact, so is its result. V is

- exact for small fleets (`_CELLS_EXACT`), by dynamic programming over the sum of depths, which holds the cheapest choice for every sum;
- else by a price on the resource, bisected: each device takes the depth that is worth most at the price, then the next dearer choices
  are made one by one while there is room. That is the linear relaxation rounded down: it loses the depths of less than one device, at
  most L out of V, since between two prices next to each other the relaxation is one device's choice between two depths. Latencies
  are then a grid with a refinement, as leaps would be too many.

The exact split of the chosen depths (`split_pairs`) shortens the latency of every choice that is looked at: T is never the grid's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np

from fleetune.coordinator.planner.links import send_s, share_needed
from fleetune.coordinator.planner.problem import Bools, Fleet, Floats, Ints
from fleetune.coordinator.planner.split import Pairs, Split, split_pairs

_CELLS_EXACT = 130
"""Devices times blocks up to which the knapsack is solved exactly: some ten milliseconds."""

_LEAPS_MAX = 2000
_BELOW = 1.0 - 1e-9
_ROOM = 1.0 + 1e-12
"""Needs at the very latency of a split come out a rounding above it; the split that follows makes up for what this lets in."""
_GRID = 10
_REFINED = 5
_HALVINGS = 26
_HALVINGS_NEAR = 9
_NEAR = 1.3
_ANCHORS = 3
_FEW = 24
"""Devices up to which several are tried as the one that goes all the way down."""

_FILLED_MAX = 200
_NEVER = 1e30
"""The cost of what is not in time: above any other, and finite, so that 0 times it is 0."""


@dataclass(frozen=True, eq=False)
class Deep:
    """Depths (K,) by device, 0 for those that take no part; the split of those that do, in the order of `chosen`, their rows.

    `covered` is the deepest block that anybody can train. `exact`: no plan has more covered blocks times rows in a second.
    """

    depths: Ints
    chosen: Ints
    split: Split
    covered: int
    exact: bool

    @property
    def ratio(self) -> float:
        """Depths in a second."""
        return _ratio(int(self.depths.sum()), self.split.round_s)


@dataclass(frozen=True, eq=False)
class _Problem:
    """`ready_s` and `held` (K, L), `bits` (L,) of blocks 1..l together."""

    ready_s: Floats
    held: Bools
    bits: Floats
    fleet: Fleet
    most: Floats

    def needs(self, latency_s: float) -> Floats:
        """Shares (K, L + 1) of every choice, 0 at depth 0; infinite where it is not in time or takes more than there is."""
        fleet = self.fleet
        need = share_needed(self.bits[None, :], latency_s - self.ready_s, fleet.bits_per_unit[:, None], fleet.snr_hz[:, None])
        need = np.where(self.held & (need <= self.most[:, None] * _ROOM), need, np.inf)
        return np.concatenate([np.zeros((need.shape[0], 1)), need], axis=1)

    def split(self, depths: Ints) -> tuple[Ints, Split]:
        """The exact split between the devices that take part."""
        chosen: Ints = np.flatnonzero(depths > 0)
        at = depths[chosen] - 1
        fleet = self.fleet
        pairs = Pairs(self.ready_s[chosen, at], self.bits[at], fleet.bits_per_unit[chosen], fleet.snr_hz[chosen], fleet.max_share[chosen])
        return chosen, split_pairs(pairs, fleet.total)


def plan_depths(fleet: Fleet) -> Deep | None:
    """The depths of most covered blocks in a second; None where no device can train even the first block.

    `fleet.ready_s[k, l]` is the time of a step down to block l, `fits` whether that step fits; `payload_bits` are those of each block
    alone. Ties go to the device of the first row.

    >>> from fleetune.coordinator.planner.problem import fleet_of
    >>> deep = plan_depths(fleet_of([[1.0, 2.0], [1.0, 2.0]], [0.0, 0.0], [1.0, 1.0], 1.0, fits=[[True, True], [True, False]]))
    >>> deep.depths.tolist(), deep.split.round_s  # 3 blocks in 2 s
    ([2, 1], 2.0)
    """
    held = np.logical_and.accumulate(fleet.usable, axis=1)
    covered = int(held.any(axis=0).sum()) if held.size else 0
    if not covered:
        return None
    problem = _Problem(
        fleet.ready_s[:, :covered],
        held[:, :covered],
        np.cumsum(fleet.payload_bits)[:covered],
        fleet,
        np.minimum(fleet.max_share, fleet.total),
    )
    exact = fleet.ready_s.shape[0] * covered <= _CELLS_EXACT
    start = _alone(problem, covered)
    if start is None:
        return None
    found = _gridded(problem, start, covered)
    if exact:
        found = _leaping(problem, found, covered)
    chosen, split = problem.split(found)
    return Deep(found, chosen, split, covered, exact)


def _ratio(depths: int, round_s: float) -> float:
    return depths / round_s if round_s > 0 else math.inf


def _alone(problem: _Problem, covered: int) -> Ints | None:
    """The device that trains everything soonest by itself: a plan to begin from."""
    fleet = problem.fleet
    bits = np.full(problem.most.size, problem.bits[covered - 1])
    done = problem.ready_s[:, -1] + send_s(bits, problem.most, fleet.bits_per_unit, fleet.snr_hz)
    done = np.where(problem.held[:, -1], done, np.inf)
    best = int(done.argmin())
    if not np.isfinite(done[best]):
        return None
    depths = np.zeros(problem.most.size, dtype=np.intp)
    depths[best] = covered
    return depths


def _rated(problem: _Problem, depths: Ints) -> float:
    return _ratio(int(depths.sum()), problem.split(depths)[1].round_s)


def _all_s(problem: _Problem) -> float:
    """When every device would be done with all that it holds, sharing exactly: nothing is gained by waiting longer."""
    depths: Ints = problem.held.sum(axis=1).astype(np.intp)
    return problem.split(depths)[1].round_s


def _leaping(problem: _Problem, start: Ints, covered: int) -> Ints:
    best, ratio = start, _rated(problem, start)
    latency_s = _all_s(problem) / _BELOW
    for _ in range(_LEAPS_MAX):
        if not (0 < latency_s < math.inf) or math.isinf(ratio):
            break
        depths = _exact_at(problem.needs(latency_s), problem.fleet.total, covered)
        if depths is None:
            break
        value = int(depths.sum())
        own = _rated(problem, depths)
        if own > ratio:
            best, ratio = depths, own
        latency_s = min(latency_s, value / ratio) * _BELOW
    return best


def _exact_at(needs: Floats, total: float, covered: int) -> Ints | None:
    """The depths of greatest sum whose needs are no more than `total`, one of them `covered`: the cheapest choice for every sum."""
    count = needs.shape[0]
    size = count * covered + 1
    # The cheapest choice of the devices so far by the sum of their depths: without, and with one that goes all the way down.
    plain, deep = np.full(size, np.inf), np.full(size, np.inf)
    plain[0] = 0.0
    steps: list[tuple[Ints, Ints, Bools]] = []
    for row in needs:
        # [sum, depth]: the cost of the others where this device takes the depth.
        others_plain, others_deep = _others(plain, covered), _others(deep, covered)
        shallow = others_plain[:, :covered] + row[:covered]
        plain_choice: Ints = shallow.argmin(axis=1)
        reached = others_deep + row
        # What goes all the way down itself needs nobody else who does.
        reached[:, covered] = np.minimum(others_deep[:, covered], others_plain[:, covered]) + row[covered]
        deep_choice: Ints = reached.argmin(axis=1)
        first: Bools = (deep_choice == covered) & (others_plain[:, covered] <= others_deep[:, covered])
        sums: Ints = np.arange(size, dtype=np.intp)
        plain, deep = shallow[sums, plain_choice], reached[sums, deep_choice]
        steps.append((plain_choice, deep_choice, first))
    within = np.flatnonzero(deep <= total * _ROOM)
    if not within.size:
        return None
    depths = np.zeros(count, dtype=np.intp)
    left, flag = int(within[-1]), True
    for device in range(count - 1, -1, -1):
        plain_choice, deep_choice, first = steps[device]
        depth = int(deep_choice[left] if flag else plain_choice[left])
        flag = flag and not bool(first[left])
        depths[device] = depth
        left -= depth
    return depths


def _others(cheapest: Floats, covered: int) -> Floats:
    """[sum, depth] -> the cheapest at sum - depth; infinite below 0."""
    padded = np.concatenate([np.full(covered, np.inf), cheapest])
    return cast("Floats", np.lib.stride_tricks.sliding_window_view(padded, covered + 1)[:, ::-1])


def _gridded(problem: _Problem, start: Ints, covered: int) -> Ints:
    """Latencies on a grid between the soonest that covers everything and the one at which nothing is gained any more, then finer."""
    best, ratio = start, _rated(problem, start)
    latest_s, least_s = _all_s(problem), problem.split(start)[1].round_s
    if not (0 < least_s < latest_s < math.inf):
        return best
    rated: list[tuple[float, float]] = []
    price = 0.0
    for latency_s in cast("list[float]", np.geomspace(least_s, latest_s, _GRID).tolist()):
        depths, price = _priced_at(problem.needs(latency_s), problem.fleet.total, covered, price)
        own = _rated(problem, depths) if depths is not None else 0.0
        rated.append((own, latency_s))
        if depths is not None and own > ratio:
            best, ratio = depths, own
    top = rated.index(max(rated))
    around = [latency_s for _, latency_s in rated[max(0, top - 1) : top + 2]]
    for latency_s in cast("list[float]", np.linspace(around[0], around[-1], _REFINED + 2)[1:-1].tolist()):
        depths, price = _priced_at(problem.needs(latency_s), problem.fleet.total, covered, price)
        if depths is not None and (own := _rated(problem, depths)) > ratio:
            best, ratio = depths, own
    return best


def _priced_at(needs: Floats, total: float, covered: int, price: float) -> tuple[Ints | None, float]:
    """The knapsack by a price on the resource, and that price; `price` is one to begin with, or 0.

    Each of the devices that need least to go all the way down is set first; of a large fleet the first of them alone, as one device more
    or less at the bottom counts for nothing there.
    """
    deep = needs[:, covered]
    anchors = cast("list[int]", np.argsort(deep, kind="stable")[: _ANCHORS if len(needs) <= _FEW else 1].tolist())
    best: Ints | None = None
    for anchor in anchors:
        if not float(deep[anchor]) <= total:
            continue
        rest: Floats = np.array(needs)
        rest[anchor, 1:] = np.inf
        depths, price = _priced(rest, total - float(deep[anchor]), price)
        depths[anchor] = covered
        if best is None or int(depths.sum()) > int(best.sum()):
            best = depths
    return best, price


def _priced(needs: Floats, total: float, price: float) -> tuple[Ints, float]:
    count, choices = needs.shape
    worth: Floats = np.arange(choices, dtype=np.float64)[None, :]
    rows: Ints = np.arange(count, dtype=np.intp)
    costs: Floats = np.where(np.isfinite(needs), needs, _NEVER)
    gain: Floats = np.empty_like(costs)

    def at(price: float) -> tuple[Ints, float]:
        """Each device's best choice, the cheaper one among equals, and what all take."""
        np.multiply(costs, -price, out=gain)
        np.add(gain, worth, out=gain)
        chosen: Ints = gain.argmax(axis=1)
        return chosen, float(costs[rows, chosen].sum())

    # Nearly for nothing: whoever is in time at all goes as deep as it can.
    above, used = at(1.0 / _NEVER * choices * 2.0)
    if used <= total:
        return above, price
    least = float(costs.min(initial=_NEVER, where=costs > 0))
    low, high = least * 1e-9, choices / least * 2.0  # at the latter nothing that costs anything is worth it
    cheap: Ints = np.array(np.zeros(count), dtype=np.intp)
    halvings = _HALVINGS
    if low < price < high:  # the last latency's price is near this one's
        halvings = _HALVINGS_NEAR
        chosen, used = at(price)
        step = _NEAR
        if used <= total:
            cheap, high = chosen, price
            while low < (price := price / step) and (found := at(price))[1] <= total:
                cheap, high, step = found[0], price, step * step
            low = max(low, price)
        else:
            above, low = chosen, price
            while high > (price := price * step) and (found := at(price))[1] > total:
                above, low, step = found[0], price, step * step
            high = min(high, price)
            cheap = at(high)[0]
    for _ in range(halvings):
        price = math.sqrt(low * high)
        chosen, used = at(price)
        if used <= total:
            high, cheap = price, chosen
        else:
            low, above = price, chosen
    return _filled(costs, cheap, above, total), high


def _filled(costs: Floats, cheap: Ints, above: Ints, total: float) -> Ints:
    """From the choice that is within `total`, towards the dearer one, by what a depth costs, while there is room."""
    rows: Ints = np.arange(cheap.size, dtype=np.intp)
    depths: Ints = np.array(cheap)
    left = total - float(costs[rows, cheap].sum())
    more = above - cheap
    cost = costs[rows, above] - costs[rows, cheap]
    better: Ints = np.flatnonzero(more > 0)
    order = better[np.argsort(cost[better] / more[better], kind="stable")][:_FILLED_MAX]
    for device in cast("list[int]", order.tolist()):
        first, last = int(cheap[device]), int(above[device])
        steps = costs[device, first + 1 : last + 1] - costs[device, first]
        within = np.flatnonzero(steps <= left)
        if within.size:
            depths[device] = first + 1 + int(within[-1])
            left -= float(steps[within[-1]])
    return depths

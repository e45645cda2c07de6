"""Matchings of blocks to devices for any pattern of allowed pairs: least cost, least greatest time, and best partial cover."""

# scipy is imported by the functions that need it: it takes a third of a second, which no `--help` should wait for.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from fleetune.coordinator.planner.problem import Bools, Floats, Ints


def least_cost(costs: Floats) -> tuple[float, Ints] | None:
    """The cheapest matching that gives every block (column) a device (row) of its own: its cost, and the device of each block.

    Infinite entries are pairs that are not allowed; None where no matching is left.
    """
    from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportUnknownVariableType] - scipy has no types

    device_count, block_count = costs.shape
    if block_count == 0:
        return 0.0, np.zeros(0, dtype=np.intp)
    if device_count < block_count:
        return None
    # Of the L cheapest devices of a block, the other blocks take L - 1 at most: a dearer one is never needed.
    kept: Ints = np.arange(device_count, dtype=np.intp)
    if device_count > 2 * block_count:
        kept = np.unique(np.argpartition(costs, block_count - 1, axis=0)[:block_count])
    try:
        rows, columns = cast("tuple[Ints, Ints]", cast("Any", linear_sum_assignment)(np.transpose(costs[kept])))  # Any: scipy has no types
    except ValueError:  # "cost matrix is infeasible"
        return None
    device_of: Ints = kept[columns[np.argsort(rows)]]
    return float(costs[device_of, np.arange(block_count)].sum()), device_of


def any_matching(allowed: Bools) -> Ints | None:
    """Some matching of every block (column) to a device (row) of its own along allowed pairs, by Hopcroft and Karp, or None."""
    from scipy.sparse import csr_matrix  # pyright: ignore[reportUnknownVariableType] - scipy has no types
    from scipy.sparse.csgraph import maximum_bipartite_matching  # pyright: ignore[reportUnknownVariableType]

    if allowed.shape[1] == 0:
        return np.zeros(0, dtype=np.intp)
    if allowed.shape[0] < allowed.shape[1]:
        return None
    graph = cast("Any", csr_matrix)(np.transpose(allowed))  # Any: scipy has no types
    found = cast("Ints", cast("Any", maximum_bipartite_matching)(graph, perm_type="column"))
    return found.astype(np.intp) if bool((found >= 0).all()) else None


def least_greatest(times: Floats) -> tuple[float, Ints] | None:
    """The matching whose greatest time is least, for times in any order: bisection over the values, Hopcroft-Karp at each."""
    best = any_matching(np.isfinite(times))
    if best is None:
        return None
    if not best.size:
        return 0.0, best
    # Every block needs some device, so nothing below the greatest column minimum can do.
    low = float(times.min(axis=0).max())
    high = float(times[best, np.arange(times.shape[1])].max())
    values = np.unique(times[(times >= low) & (times <= high)])
    first, last = 0, values.size - 1
    while first < last:
        middle = (first + last) // 2
        found = any_matching(times <= values[middle])
        if found is None:
            first = middle + 1
        else:
            best, last = found, middle
    return float(times[best, np.arange(times.shape[1])].max()), best


def priority_cover(usable: Bools, priority: Floats) -> tuple[int, ...]:
    """The blocks to train where not all can be, in depth order: greedy by priority, ties to the block nearer the loss.

    Sets of blocks that devices can cover at once form a (transversal) matroid, so this greedy choice has the greatest sum of priorities
    and the greatest number of blocks. A block enters if an augmenting path finds room for it (Berge, Kuhn).
    """
    device_count, block_count = usable.shape
    device_of = np.full(block_count, -1, dtype=np.intp)
    block_of = np.full(device_count, -1, dtype=np.intp)
    order = sorted(range(block_count), key=lambda block: (-float(priority[block]), block))
    return tuple(sorted(block for block in order if make_room(usable, device_of, block_of, block)))


def make_room(usable: Bools, device_of: Ints, block_of: Ints, block: int) -> bool:
    """Gives `block` a device, moving blocks that have one to others where needed; changes both maps, or nothing and returns False."""
    reached_from = np.full(usable.shape[0], -1, dtype=np.intp)
    queue = [block]
    for current in queue:
        fresh = np.flatnonzero(usable[:, current] & (reached_from < 0))
        reached_from[fresh] = current
        free = fresh[block_of[fresh] < 0]
        if free.size:
            _shift(device_of, block_of, reached_from, int(free[0]), block)
            return True
        queue.extend(cast("Sequence[int]", block_of[fresh].tolist()))
    return False


def _shift(device_of: Ints, block_of: Ints, reached_from: Ints, device: int, block: int) -> None:
    while True:
        current = int(reached_from[device])
        before = int(device_of[current])
        device_of[current], block_of[device] = device, current
        if current == block:
            return
        device = before

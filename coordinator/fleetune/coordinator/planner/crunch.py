"""CRUNCH (cutting, recounting, checking): the block-device matching of least latency under fixed shares of the uplink.

Reconstructed from the abstract of Wu, Chen, Huang, "Resource Management for Low-latency Cooperative Fine-tuning of Foundation Models at
the Network Edge" (LoLa-DEFT, arXiv:2407.09873): the idea of cutting, recounting and checking, and the monotonicity in depth, are the
paper's; the steps below and their proof are ours, and may differ from the paper's.

If the times of every device rise with depth, the blocks a device can serve within a time T are a prefix 1..d, and sets of servers are
nested. All L blocks can then be served iff at least L - l + 1 devices reach down to each block l. (Necessary: blocks l..L need as many
different devices. Sufficient: serve L, L-1, ...; at block l at most L - l devices are taken.) So the greatest remaining time is cut
again and again, one count changes, and one count is checked; the first cut that fails names the least possible T.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from fleetune.coordinator.planner import matching
from fleetune.coordinator.planner.problem import Bools, Floats, Ints

How = Literal["cut", "bisect", "hopcroft-karp"]

CUT_CELLS_MAX = 600
"""From about so many pairs on, sorting and bisecting in numpy is faster than cutting one by one in Python."""


@dataclass(frozen=True, eq=False)
class Matched:
    """The least greatest time, the device (row) of each block, and how they were found."""

    value_s: float
    device_of: Ints
    how: How


def match(times: Floats) -> Matched | None:
    """The matching of least greatest time for times (K, L), infinite where a pair is not allowed; None where not all blocks can be served.

    Where a row falls with depth, or has a hole, CRUNCH would be silently wrong: Hopcroft-Karp takes over.

    >>> match(np.array([[1.0, 9.0], [2.0, 3.0]])).value_s
    3.0
    """
    if not monotone(times):
        found = matching.least_greatest(times)
        return None if found is None else Matched(found[0], found[1], "hopcroft-karp")
    return cut(times) if times.size < CUT_CELLS_MAX else bisect(times)


def monotone(times: Floats) -> bool:
    """Whether no row falls anywhere: then, infinite entries are at its end, too."""
    return bool((times[:, 1:] >= times[:, :-1]).all()) and not bool(np.isnan(times).any())


def cut(times: Floats) -> Matched | None:
    """One cut at a time, from the greatest time down, off a heap. For monotone times only."""
    device_count, block_count = times.shape
    if block_count == 0:
        return Matched(0.0, np.zeros(0, dtype=np.intp), "cut")
    rows = cast("list[list[float]]", times.tolist())
    depth = cast("list[int]", np.isfinite(times).sum(axis=1).tolist())
    spare = cast("list[int]", _spare(np.asarray(depth, dtype=np.intp), block_count).tolist())
    if min(spare) < 0:
        return None
    # The greatest surviving time is some device's deepest block.
    heap = [(-rows[device][depth[device] - 1], device) for device in range(device_count) if depth[device]]
    heapq.heapify(heap)
    while True:
        negative, device = heap[0]
        block = depth[device] - 1
        if spare[block] == 0:  # the check fails: without this pair, blocks from here to the deepest lack a device
            return Matched(-negative, _assign(times, -negative), "cut")
        spare[block] -= 1  # the recount: only this block has lost a server
        depth[device] = block
        if block:
            heapq.heapreplace(heap, (-rows[device][block - 1], device))
        else:
            heapq.heappop(heap)


def bisect(times: Floats) -> Matched | None:
    """The same value by bisecting the sorted times, with the same check. For monotone times only."""
    block_count = times.shape[1]
    if block_count == 0:
        return Matched(0.0, np.zeros(0, dtype=np.intp), "bisect")
    if not _served(np.isfinite(times)):
        return None
    # Every block needs its fastest device at least.
    low = float(times.min(axis=0).max())
    values = np.sort(times[np.isfinite(times) & (times >= low)])
    first, last = 0, values.size - 1
    while first < last:
        middle = (first + last) // 2
        if _served(times <= values[middle]):
            last = middle
        else:
            first = middle + 1
    value = float(values[first])
    return Matched(value, _assign(times, value), "bisect")


def _served(within: Bools) -> bool:
    return bool((_spare(within.sum(axis=1), within.shape[1]) >= 0).all())


def _spare(depth: Ints, block_count: int) -> Ints:
    """How many devices more than needed reach down to each block (L,); `depth` (K,) counts the blocks that a device can serve."""
    ending = np.bincount(depth, minlength=block_count + 1)
    reaching = ending[::-1].cumsum()[::-1][1:]
    return reaching - np.arange(block_count, 0, -1)


def _assign(times: Floats, value_s: float) -> Ints:
    """From the deepest block up, each time the fastest free device that is in time; ties to the first row."""
    block_count = times.shape[1]
    device_of = np.full(block_count, -1, dtype=np.intp)
    left = np.where(times <= value_s, times, np.inf)
    for block in range(block_count - 1, -1, -1):
        device = int(left[:, block].argmin())
        device_of[block] = device
        left[device] = np.inf
    return device_of

"""What the planner is compared with: matchings under equal shares, chosen at random or greedily, and one device that does everything."""

from __future__ import annotations

import numpy as np

from fleetune.coordinator.planner.links import send_s
from fleetune.coordinator.planner.matching import least_cost, make_room
from fleetune.coordinator.planner.problem import Fleet, Floats, Ints
from fleetune.coordinator.planner.split import equal_times


def random_matching(fleet: Fleet, rng: np.random.Generator) -> Ints | None:
    """A random matching of all blocks along usable pairs: the cheapest under random costs, uniform where every pair is usable."""
    costs = np.where(fleet.usable, rng.random(fleet.usable.shape), np.inf)
    found = least_cost(costs)
    return None if found is None else found[1]


def greedy_matching(fleet: Fleet) -> Ints | None:
    """From the deepest block up, the free device that would finish it first with an equal share.

    Where no free device can take a block, devices given away before are moved along an augmenting path.
    """
    usable, times = fleet.usable, equal_times(fleet)
    device_count, block_count = usable.shape
    device_of, block_of = np.full(block_count, -1, dtype=np.intp), np.full(device_count, -1, dtype=np.intp)
    for block in range(block_count - 1, -1, -1):
        candidates = np.where(block_of < 0, times[:, block], np.inf)
        device = int(candidates.argmin()) if device_count else -1
        if device >= 0 and np.isfinite(candidates[device]):
            device_of[block], block_of[device] = device, block
        elif not make_room(usable, device_of, block_of, block):
            return None
    return device_of


def whole_step_s(fleet: Fleet) -> Floats:
    """When each device (K,) would finish all blocks by itself with all that it may use of the uplink; infinite where it cannot.

    One backward pass reaches all blocks, so the computing is that of the deepest block, and all payloads are sent. The gradients and
    the optimiser state of the other blocks are not counted, neither in time nor in memory: both favour this baseline.
    """
    if not fleet.blocks:
        return np.zeros(len(fleet.devices))
    shares = np.minimum(fleet.max_share, fleet.total)
    bits = np.broadcast_to(fleet.payload_bits.sum(), shares.shape)
    done = fleet.ready_s.max(axis=1) + send_s(bits, shares, fleet.bits_per_unit, fleet.snr_hz)
    return np.where(fleet.usable.all(axis=1), done, np.inf)


def best_single(fleet: Fleet) -> int | None:
    """The device that finishes all blocks first by itself; None where no device holds them all. Ties to the first."""
    if not fleet.devices:
        return None
    done = whole_step_s(fleet)
    best = int(done.argmin())
    return best if np.isfinite(done[best]) else None

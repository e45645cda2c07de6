"""Depth-aware data parallelism: the most covered blocks in a second, against every choice of depths there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator.planner import depthwise
from fleetune.coordinator.planner.problem import Fleet, fleet_of
from fleetune.coordinator.planner.split import Pairs, Split, split_pairs
from support.planning import random_fleet


def split_of(fleet: Fleet, depths: tuple[int, ...]) -> Split:
    """The exact split of a choice of depths, 0 for those that take no part."""
    chosen = np.flatnonzero(np.array(depths) > 0)
    at = np.array(depths)[chosen] - 1
    bits = np.cumsum(fleet.payload_bits)[at]
    pairs = Pairs(fleet.ready_s[chosen, at], bits, fleet.bits_per_unit[chosen], fleet.snr_hz[chosen], fleet.max_share[chosen])
    return split_pairs(pairs, fleet.total)


def best_ratio(fleet: Fleet) -> float:
    """Depths in a second of the best choice; 0 where nobody trains anything."""
    held = np.logical_and.accumulate(fleet.usable, axis=1)
    covered = int(held.any(axis=0).sum())
    best = 0.0
    for depths in itertools.product(*(range(int(deepest) + 1) for deepest in held.sum(axis=1))):
        if covered and max(depths, default=0) == covered:
            round_s = split_of(fleet, depths).round_s
            best = max(best, sum(depths) / round_s if round_s > 0 else math.inf)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_small_fleets_get_the_best_choice_there_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(25):
        fleet = random_fleet(rng, devices_max=4, blocks_max=4)
        found, best = depthwise.plan_depths(fleet), best_ratio(fleet)
        assert (found is None) == (best == 0)
        if found is not None:
            assert found.exact
            assert found.ratio == pytest.approx(best, rel=1e-8)


def realistic(rng: np.random.Generator, devices: int, blocks: int) -> Fleet:
    """Computing and links 4 times apart, memory for half of the blocks or more, a head of ten times the size now and then."""
    ready = np.exp(rng.uniform(0, math.log(4), (devices, 1))) * 20 * (1 + 0.05 * np.arange(blocks))[None, :]
    fits = np.arange(blocks)[None, :] < rng.integers(blocks // 2, 2 * blocks, devices)[:, None]
    bits = np.full(blocks, 10 ** rng.uniform(6, 8))
    bits[0] *= rng.choice([1, 10])
    return fleet_of(ready, bits, np.exp(rng.uniform(0, math.log(4), devices)) * 1e7, 1.0, fits=fits, kind="airtime")


def test_what_is_not_exact_loses_little(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    for _ in range(8):
        fleet = realistic(rng, 8, 8)
        exact = depthwise.plan_depths(fleet)
        with monkeypatch.context() as patch:
            patch.setattr(depthwise, "_CELLS_EXACT", 0)
            priced = depthwise.plan_depths(fleet)
        assert exact is not None
        assert priced is not None
        assert exact.exact
        assert not priced.exact
        assert 0.99 * exact.ratio <= priced.ratio <= exact.ratio * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), large=st.booleans())
def test_every_plan_can_be_carried_out(seed: int, large: bool) -> None:
    rng = np.random.default_rng(seed)
    fleet = realistic(rng, 30, 12) if large else random_fleet(rng, devices_max=5, blocks_max=5)
    found = depthwise.plan_depths(fleet)
    held = np.logical_and.accumulate(fleet.usable, axis=1)
    if found is None:
        assert not held.any()
        return
    assert found.exact == (fleet.ready_s.shape[0] * found.covered <= 130)
    assert found.covered == int(held.any(axis=0).sum())
    assert int(found.depths.max()) == found.covered, "every block that anybody can train is trained"
    assert bool((found.depths <= held.sum(axis=1)).all()), "memory is never exceeded"
    assert found.chosen.tolist() == np.flatnonzero(found.depths).tolist()
    assert math.fsum(found.split.shares.tolist()) <= fleet.total * (1 + 1e-12)
    assert bool((found.split.shares <= fleet.max_share[found.chosen]).all())
    assert bool((found.split.finish_s <= found.split.round_s).all())
    again = split_of(fleet, tuple(found.depths.tolist()))
    assert again.round_s == found.split.round_s


def test_it_is_never_worse_than_one_device_or_all_that_hold_everything() -> None:
    rng = np.random.default_rng(11)
    for _ in range(10):
        fleet = realistic(rng, 10, 8)
        found = depthwise.plan_depths(fleet)
        assert found is not None
        whole = np.flatnonzero(fleet.usable.all(axis=1))
        if not whole.size:
            continue
        everyone = tuple(8 if device in whole else 0 for device in range(10))
        assert found.ratio >= sum(everyone) / split_of(fleet, everyone).round_s * (1 - 1e-9)
        for device in whole.tolist():
            alone = tuple(8 if other == device else 0 for other in range(10))
            assert found.ratio >= 8 / split_of(fleet, alone).round_s * (1 - 1e-9)


def test_the_uplink_goes_to_those_for_whom_a_depth_costs_least() -> None:
    """Two that are as fast; with a hundredth of the uplink rate the second is not worth waiting for."""
    fleet = fleet_of([[1.0, 1.0], [1.0, 1.0]], [1e6, 1e6], [1e6, 1e4], 1.0, kind="airtime")
    found = depthwise.plan_depths(fleet)
    assert found is not None
    assert found.depths.tolist() == [2, 0]


def test_nothing_to_train_is_no_plan() -> None:
    assert depthwise.plan_depths(fleet_of(np.zeros((0, 2)), [1.0, 1.0], [], 1.0)) is None
    assert depthwise.plan_depths(fleet_of([[1.0]], [1.0], [0.0], 1.0)) is None
    assert depthwise.plan_depths(fleet_of([[1.0]], [1.0], [1.0], 1.0, fits=[[False]])) is None

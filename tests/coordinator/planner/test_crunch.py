"""CRUNCH against a second solver, and its refusal of times it cannot handle."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.planner import crunch
from fleetune.coordinator.planner.matching import least_greatest, priority_cover
from fleetune.coordinator.planner.problem import fleet_of
from fleetune.coordinator.planner.split import equal_times
from support import planning
from support.planning import Floats


def value(found: crunch.Matched | None) -> float:
    return math.inf if found is None else found.value_s


def check_matching(times: Floats, found: crunch.Matched | None) -> None:
    if found is None:
        return
    chosen = found.device_of.tolist()
    assert len(set(chosen)) == times.shape[1]
    assert max(times[device, block] for block, device in enumerate(chosen)) == found.value_s


def brute_force(times: Floats) -> float:
    blocks = range(times.shape[1])
    each = (
        max(times[device, block] for block, device in enumerate(chosen))
        for chosen in itertools.permutations(range(len(times)), len(blocks))
    )
    return float(min(each, default=math.inf))


def compare(rng: np.random.Generator, cases: int) -> int:
    infeasible = 0
    for _ in range(cases):
        blocks = int(rng.integers(1, 9))
        times = planning.random_times(rng, int(rng.integers(max(1, blocks - 1), blocks + 6)), blocks)
        assert crunch.monotone(times)
        wanted = planning.matched_s(times)
        infeasible += math.isinf(wanted)
        for form in (crunch.cut, crunch.bisect, crunch.match):
            found = form(times)
            assert value(found) == wanted
            check_matching(times, found)
        if times.shape[0] <= 5:
            assert brute_force(times) == wanted
    return infeasible


def test_both_forms_equal_hopcroft_karp_on_random_monotone_times() -> None:
    infeasible = compare(np.random.default_rng(11), 2000)
    assert 100 < infeasible < 1500, "both outcomes have to be met"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_forms_equal_hopcroft_karp_on_many_more() -> None:
    compare(np.random.default_rng(12), 30_000)


def test_a_case_solved_by_hand() -> None:
    times = np.array([[1.0, 2.0, 9.0], [2.0, 3.0, 4.0], [5.0, 6.0, 7.0], [1.0, math.inf, math.inf]])
    for form in (crunch.cut, crunch.bisect):
        found = form(times)
        assert found is not None
        assert found.value_s == 4.0
        assert found.device_of.tolist() == [3, 0, 1]


@pytest.mark.parametrize("form", [crunch.cut, crunch.bisect, crunch.match])
def test_one_device_and_one_block(form: object) -> None:
    assert callable(form)
    assert value(form(np.array([[3.0]]))) == 3.0
    assert form(np.array([[math.inf]])) is None


@pytest.mark.parametrize("form", [crunch.cut, crunch.bisect, crunch.match])
def test_no_blocks_and_no_devices(form: object) -> None:
    assert callable(form)
    assert value(form(np.zeros((3, 0)))) == 0.0
    assert form(np.zeros((0, 2))) is None


@pytest.mark.parametrize("form", [crunch.cut, crunch.bisect, crunch.match])
def test_fewer_devices_than_blocks_is_infeasible(form: object) -> None:
    assert callable(form)
    assert form(np.array([[1.0, 2.0]])) is None


def test_as_many_devices_as_blocks() -> None:
    rng = np.random.default_rng(3)
    for size in range(1, 6):
        times = np.sort(rng.random((size, size)), axis=1)
        assert value(crunch.match(times)) == brute_force(times)


def test_a_big_head_makes_rows_fall_and_takes_the_fallback() -> None:
    rng = np.random.default_rng(5)
    for devices in (12, 24, 50):
        for _ in range(20):
            speed = np.exp(rng.uniform(0, math.log(4), devices))
            ready = 0.131 * speed[:, None] * (1 + 0.085 * np.arange(1, 13))[None, :]
            bits = np.full(12, 24_576.0 * 32)
            bits[0] = 25 * bits[1]
            times = equal_times(fleet_of(ready, bits, np.exp(rng.uniform(0, math.log(4), devices)), 5e6))
            assert not crunch.monotone(times)
            found = crunch.match(times)
            assert found is not None
            assert found.how == "hopcroft-karp"
            assert found.value_s == planning.matched_s(times)


def test_cutting_would_have_been_wrong_there() -> None:
    """What the detection is for: on times that fall, the cutting form gives a matching that is not the best."""
    times = np.array([[9.0, 1.0], [9.0, 1.0], [2.0, 4.0]])
    assert not crunch.monotone(times)
    assert value(crunch.match(times)) == 2.0
    assert value(crunch.cut(times)) == 9.0


def test_a_hole_in_the_middle_takes_the_fallback() -> None:
    times = np.array([[1.0, math.inf, 3.0], [1.0, 2.0, math.inf], [4.0, 5.0, 6.0]])
    found = crunch.match(times)
    assert found is not None
    assert (found.how, found.value_s) == ("hopcroft-karp", 4.0)


def test_not_a_number_is_never_monotone() -> None:
    assert not crunch.monotone(np.array([[math.nan]]))
    assert not crunch.monotone(np.array([[1.0, math.nan]]))


@given(st.integers(0, 2**32 - 1))
def test_the_fallback_is_exact_for_any_times(seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = rng.integers(0, 5, (int(rng.integers(1, 6)), int(rng.integers(1, 5)))).astype(np.float64)
    times[rng.random(times.shape) < 0.3] = math.inf
    found = least_greatest(times)
    assert (math.inf if found is None else found[0]) == brute_force(times)


@given(st.integers(0, 2**32 - 1))
def test_replicas_need_as_many_devices_as_the_suffix_counts_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks, devices = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    reach = rng.integers(0, blocks + 1, devices)
    counts = rng.integers(0, 3, blocks)
    fits = np.arange(blocks)[None, :] < reach[:, None]
    fleet = fleet_of(np.ones((devices, blocks)), np.ones(blocks), np.ones(devices), 1.0, fits=fits).replicated(
        [int(count) for count in counts]
    )
    wanted = all((reach > block).sum() >= counts[block:].sum() for block in range(blocks))
    assert (crunch.match(equal_times(fleet)) is not None) == wanted


@given(st.integers(0, 2**32 - 1))
def test_the_cover_is_as_large_as_any_and_has_the_greatest_priority(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, blocks = int(rng.integers(0, 5)), int(rng.integers(1, 6))
    usable = rng.random((devices, blocks)) < 0.4
    priority = rng.integers(0, 5, blocks).astype(np.float64)
    cover = priority_cover(usable, priority)
    assert planning.cover_size(usable, cover) == len(cover)
    every = [
        chosen
        for size in range(blocks + 1)
        for chosen in itertools.combinations(range(blocks), size)
        if planning.cover_size(usable, chosen) == size
    ]
    assert len(cover) == max(len(chosen) for chosen in every)
    assert priority[list(cover)].sum() == max(priority[list(chosen)].sum() for chosen in every)

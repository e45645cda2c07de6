"""Blocks and bandwidth together: the exact solver against a second one, its certificate, and the dual's bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator.planner import crunch, dual, jbba
from fleetune.coordinator.planner.matching import least_cost
from fleetune.coordinator.planner.plan import Plan, plan
from fleetune.coordinator.planner.problem import Fleet, fleet_of
from fleetune.coordinator.planner.split import best_split
from support import planning

RELATIVE = 1e-9

seeds = st.integers(0, 2**32 - 1)


def coverable(seed: int) -> Fleet:
    """The first fleet from this seed on that can be covered."""
    rng = np.random.default_rng(seed)
    while True:
        fleet = planning.random_fleet(rng)
        if plan(fleet, "exact").feasible:
            return fleet


def latency(made: Plan) -> float:
    assert made.round_seconds is not None
    return made.round_seconds


def compare(rng: np.random.Generator, cases: int) -> tuple[int, int]:
    infeasible = brute = 0
    for _ in range(cases):
        fleet = planning.random_fleet(rng)
        made = plan(fleet, "exact")
        wanted = planning.bisected_s(fleet)
        assert planning.complaints(fleet, made) == []
        if math.isinf(wanted):
            infeasible += 1
            assert not made.feasible
            continue
        assert made.feasible
        assert latency(made) == pytest.approx(wanted, rel=RELATIVE)
        assert made.certificate.kind == "exact"
        bound = made.certificate.lower_bound_seconds
        assert bound is not None
        assert latency(made) * (1 - 1e-10) <= bound <= latency(made)
        if len(fleet.devices) <= 5 and len(fleet.blocks) <= 4:
            brute += 1
            assert latency(made) == pytest.approx(planning.brute_force_s(fleet), rel=RELATIVE)
    return infeasible, brute


def test_exact_equals_bisection_and_brute_force_on_random_fleets() -> None:
    infeasible, brute = compare(np.random.default_rng(11), 700)
    assert infeasible > 40, "both outcomes have to be met"
    assert brute > 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exact_equals_bisection_and_brute_force_on_many_more() -> None:
    compare(np.random.default_rng(12), 10_000)


def test_a_case_solved_by_hand() -> None:
    # 2 / (T - 1) + 1 / (T - 2) = 2 at T = 3; the other way round, 2 / (T - 2) + 1 / (T - 1) = 2, ends later.
    made = plan(fleet_of([[1.0, 2.0], [1.0, 2.0]], [2.0, 1.0], [1.0, 1.0], 2.0))
    assert latency(made) == pytest.approx(3.0, rel=1e-12)
    assert [one.share for one in made.assignments] == pytest.approx([1.0, 1.0])


def test_nothing_faster_by_a_millionth_needs_less_than_the_total() -> None:
    rng = np.random.default_rng(4)
    checked = 0
    while checked < 100:
        fleet = planning.random_fleet(rng)
        made = plan(fleet)
        if made.feasible and latency(made) > 0:
            assert not planning.reachable(fleet, latency(made) * (1 - 1e-6))
            checked += 1


def test_the_descent_takes_few_assignment_problems() -> None:
    rng = np.random.default_rng(8)
    speed = np.exp(rng.uniform(0, math.log(4), 200))
    fleet = fleet_of(speed[:, None] * (1 + 0.08 * np.arange(24)), np.full(24, 2e8), np.exp(rng.uniform(0, math.log(4), 200)), 5e6)
    found = jbba.solve(fleet)
    assert found is not None
    assert found.proven
    assert found.assignments_solved <= 6


def test_the_descent_ends_at_the_optimum_from_any_matching() -> None:
    for seed in range(60):
        fleet = coverable(seed).by_name()
        best = jbba.solve(fleet)
        assert best is not None
        rng = np.random.default_rng(seed)
        for _ in range(3):
            allowed = np.where(fleet.usable, rng.random(fleet.usable.shape), math.inf)
            start = least_cost(allowed)
            assert start is not None
            assert jbba.descend(fleet, start[1]).split.round_s == pytest.approx(best.split.round_s, rel=RELATIVE)


# ---------------------------------------------------------------------------------------------------------------- the dual


def test_the_dual_bound_is_below_the_optimum_and_its_own_plan_above() -> None:
    rng = np.random.default_rng(21)
    gaps: list[float] = []
    while len(gaps) < 80:
        fleet = planning.random_fleet(rng)
        best = plan(fleet)
        if not best.feasible:
            continue
        found = dual.solve(fleet.by_name())
        assert found is not None
        assert found.lower_bound_s <= latency(best) * (1 + RELATIVE)
        assert found.split.round_s >= latency(best) * (1 - RELATIVE)
        assert found.split.shares.sum() <= fleet.total * (1 + 1e-14)
        gaps.append(found.split.round_s / latency(best) - 1 if latency(best) > 0 else 0.0)
    assert np.mean(gaps) < 0.05


def test_the_dual_solver_reports_its_bound_and_ends_at_the_optimum() -> None:
    for seed in range(25):
        fleet = coverable(seed)
        made, best = plan(fleet, "dual"), plan(fleet)
        assert planning.complaints(fleet, made) == []
        assert latency(made) == pytest.approx(latency(best), rel=RELATIVE)
        bound, gap = made.certificate.lower_bound_seconds, made.certificate.gap
        assert made.certificate.kind == "dual"
        assert bound is not None
        assert gap is not None
        assert 0 <= bound <= latency(made)
        assert gap == pytest.approx(1 - bound / latency(made) if latency(made) else 0.0, abs=1e-12)


def test_the_dual_gap_is_small_for_large_fleets() -> None:
    rng = np.random.default_rng(2)
    gaps: list[float] = []
    for bits in (8e5, 2.3e8):
        for _ in range(2):
            speed = np.exp(rng.uniform(0, math.log(4), 200))
            rates = np.exp(rng.uniform(0, math.log(4), 200))
            made = plan(fleet_of(0.13 * speed[:, None] * (1 + 0.085 * np.arange(24)), np.full(24, bits), rates, 5e6), "dual")
            assert made.certificate.gap is not None
            gaps.append(made.certificate.gap)
    assert np.mean(gaps) <= 0.01


# ------------------------------------------------------------------------------------------------------------- metamorphic


@given(seeds)
@settings(max_examples=60)
def test_more_of_the_resource_never_hurts(seed: int) -> None:
    fleet = coverable(seed)
    assert latency(plan(replace(fleet, total=fleet.total * 1.5))) <= latency(plan(fleet)) * (1 + RELATIVE)


@given(seeds)
@settings(max_examples=25)
def test_one_more_device_never_hurts(seed: int) -> None:
    fleet = coverable(seed)
    for name in fleet.devices:
        fewer = plan(fleet.without(name))
        if fewer.feasible:
            assert latency(plan(fleet)) <= latency(fewer) * (1 + RELATIVE)


@given(seeds, st.floats(1e-3, 1e3))
@settings(max_examples=60)
def test_times_and_payloads_scale_the_round(seed: int, factor: float) -> None:
    fleet = coverable(seed)
    scaled = replace(fleet, ready_s=fleet.ready_s * factor, payload_bits=fleet.payload_bits * factor)
    linear = np.isnan(fleet.snr_hz).all()
    if linear:
        assert latency(plan(scaled)) == pytest.approx(latency(plan(fleet)) * factor, rel=RELATIVE)


@given(seeds)
@settings(max_examples=60)
def test_the_order_of_the_devices_changes_nothing(seed: int) -> None:
    fleet = planning.random_fleet(np.random.default_rng(seed))
    order = np.random.default_rng(seed + 1).permutation(len(fleet.devices))
    turned = fleet.only(order, range(len(fleet.blocks)))
    for solver in ("exact", "crunch-equal", "greedy-equal", "random-equal", "best-single"):
        ours, theirs = plan(fleet, solver), plan(turned, solver)
        assert replace(ours, idle_devices=()) == replace(theirs, idle_devices=())
        assert sorted(ours.idle_devices) == sorted(theirs.idle_devices)


@given(seeds)
@settings(max_examples=40)
def test_with_endless_bandwidth_only_the_computing_counts(seed: int) -> None:
    fleet = coverable(seed)
    fleet = replace(fleet, total=1e14, max_share=np.full(len(fleet.devices), np.inf), snr_hz=np.full(len(fleet.devices), np.nan))
    wanted = crunch.match(np.where(fleet.usable, fleet.ready_s, math.inf))
    if wanted is not None and wanted.value_s > 0:
        assert latency(plan(fleet)) == pytest.approx(wanted.value_s, rel=1e-8)


def test_without_computing_the_round_is_the_cheapest_sum_of_uploads() -> None:
    rng = np.random.default_rng(9)
    for _ in range(30):
        bits, rates = rng.uniform(1, 5, 4), rng.uniform(1, 5, 7)
        fleet = fleet_of(np.zeros((7, 4)), bits, rates, 3.0)
        found = least_cost(bits[None, :] / rates[:, None])
        assert found is not None
        assert latency(plan(fleet)) == pytest.approx(found[0] / 3.0, rel=RELATIVE)


def test_identical_devices_are_taken_in_the_order_of_their_names() -> None:
    made = plan(fleet_of(np.ones((4, 2)) * [1.0, 2.0], [1.0, 1.0], np.ones(4), 1.0, devices=["d", "b", "c", "a"]), "crunch-equal")
    assert sorted(one.device for one in made.assignments) == ["a", "b"]


def test_times_and_links_that_are_wrong_by_a_fifth_cost_a_bounded_part() -> None:
    """The plan made from noisy figures, carried out on the true ones: weights as planned, T at most (1.2 / 0.8) times the best."""
    rng = np.random.default_rng(6)
    losses: list[float] = []
    for _ in range(60):
        speed, rates = np.exp(rng.uniform(0, math.log(4), 12)), np.exp(rng.uniform(0, math.log(4), 12))
        true = fleet_of(speed[:, None] * (1 + 0.085 * np.arange(8)), np.full(8, 4.0), rates, 4.0)
        noisy = replace(
            true, ready_s=true.ready_s * rng.uniform(0.8, 1.2, (12, 1)), bits_per_unit=true.bits_per_unit * rng.uniform(0.8, 1.2, 12)
        )
        made, row = plan(noisy), {name: index for index, name in enumerate(true.devices)}
        chosen = np.array([row[one.device] for one in made.assignments])
        shares = np.array([one.share for one in made.assignments])
        actual = (true.ready_s[chosen, np.arange(8)] + true.payload_bits / (shares * true.bits_per_unit[chosen])).max()
        losses.append(float(actual) / latency(plan(true)) - 1)
    assert min(losses) + RELATIVE >= 0
    assert max(losses) <= 1.2 / 0.8 - 1 + RELATIVE
    assert np.mean(losses) < 0.2


# -------------------------------------------------------------------------------------------------------- splits and links


def test_a_link_that_a_cap_binds_leaves_the_rest_of_the_uplink_free() -> None:
    made = plan(fleet_of([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0], [1.0, 1.0], 10.0, max_share=[0.1, 9.0]))
    shares = {one.device: one.share for one in made.assignments}
    assert shares["d0"] == pytest.approx(0.1)
    assert latency(made) == pytest.approx(11.0)
    assert sum(shares.values()) < 1.0


def test_all_pairs_of_a_split_finish_together_when_nothing_else_binds() -> None:
    fleet = fleet_of([[1.0, 3.0], [2.0, 4.0]], [5.0, 1.0], [1.0, 2.0], 2.0)
    split = best_split(fleet, np.array([0, 1]))
    assert split.finish_s == pytest.approx([split.round_s, split.round_s], rel=1e-12)
    assert split.shares.sum() == pytest.approx(2.0, rel=1e-12)

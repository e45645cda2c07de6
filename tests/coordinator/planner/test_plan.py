"""Plans as a whole: baselines, partial covers, replicas, spares, rotation, explanations and predictions."""

from __future__ import annotations

import decimal
import math
import time
from dataclasses import replace
from decimal import Decimal
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator.planner.explain import explanations
from fleetune.coordinator.planner.links import rate_bits_per_s, share_needed
from fleetune.coordinator.planner.plan import SOLVER_NAMES, Plan, SolverName, plan
from fleetune.coordinator.planner.predict import Prediction, choice, predictions
from fleetune.coordinator.planner.problem import fleet_of
from fleetune.coordinator.planner.rotation import plan_rotated
from fleetune.coordinator.planner.spares import spares
from fleetune.errors import ConfigError
from support import planning

SOLVERS: tuple[SolverName, ...] = ("exact", "crunch-equal", "dual", "random-equal", "greedy-equal", "best-single")
COVERING = SOLVERS[:-1]

seeds = st.integers(0, 2**32 - 1)


def latency(made: Plan) -> float:
    assert made.round_seconds is not None
    return made.round_seconds


# -------------------------------------------------------------------------------------------------------------- solvers


def test_all_solvers_are_named() -> None:
    assert (*COVERING[:3], *COVERING[3:], "best-single") == SOLVER_NAMES


def test_an_unknown_solver_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="best-single"):
        plan(fleet_of([[1.0]], [1.0], [1.0], 1.0), cast("SolverName", "hungarian"))


@given(seeds)
@settings(max_examples=50)
def test_every_solver_gives_a_plan_that_holds(seed: int) -> None:
    fleet = planning.random_fleet(np.random.default_rng(seed))
    best = plan(fleet)
    for solver in COVERING:
        made = plan(fleet, solver, seed=seed)
        assert planning.complaints(fleet, made) == []
        assert made.feasible == best.feasible
        assert made.uncovered_blocks == best.uncovered_blocks
        if made.assignments:
            bound = made.certificate.lower_bound_seconds
            assert bound is not None
            assert bound <= latency(best)
            assert latency(best) <= latency(made) * (1 + 1e-9)


@given(seeds)
@settings(max_examples=60)
def test_extreme_figures_are_planned_like_any(seed: int) -> None:
    """Twenty-four orders of magnitude in one fleet; a radio at the most that its power allows needs any share up to an endless one."""
    fleet = planning.extreme_fleet(np.random.default_rng(seed))
    best = plan(fleet)
    assert best.certificate.gap is None or best.certificate.gap < 2e-11
    for solver in COVERING:
        made = plan(fleet, solver)
        assert planning.complaints(fleet, made) == []
        if made.round_seconds is not None and best.round_seconds is not None:
            assert math.isfinite(made.round_seconds)
            assert best.round_seconds <= made.round_seconds * (1 + 1e-9)
            assert (made.certificate.lower_bound_seconds or 0.0) <= best.round_seconds * (1 + 1e-12)


@given(seeds)
@settings(max_examples=60)
def test_crunch_equal_is_the_best_of_the_equal_ones(seed: int) -> None:
    fleet = planning.random_fleet(np.random.default_rng(seed))
    best = plan(fleet, "crunch-equal")
    for solver in ("random-equal", "greedy-equal"):
        if best.assignments:
            assert latency(best) <= latency(plan(fleet, solver, seed=seed))


def test_a_seed_gives_the_same_random_matching_again() -> None:
    fleet = fleet_of(np.ones((20, 6)), np.ones(6), np.ones(20), 1.0)
    assert plan(fleet, "random-equal", seed=3) == plan(fleet, "random-equal", seed=3)
    assert plan(fleet, "random-equal", seed=3) != plan(fleet, "random-equal", seed=4)


def test_the_random_matching_is_uniform_where_all_pairs_fit() -> None:
    fleet = fleet_of(np.ones((3, 2)), np.ones(2), np.ones(3), 1.0)
    seen = [tuple(one.device for one in plan(fleet, "random-equal", seed=seed).assignments) for seed in range(600)]
    counts = {pair: seen.count(pair) for pair in set(seen)}
    assert len(counts) == 6
    assert min(counts.values()) > 60


def test_the_best_single_device_sends_everything_and_is_alone() -> None:
    fleet = fleet_of([[1.0, 2.0], [0.5, 0.9]], [4.0, 2.0], [3.0, 1.0], 2.0, max_share=[1.0, math.inf])
    made = plan(fleet, "best-single")  # d0: 2 + 6 / 3 = 4; d1: 0.9 + 6 / 2 = 3.9
    assert made.feasible
    assert {one.device for one in made.assignments} == {"d1"}
    assert latency(made) == pytest.approx(3.9)
    assert sum(one.share for one in made.assignments) == pytest.approx(2.0)
    assert made.idle_devices == ("d0",)


def test_where_no_device_holds_all_best_single_takes_the_one_that_holds_most() -> None:
    fleet = fleet_of(np.ones((2, 3)), np.ones(3), np.ones(2), 1.0, fits=[[True, False, False], [True, True, False]])
    made = plan(fleet, "best-single")
    assert not made.feasible
    assert [one.device for one in made.assignments] == ["d1", "d1"]
    assert made.uncovered_blocks == ("block.2",)


# -------------------------------------------------------------------------------------------------------- partial covers


def test_fewer_devices_than_blocks_train_those_that_waited_longest() -> None:
    fleet = fleet_of(np.ones((2, 4)), np.ones(4), np.ones(2), 1.0, rounds_since_trained=[0, 3, 1, 2])
    made = plan(fleet)
    assert not made.feasible
    assert made.uncovered_blocks == ("block.0", "block.2")
    assert [one.share for one in made.assignments] == pytest.approx([0.5, 0.5])


def test_equal_priorities_go_to_the_blocks_next_to_the_loss() -> None:
    made = plan(fleet_of(np.ones((2, 4)), np.ones(4), np.ones(2), 1.0))
    assert [one.block for one in made.assignments] == ["block.0", "block.1"]


def test_a_thousand_devices_and_48_blocks_are_planned_within_a_tenth_of_a_second() -> None:
    """Of the processor's time, the best of three: others may be at work."""
    rng = np.random.default_rng(5)
    speed, rates = np.exp(rng.uniform(0, 1.4, 1000)), np.exp(rng.uniform(0, 1.4, 1000))
    fleet = fleet_of(speed[:, None] * (1 + 0.08 * np.arange(48)), np.full(48, 8e5), rates, 5e6)
    seconds: list[float] = []
    for _ in range(4):
        began_s = time.process_time()
        assert plan(fleet).feasible
        seconds.append(time.process_time() - began_s)
    assert min(seconds[1:]) <= 0.1


def test_no_devices_cover_nothing() -> None:
    made = plan(fleet_of(np.zeros((0, 2)), np.ones(2), [], 1.0))
    assert (made.feasible, made.round_seconds, made.assignments) == (False, None, ())
    assert made.uncovered_blocks == ("block.0", "block.1")
    assert made.certificate.lower_bound_seconds is None


def test_no_blocks_are_covered_at_once() -> None:
    for solver in SOLVERS:
        made = plan(fleet_of(np.zeros((2, 0)), [], np.ones(2), 1.0), solver)
        assert (made.feasible, made.round_seconds, made.idle_devices) == (True, 0.0, ("d0", "d1"))


def test_a_dead_link_or_no_resource_covers_only_what_needs_no_upload() -> None:
    for total, rates in ((1.0, [0.0, 0.0]), (0.0, [1.0, 1.0])):
        made = plan(fleet_of([[1.0, 2.0], [3.0, 4.0]], [0.0, 5.0], rates, total))
        assert made.uncovered_blocks == ("block.1",)
        assert latency(made) == 1.0
        assert made.assignments[0].share == 0.0


def test_nothing_to_compute_and_nothing_to_send_takes_no_time() -> None:
    for solver in SOLVERS:
        made = plan(fleet_of(np.zeros((2, 2)), np.zeros(2), np.ones(2), 1.0), solver)
        assert (made.feasible, made.round_seconds) == (True, 0.0)


def test_an_infinite_time_is_a_device_that_cannot() -> None:
    made = plan(fleet_of([[1.0, math.inf], [5.0, 6.0]], [1.0, 1.0], [1.0, 1.0], 1.0))
    assert [one.device for one in made.assignments] == ["d0", "d1"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ready_s", np.array([[math.nan]])),
        ("ready_s", np.array([[-1.0]])),
        ("ready_s", np.array([[1.0, 2.0]])),
        ("payload_bits", np.array([math.inf])),
        ("bits_per_unit", np.array([-1.0])),
        ("max_share", np.array([math.nan])),
        ("total", math.nan),
    ],
)
def test_numbers_that_make_no_sense_are_refused(field: str, value: Any) -> None:  # Any: fields of several types
    fleet = fleet_of([[1.0]], [1.0], [1.0], 1.0)
    with pytest.raises(ConfigError, match=field):
        replace(fleet, **{field: value})


# --------------------------------------------------------------------------------------------- replicas, spares, rotation


def test_replicas_give_a_block_to_several_devices() -> None:
    fleet = fleet_of(np.ones((4, 2)), np.ones(2), np.ones(4), 1.0).replicated([2, 1])
    made = plan(fleet)
    assert [one.block for one in made.assignments] == ["block.0", "block.0", "block.1"]
    assert len({one.device for one in made.assignments}) == 3


def test_a_spare_is_the_idle_device_that_would_finish_soonest() -> None:
    fleet = fleet_of([[1.0], [5.0], [4.0], [2.0]], [1.0], np.ones(4), 1.0, fits=[[True], [True], [True], [False]])
    found = spares(fleet, plan(fleet))
    assert found["block.0"].device == "d2"
    assert found["block.0"].finish_seconds == pytest.approx(5.0)


def test_after_a_device_has_left_the_rest_is_planned_anew() -> None:
    fleet = fleet_of([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], [1.0, 1.0], np.ones(3), 1.0)
    made = plan(fleet.without("d1"))
    assert {one.device for one in made.assignments} == {"d0", "d2"}


def test_no_device_trains_the_same_block_again_within_the_forbidden_rounds() -> None:
    fleet = fleet_of(np.ones((6, 3)), np.ones(3), np.ones(6), 1.0)
    history: list[dict[str, str]] = []
    for _ in range(8):
        turned = plan_rotated(fleet, history, rounds=3)
        assert turned.rounds_avoided == min(3, len(history))
        assert turned.longer_by == pytest.approx(0.0, abs=1e-9)
        history.append({one.block: one.device for one in turned.plan.assignments})
    for past, now in enumerate(history):
        for block, device in now.items():
            assert all(earlier[block] != device for earlier in history[max(0, past - 3) : past])


def test_rotation_gives_way_where_a_block_would_stay_uncovered() -> None:
    fits = [[True, True], [True, False]]
    fleet = fleet_of(np.ones((2, 2)), np.ones(2), np.ones(2), 1.0, fits=fits)
    turned = plan_rotated(fleet, [{"block.0": "d1", "block.1": "d0"}], rounds=2)
    assert turned.rounds_avoided == 0
    assert turned.plan.feasible


def test_rotation_says_what_it_costs() -> None:
    fleet = fleet_of([[1.0], [3.0]], [1.0], np.ones(2), 1.0)
    turned = plan_rotated(fleet, [{"block.0": "d0"}], rounds=1)
    assert turned.plan.assignments[0].device == "d1"
    assert turned.longer_by == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------------- explanations


@given(seeds)
@settings(max_examples=60)
def test_every_device_and_every_uncovered_block_is_explained(seed: int) -> None:
    fleet = planning.random_fleet(np.random.default_rng(seed))
    for solver in SOLVERS:
        made = plan(fleet, solver)
        reasons = explanations(fleet, made)
        assert {reason.name for reason in reasons if reason.kind == "device"} == set(fleet.devices)
        assert [reason.name for reason in reasons if reason.kind == "block"] == list(made.uncovered_blocks)
        assert not [reason for reason in reasons if "nan" in reason.text]


# ----------------------------------------------------------------------------------------------------------- predictions


def by_method(found: tuple[Prediction, ...]) -> dict[str, Prediction]:
    return {one.method: one for one in found}


def test_predictions_count_rows_and_full_gradient_rows() -> None:
    fleet = fleet_of([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], [1.0, 1.0], np.ones(3), 2.0)
    found = by_method(predictions(fleet, plan(fleet), 10.0, 1000.0))
    assert found["deft"].rows_per_round == 20.0
    assert found["deft"].full_gradient_rows_per_round == 10.0
    # Three devices send 2 bits each through 2 units: 2 s of computing, 3 s of sending.
    everyone = found["data-parallel"]
    assert everyone.round_seconds == pytest.approx(5.0)
    assert everyone.full_gradient_rows_per_round == 30.0
    assert everyone.seconds_per_row == pytest.approx(5.0 / 30.0)
    assert everyone.seconds_to_rows == pytest.approx(5.0 / 30.0 * 1000.0)
    assert found["best-single"].round_seconds == pytest.approx(3.0)
    assert found["best-single"].round_seconds == pytest.approx(latency(plan(fleet, "best-single")))


def test_the_fastest_subset_leaves_out_a_device_that_holds_the_others_up() -> None:
    fleet = fleet_of([[1.0], [1.0], [100.0]], [1.0], np.ones(3), 10.0)
    found = by_method(predictions(fleet, plan(fleet), 1.0, 1.0))
    assert found["data-parallel-fastest"].devices == ("d0", "d1")
    assert found["data-parallel"].devices == ("d0", "d1", "d2")


def test_where_no_device_holds_the_whole_only_deft_is_left() -> None:
    fleet = fleet_of([[1.0, 2.0], [1.0, 2.0]], [1.0, 1.0], np.ones(2), 2.0, fits=[[True, False], [True, True]])
    found = predictions(fleet, plan(fleet), 1.0, 10.0, holds_whole=np.array([False, False]))
    assert by_method(found)["data-parallel"].round_seconds is None
    chosen = choice(found)
    assert chosen is not None
    assert chosen.method == "deft"


def test_deft_is_not_chosen_where_one_device_is_sooner() -> None:
    fleet = fleet_of([[1.0, 1.1], [4.0, 4.4]], [1.0, 1.0], [10.0, 10.0], 1.0)
    chosen = choice(predictions(fleet, plan(fleet), 1.0, 10.0))
    assert chosen is not None
    assert chosen.method != "deft"


def test_nothing_is_chosen_where_nothing_can_run() -> None:
    fleet = fleet_of(np.ones((1, 2)), np.ones(2), np.zeros(1), 1.0)
    assert choice(predictions(fleet, plan(fleet), 1.0, 10.0)) is None
    empty = fleet_of(np.zeros((0, 2)), np.ones(2), [], 1.0)
    assert choice(predictions(empty, plan(empty), 1.0, 10.0)) is None


# ----------------------------------------------------------------------------------------------------------------- links


@given(st.floats(1e-6, 0.999), st.floats(1e-3, 1e9))
def test_the_least_share_of_a_radio_carries_exactly_what_is_needed(part: float, snr_hz: float) -> None:
    """`part` of the most that the radio could carry with endless bandwidth, snr / ln 2."""
    rate = part * snr_hz / math.log(2)
    share = share_needed(np.array([rate]), np.array([1.0]), np.array([0.0]), np.array([snr_hz]))
    assert rate_bits_per_s(share, np.array([0.0]), np.array([snr_hz]))[0] == pytest.approx(rate, rel=1e-10)


@pytest.mark.parametrize("missing", [0.9, 0.3, 1e-2, 1e-3, 1e-4, 1.1e-5, 9e-6, 1e-6, 1e-8])
def test_the_share_of_a_radio_near_its_limit_is_right_to_what_its_rate_tells(missing: float) -> None:
    """Against fifty decimal digits; the rate is `missing` below the limit, so a digit of it counts 1 / missing times in the share."""
    rate = (1.0 - missing) / math.log(2)
    with decimal.localcontext(decimal.Context(prec=50)):
        c = Decimal(rate) * Decimal(2).ln()
        low, high = (1 - c), 1000 * (1 - c)  # ln(1 + u) = c u has its root at u = 2 (1 - c) or beyond
        for _ in range(160):
            u = (low + high) / 2
            low, high = (u, high) if (1 + u).ln() > c * u else (low, u)
        wanted = float(1 / low)
    share = share_needed(np.array([rate]), np.array([1.0]), np.array([0.0]), np.array([1.0]))
    assert share[0] == pytest.approx(wanted, rel=4e-16 / missing + 1e-14)


def test_a_radio_carries_no_more_than_its_power_allows() -> None:
    most = 8.0 / math.log(2)
    for rate in (most, most * 1.01, 1e30):
        assert math.isinf(share_needed(np.array([rate]), np.array([1.0]), np.array([0.0]), np.array([8.0]))[0])
    assert share_needed(np.array([0.0]), np.array([1.0]), np.array([0.0]), np.array([8.0]))[0] == 0.0

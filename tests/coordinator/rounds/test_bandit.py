"""The bandit of pruning pace and rank: every rule by hand, and states as values."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.rounds import bandit
from fleetune.coordinator.rounds.bandit import Arm, Bandit, Box, Costs, Leaf, Result, Settings

QUARTERS = tuple(Leaf(Box(x, y, x + 0.5, y + 0.5)) for x in (0.0, 0.5) for y in (0.0, 0.5))
WHOLE = Settings(side_min=1.0)
"""Boxes are never cut."""


def played(state: Bandit, rounds: int, device: str = "pi", feasible: Box | None = None) -> tuple[Bandit, list[Arm]]:
    arms = []
    for number in range(1, rounds + 1):
        state, arm = bandit.ask(state, device, number, feasible)
        arms.append(arm)
        state = bandit.tell(state, device, number, 1.0 - (arm.x - 0.7) ** 2 - (arm.y - 0.3) ** 2)
    return state, arms


def test_every_leaf_is_visited_once_before_any_is_visited_again() -> None:
    _, arms = played(Bandit(WHOLE, seed=3, leaves=QUARTERS), 4)
    assert {(arm.x > 0.5, arm.y > 0.5) for arm in arms} == {(a, b) for a in (False, True) for b in (False, True)}


def test_the_leaf_with_the_greatest_bound_is_next() -> None:
    counts = [(10.0, 6.0), (10.0, 5.0), (1.0, 0.5), (10.0, 5.5)]
    leaves = tuple(replace(leaf, count=n, total=t, seen=5) for leaf, (n, t) in zip(QUARTERS, counts, strict=True))
    bold = Bandit(Settings(side_min=1.0, exploration=0.2), seed=1, leaves=leaves)
    timid = Bandit(Settings(side_min=1.0, exploration=0.01), seed=1, leaves=leaves)
    assert leaves[2].box.holds(*_place(bandit.ask(bold, "pi", 5)[1]))
    assert leaves[0].box.holds(*_place(bandit.ask(timid, "pi", 5)[1]))


def _place(arm: Arm) -> tuple[float, float]:
    return arm.x, arm.y


def test_history_fades_by_the_round_and_not_by_the_answer() -> None:
    leaf = Leaf(Box(), count=2.0, total=1.0, seen=3)
    assert leaf.faded(5, 0.9) == pytest.approx((2.0 * 0.81, 1.0 * 0.81))
    state = Bandit(WHOLE, seed=1)
    for device in ("a", "b", "c"):
        state, _ = bandit.ask(state, device, 1)
    for device in ("a", "b", "c"):
        state = bandit.tell(state, device, 1, 0.5)
    assert state.leaves[0].count == 3.0


def test_the_discounted_sums_are_those_of_the_whole_history() -> None:
    state, rewards = Bandit(WHOLE, seed=1), []
    for number in (1, 2, 5, 9):
        state, _ = bandit.ask(state, "pi", number)
        state = bandit.tell(state, "pi", number, number / 10)
        rewards.append((number, number / 10))
    count, total = state.leaves[0].faded(12, 0.98)
    assert count == pytest.approx(sum(0.98 ** (12 - number) for number, _ in rewards))
    assert total == pytest.approx(sum(0.98 ** (12 - number) * reward for number, reward in rewards))


def test_a_split_preserves_the_history_and_covers_the_same_box() -> None:
    state, arm = bandit.ask(Bandit(Settings(), seed=5), "pi", 1)
    state = bandit.tell(state, "pi", 1, 0.8)
    left, right = state.leaves
    assert (left.count, left.total, left.seen) == (right.count, right.total, right.seen) == (1.0, 0.8, 1)
    assert left.box.x1 == right.box.x0 == min(max(arm.x, 0.25), 0.75)
    assert (left.box.x0, right.box.x1) == (0.0, 1.0)


@given(seed=st.integers(0, 1000), rounds=st.integers(1, 40))
def test_leaves_always_cover_the_square_and_stay_few(seed: int, rounds: int) -> None:
    state, arms = played(Bandit(Settings(), seed=seed), rounds)
    assert len(state.leaves) <= 16
    area = sum((leaf.box.x1 - leaf.box.x0) * (leaf.box.y1 - leaf.box.y0) for leaf in state.leaves)
    assert area == pytest.approx(1.0)
    assert all(0 <= arm.pace <= 1 and 2 <= arm.rank <= 32 for arm in arms)


@pytest.mark.parametrize("reward", [None, math.nan, math.inf])
def test_a_device_that_dropped_out_changes_no_leaf(reward: float | None) -> None:
    state, _ = bandit.ask(Bandit(Settings(), seed=1), "pi", 1)
    after = bandit.tell(state, "pi", 1, reward)
    assert after.leaves == state.leaves
    assert after.pending == ()


def test_an_answer_that_nobody_waits_for_changes_nothing() -> None:
    state, _ = bandit.ask(Bandit(Settings(), seed=1), "pi", 2)
    assert bandit.tell(state, "pi", 1, 0.9) == state
    assert bandit.tell(state, "other", 2, 0.9) == state
    once = bandit.tell(state, "pi", 2, 0.9)
    assert bandit.tell(once, "pi", 2, 0.1) == once


def test_asked_again_in_a_round_the_device_gets_the_same_arm() -> None:
    state, arm = bandit.ask(Bandit(Settings(), seed=1), "pi", 1)
    assert bandit.ask(state, "pi", 1) == (state, arm)


@given(
    seed=st.integers(0, 100),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    size=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    rounds=st.integers(1, 15),
)
def test_arms_stay_inside_the_feasible_box(seed: int, corner: tuple[float, float], size: tuple[float, float], rounds: int) -> None:
    box = Box(corner[0], corner[1], min(1.0, corner[0] + size[0]), min(1.0, corner[1] + size[1]))
    _, arms = played(Bandit(Settings(), seed=seed), rounds, feasible=box)
    assert all(box.holds(arm.x, arm.y) for arm in arms)


def test_a_replay_gives_the_same_arms_and_the_same_state() -> None:
    assert played(Bandit(Settings(), seed=4), 30) == played(Bandit(Settings(), seed=4), 30)
    assert played(Bandit(Settings(), seed=4), 30)[1] != played(Bandit(Settings(), seed=5), 30)[1]


def test_draws_are_the_same_on_every_machine() -> None:
    _, arms = played(Bandit(Settings(), seed=1), 2)
    assert [(round(arm.x, 6), round(arm.y, 6), arm.rank) for arm in arms] == [(0.552621, 0.942692, 27), (0.691332, 0.883663, 23)]


@given(seed=st.integers(0, 50), rounds=st.integers(0, 25))
def test_a_state_survives_json_and_goes_on_alike(seed: int, rounds: int) -> None:
    state, _ = played(Bandit(Settings(), seed=seed), rounds)
    state, _ = bandit.ask(state, "pi", rounds + 1)
    again = bandit.from_dict(json.loads(json.dumps(bandit.to_dict(state))))
    assert again == state
    assert played(again, 5) == played(state, 5)


def test_a_state_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format 7"):
        bandit.from_dict({"format": 7})


def test_devices_that_share_a_tree_try_different_leaves_in_one_round() -> None:
    state, arms = Bandit(WHOLE, seed=2, leaves=QUARTERS), []
    for device in "abcd":
        state, arm = bandit.ask(state, device, 1)
        arms.append(arm)
    assert len({(arm.x > 0.5, arm.y > 0.5) for arm in arms}) == 4


def test_the_better_corner_is_found() -> None:
    state, arms = played(Bandit(Settings(), seed=6), 120)
    late = arms[80:]
    assert sum(abs(arm.x - 0.7) < 0.3 and abs(arm.y - 0.3) < 0.3 for arm in late) > 0.6 * len(late)
    found = bandit.best(state, 120)
    assert found is not None and found.box.x0 >= 0.25


# -------------------------------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 64), (2, 32), (3, 48)])
def test_every_rank_has_a_height_that_gives_it_back(low: int, high: int) -> None:
    settings = Settings(rank_min=low, rank_max=high)
    for rank in range(low, high + 1):
        assert bandit.rank_of(settings, bandit.height_of(settings, rank)) == rank


def test_the_first_arm_is_cheap_and_counts() -> None:
    settings = Settings()
    arm = bandit.calibration(settings)
    assert (arm.pace, arm.rank) == (0.25, 8)
    state = bandit.tell(bandit.give(Bandit(settings, seed=1), "pi", 1, arm), "pi", 1, 0.4)
    assert state.leaves[0].total == 0.4


# ------------------------------------------------------------------------------------------------------------- feasibility

COSTS = Costs(
    step_s=1.0, step_fixed=0.1, step_s_per_rank=0.01, overhead_s=1.0, bytes_per_rank=1e5, down_bytes_per_s=1e6, up_bytes_per_s=2e5,
    memory_bytes=800e6, memory_prunable_bytes=300e6, memory_per_rank=2e6,
)  # fmt: skip


def test_a_round_s_time_and_memory_by_hand() -> None:
    assert bandit.predicted_s(COSTS, steps=20, sparsity=0.5, rank=10) == pytest.approx(
        1 + 20 * (0.1 + 0.45 + 0.05) + 0.5e6 / 1e6 + 0.5e6 / 2e5
    )
    assert bandit.predicted_bytes(COSTS, sparsity=0.5, rank=10) == pytest.approx(800e6 - 150e6 + 10e6)


@given(limit_s=st.floats(1, 60), memory=st.floats(5e8, 2e9), before=st.floats(0, 0.5))
def test_all_arms_of_the_box_are_within_the_limits(limit_s: float, memory: float, before: float) -> None:
    settings = Settings()

    def sparsity_of(pace: float) -> float:
        return before + 0.1 * pace

    allowed = bandit.within_limits(COSTS, 20, sparsity_of, limit_s, memory)
    box = bandit.feasible_box(settings, allowed)
    if box is None:
        assert not allowed(1.0, settings.rank_min)
        return
    for x in (box.x0, 0.5 * (box.x0 + box.x1), box.x1):
        for y in (box.y0, 0.5 * (box.y0 + box.y1), box.y1):
            assert allowed(x, bandit.rank_of(settings, y))
    assert bandit.predicted_s(COSTS, 20, sparsity_of(box.x0), bandit.rank_of(settings, box.y1)) <= limit_s


@pytest.mark.parametrize(
    ("own", "mean", "slowest", "deadline", "limit"),
    [
        (10.0, 20.0, 50.0, None, 26.0),  # as any other
        (30.0, 20.0, 50.0, None, 50.0),  # too slow anyway, and not the slowest
        (60.0, 20.0, 50.0, None, 60.0),  # the slowest now
        (30.0, 20.0, 50.0, 40.0, 40.0),
        (10.0, 20.0, 50.0, 15.0, 15.0),
    ],
)
def test_the_time_a_device_may_take(own: float, mean: float, slowest: float, deadline: float | None, limit: float) -> None:
    assert bandit.time_limit_s(own, mean, slowest, deadline) == limit


def test_a_device_within_every_limit_has_the_whole_square() -> None:
    assert bandit.feasible_box(Settings(), lambda pace, rank: True) == Box()


def test_a_slow_device_has_to_prune_at_least_so_fast() -> None:
    box = bandit.feasible_box(Settings(), lambda pace, rank: pace >= 0.4 and rank <= 8 + 20 * (pace - 0.4))
    assert box is not None
    assert box.x0 == pytest.approx(0.4, abs=1e-5) and bandit.rank_of(Settings(), box.y1) == 8


def test_a_device_that_can_do_nothing_gets_the_cheapest_arm_by_its_caller() -> None:
    assert bandit.feasible_box(Settings(), lambda pace, rank: False) is None
    assert (bandit.cheapest(Settings()).pace, bandit.cheapest(Settings()).rank) == (1.0, 2)


# ------------------------------------------------------------------------------------------------------------------ reward

GOOD = Result(loss_before=1.0, loss_after=0.8, sparsity_gain=0.05, update_norm=2.0, seconds=10.0)


def test_a_reward_by_hand() -> None:
    found = bandit.reward(GOOD, gain_reference=0.4, step_max=0.1, median_norm=4.0, mean_s=10.0)
    assert found == pytest.approx(0.6 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5)


def test_being_late_costs_and_being_early_does_not() -> None:
    found = [
        bandit.reward(replace(GOOD, seconds=seconds), gain_reference=0.4, step_max=0.1, median_norm=4.0, mean_s=10.0)
        for seconds in (5.0, 10.0, 15.0)
    ]
    assert found[0] == found[1]
    assert found[2] == pytest.approx(found[1] * math.exp(-0.75))


@given(
    before=st.floats(0, 10), after=st.floats(0, 10), gain=st.floats(-1, 1), norm=st.floats(0, 1e6), seconds=st.floats(0, 1e6),
    reference=st.floats(0, 2), median=st.floats(0, 10), mean=st.floats(0, 100),
)  # fmt: skip
def test_rewards_lie_between_zero_and_one(
    before: float, after: float, gain: float, norm: float, seconds: float, reference: float, median: float, mean: float
) -> None:
    assert 0.0 <= bandit.reward(Result(before, after, gain, norm, seconds), reference, 0.1, median, mean) <= 1.0


def test_a_loss_that_is_not_finite_earns_nothing() -> None:
    assert bandit.reward(replace(GOOD, loss_after=math.nan), 0.4, 0.1, 4.0, 10.0) == 0.0

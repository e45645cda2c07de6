"""What each device is asked to prune: bounded by its own speed and by the job's end, the same after a restart."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.domain import Blob, Candidate, PruneSettings, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds import arms
from fleetune.coordinator.rounds.arms import Spine

SETTINGS = PruneSettings(target=0.5, steps=60, tau=20, step_max=0.1, recovery_rounds=2, rank_min=2, rank_max=16, rank=16)
ROUNDS = 20
FLEET = tuple(Candidate(f"device-{name}", name) for name in ("a", "b", "c"))


def played(
    settings: PruneSettings, rounds: int, speeds: dict[str, float], absent: frozenset[tuple[str, int]] = frozenset()
) -> list[RoundEntry]:
    """Rounds in which every device does as it is told, at its own seconds per step."""
    spines: dict[str, Spine] = {}
    done: list[RoundEntry] = []
    for number in range(1, rounds + 1):
        spines, prunings = arms.choose(settings, spines, FLEET, number, rounds, seed=7)
        entry = RoundEntry(number, "committed", 0.0, prunings=prunings)
        for pruning in prunings:
            if (pruning.device_id, number) in absent:
                continue
            step_s = speeds[pruning.device_id] * (0.3 + 0.7 * (1 - pruning.sparsity_after))
            told = {"loss_before": 1.0, "loss_after": 0.9, "update_norm": 1.0, "step_s": step_s, "steps": 60.0}
            update = Update(
                Blob("0" * 64, 1), 10, told, ready_s=60 * step_s, sent_s=0.1, structure=f"{number:02x}", sparsity=pruning.sparsity_after
            )
            task = TaskEntry(f"t/{number}/{pruning.device_id}/train", pruning.device_id, "", "train", number, "done", update=update)
            entry.tasks[task.task_id] = task
        spines = arms.learn(settings, spines, entry)
        done.append(entry)
    return done


EVEN = dict.fromkeys((device.device_id for device in FLEET), 0.1)


def test_the_first_round_is_the_same_cheap_arm_for_everyone() -> None:
    _, found = arms.choose(SETTINGS, {}, FLEET, 1, ROUNDS, seed=1)
    assert {(pruning.pace, pruning.rank) for pruning in found} == {(0.25, 8)}
    assert [pruning.device_id for pruning in found] == [device.device_id for device in FLEET]
    assert all(pruning.structure == "" and pruning.sparsity_before == 0.0 for pruning in found)


@pytest.mark.parametrize("choice", ["bandit", "fixed"])
def test_a_fleet_that_shares_importance_cuts_nothing_in_the_first_round_and_is_at_the_target_in_time(
    choice: Literal["bandit", "fixed"],
) -> None:
    settings = replace(SETTINGS, shares=True, warm_rounds=1, choice=choice)
    done = played(settings, 8, EVEN)  # 1 to gather, 5 steps of 0.1 at the most, 2 of recovery
    assert {(pruning.pace, pruning.sparsity_after) for pruning in done[0].prunings} == {(0.0, 0.0)}
    assert {pruning.rank for pruning in done[0].prunings} == {8 if choice == "bandit" else 16}
    assert [pruning.sparsity_before for entry in done[-2:] for pruning in entry.prunings] == pytest.approx([0.5] * 6)


@pytest.mark.parametrize("warm", [0, 1, 2, 5])
def test_warm_rounds_cut_nothing_and_the_target_is_reached_in_the_rounds_that_are_left(warm: int) -> None:
    settings = replace(SETTINGS, warm_rounds=warm)
    done = played(settings, warm + 7, EVEN)  # 5 steps of 0.1 at the most, 2 of recovery
    assert [pruning.sparsity_after for entry in done[:warm] for pruning in entry.prunings] == [0.0] * 3 * warm
    assert all(pruning.sparsity_after > 0 for pruning in done[warm].prunings)
    assert [pruning.sparsity_before for entry in done[-2:] for pruning in entry.prunings] == pytest.approx([0.5] * 6)


def test_the_bandit_is_not_asked_before_the_warm_rounds_are_over() -> None:
    done = played(replace(SETTINGS, warm_rounds=4), ROUNDS, EVEN)
    assert {(pruning.pace, pruning.rank) for entry in done[:4] for pruning in entry.prunings} == {(0.0, 8)}
    assert len({(pruning.pace, pruning.rank) for entry in done[4:] for pruning in entry.prunings}) > 3


def test_the_bandit_learns_nothing_of_the_round_that_gathers() -> None:
    settings = replace(SETTINGS, shares=True, warm_rounds=1)
    spines, prunings = arms.choose(settings, {}, FLEET, 1, ROUNDS, seed=1)
    entry = RoundEntry(1, "committed", 0.0, prunings=prunings)
    told = {"loss_before": 1.0, "loss_after": 0.9, "update_norm": 1.0, "step_s": 0.1, "steps": 60.0}
    update = Update(Blob("0" * 64, 1), 10, told, ready_s=6.0, sent_s=0.1)
    entry.tasks["t"] = TaskEntry("t", "device-a", "a", "train", 1, "done", update=update)
    after = arms.learn(settings, spines, entry)["device-a"]
    assert after.bandit == spines["device-a"].bandit
    assert after.is_timed


def test_every_device_has_reached_the_target_before_the_rounds_of_recovery() -> None:
    last = played(SETTINGS, ROUNDS, EVEN)[-SETTINGS.recovery_rounds :]
    assert {pruning.sparsity_before for entry in last for pruning in entry.prunings} == {0.5}


@given(rounds=st.integers(7, 30), target=st.floats(0.05, 0.5), pace=st.floats(0, 1))
def test_whatever_the_pace_the_target_is_reached_in_time_and_never_passed(rounds: int, target: float, pace: float) -> None:
    settings = replace(SETTINGS, target=target, choice="fixed", pace=pace)
    done = played(settings, rounds, EVEN)
    for device in FLEET:
        way = [pruning for entry in done for pruning in entry.prunings if pruning.device_id == device.device_id]
        assert all(before.sparsity_after == after.sparsity_before for before, after in itertools.pairwise(way))
        assert all(p.sparsity_before <= p.sparsity_after <= p.sparsity_before + settings.step_max + 1e-9 for p in way)
        assert way[rounds - settings.recovery_rounds].sparsity_before == pytest.approx(target)


def test_a_device_that_holds_the_others_up_is_not_given_what_takes_longest() -> None:
    """At 1.2 times the others' step it would be far behind with little pruned at the highest rank."""
    speeds = {**EVEN, "device-c": 0.2}
    done = played(SETTINGS, ROUNDS, speeds)
    least = {device: min(p.pace for entry in done[1:4] for p in entry.prunings if p.device_id == device) for device in speeds}
    assert least["device-c"] == 1.0, "twice as slow as the others: as fast as allowed, until it is within their time"
    assert min(least["device-a"], least["device-b"]) < 1.0


def test_a_device_that_dropped_out_keeps_its_structure_and_its_bandit_learns_nothing() -> None:
    done = played(SETTINGS, 6, EVEN, absent=frozenset({("device-b", 3)}))
    third, fourth = (next(p for p in done[number - 1].prunings if p.device_id == "device-b") for number in (3, 4))
    assert (fourth.structure, fourth.sparsity_before) == (third.structure, third.sparsity_before)
    other = next(p for p in done[3].prunings if p.device_id == "device-a")
    assert other.structure == "03"


def test_a_round_that_is_opened_again_has_the_same_arms() -> None:
    spines, first = arms.choose(SETTINGS, {}, FLEET, 1, ROUNDS, seed=3)
    again, second = arms.choose(SETTINGS, spines, FLEET, 1, ROUNDS, seed=3)
    assert (first, spines) == (second, again)


def test_the_same_seed_and_names_give_the_same_arms_whatever_the_devices_ids() -> None:
    def paces(ids: str) -> list[tuple[float, int]]:
        spines: dict[str, Spine] = {}
        devices = tuple(Candidate(f"{ids}-{name}", name) for name in ("a", "b"))
        found: list[tuple[float, int]] = []
        for number in range(1, 5):
            spines, prunings = arms.choose(SETTINGS, spines, devices, number, ROUNDS, seed=5)
            spines = {key: replace(spine, rounds=spine.rounds + 1) for key, spine in spines.items()}
            found += [(pruning.pace, pruning.rank) for pruning in prunings]
        return found

    assert paces("x") == paces("y")


def test_with_fixed_arms_all_devices_take_one() -> None:
    settings = replace(SETTINGS, choice="fixed", pace=0.5)
    done = played(settings, ROUNDS, {**EVEN, "device-c": 0.9})
    assert {(p.pace, p.rank) for entry in done[:4] for p in entry.prunings} == {(0.5, 16)}


def test_who_measures_does_so_on_what_is_left_after_its_update() -> None:
    spine = Spine(arms._fresh(SETTINGS, 0, "a"), structure="aa", sparsity=0.2)  # pyright: ignore[reportPrivateUsage]
    update = Update(Blob("0" * 64, 1), 1, structure="bb", sparsity=0.3)
    assert arms.measured(SETTINGS, spine, update, "x").structure == "bb"
    assert arms.measured(SETTINGS, spine, None, "x").sparsity_after == 0.2
    assert arms.measured(SETTINGS, None, None, "x").structure == ""

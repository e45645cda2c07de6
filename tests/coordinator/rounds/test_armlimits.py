"""A device is given no arm that its memory does not hold, as far as that is known, and a smaller one once it has run out of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.domain import Blob, Candidate, Failure, Prepared, PruneSettings, Pruning, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds import armlimits, arms, bandit, machine
from fleetune.coordinator.rounds.armlimits import NO_CEILING, Ceiling, Memory
from fleetune.coordinator.rounds.arms import Spine
from fleetune.coordinator.store import records

SETTINGS = PruneSettings(target=0.5, steps=60, tau=20, step_max=0.1, recovery_rounds=2, rank_min=2, rank_max=32, rank=32)
DEVICE = Candidate("device-a", "a")
MIB = 1024.0**2
MEMORY = Memory(900 * MIB, 1000 * MIB, 400 * MIB, 5 * MIB, 0.0, 8)
"""With 0.8 of 1000 MiB it must come down by 100 MiB: by a quarter of what can be cut, or by less and some ranks."""


def told(memory: Memory) -> dict[str, float]:
    return {
        "peak_bytes": memory.peak_bytes,
        "room_bytes": memory.room_bytes,
        "prunable_bytes": memory.prunable_bytes,
        "rank_bytes": memory.rank_bytes,
    }


def after_a_round(memory: Memory, settings: PruneSettings = SETTINGS) -> dict[str, Spine]:
    """The spines after round 1, in which the device told of its memory."""
    spines, prunings = arms.choose(settings, {}, [DEVICE], 1, 20, seed=7)
    figures = {"loss_before": 1.0, "loss_after": 0.9, "update_norm": 1.0, "step_s": 0.1, "steps": 60.0, **told(memory)}
    update = Update(Blob("0" * 64, 1), 10, figures, ready_s=6.0, sent_s=0.1, structure="01", sparsity=prunings[0].sparsity_after)
    task = TaskEntry("t", DEVICE.device_id, "a", "train", 1, "done", update=update)
    return arms.learn(settings, spines, RoundEntry(1, "committed", 0.0, tasks={"t": task}, prunings=prunings))


def chosen(spines: dict[str, Spine], number: int = 2, settings: PruneSettings = SETTINGS) -> Pruning:
    return arms.choose(settings, spines, [DEVICE], number, 20, seed=7)[1][0]


@given(
    first=st.floats(0, 0.5),
    second=st.floats(0, 0.5),
    ranks=st.tuples(st.integers(1, 64), st.integers(1, 64)),
)
def test_predicted_memory_falls_with_sparsity_and_rises_with_rank(first: float, second: float, ranks: tuple[int, int]) -> None:
    low, high = sorted((first, second))
    few, many = sorted(ranks)
    assert armlimits.predicted_bytes(MEMORY, high, few) <= armlimits.predicted_bytes(MEMORY, low, few)
    assert armlimits.predicted_bytes(MEMORY, low, few) <= armlimits.predicted_bytes(MEMORY, low, many)


def test_what_was_measured_is_what_is_predicted_for_the_same_arm() -> None:
    memory = replace(MEMORY, sparsity=0.2, rank=6)
    assert armlimits.predicted_bytes(memory, 0.2, 6) == memory.peak_bytes
    assert armlimits.predicted_bytes(memory, 0.3, 6) == pytest.approx(memory.peak_bytes - 40 * MIB - 5 * MIB * 6 * 0.1)


def test_what_a_device_does_not_tell_bounds_nothing() -> None:
    assert armlimits.told({"peak_bytes": 1.0}, 0.0, 8) is None
    assert armlimits.told({**told(MEMORY), "room_bytes": float("nan")}, 0.0, 8) is None
    assert armlimits.told(told(MEMORY), 0.0, 8) == MEMORY


def test_no_arm_is_given_whose_predicted_memory_is_beyond_the_share() -> None:
    memory = replace(MEMORY, peak_bytes=790 * MIB)
    spines = after_a_round(memory)
    pruned = spines[DEVICE.device_id]
    paces: set[float] = set()
    for number in range(2, 40):
        pruning = chosen({DEVICE.device_id: replace(pruned, bandit=replace(pruned.bandit, seed=number))})
        first = arms.first_sparsity(SETTINGS, pruning.sparsity_before, pruning.pace)
        assert pruned.memory is not None
        assert armlimits.predicted_bytes(pruned.memory, first, pruning.rank) <= bandit.MEMORY_SHARE * memory.room_bytes
        assert not pruning.note
        paces.add(pruning.pace)
    assert len(paces) > 10, "what is left of the arms is still explored"


def test_a_device_with_room_enough_gets_high_ranks_too() -> None:
    spines = after_a_round(replace(MEMORY, room_bytes=9000 * MIB))
    pruned = spines[DEVICE.device_id]
    ranks = {chosen({DEVICE.device_id: replace(pruned, bandit=replace(pruned.bandit, seed=seed))}).rank for seed in range(40)}
    assert max(ranks) > 16


def test_where_nothing_fits_the_cheapest_arm_is_given_and_named() -> None:
    pruning = chosen(after_a_round(replace(MEMORY, peak_bytes=2000 * MIB)))
    assert (pruning.pace, pruning.rank) == (1.0, SETTINGS.rank_min)
    assert pruning.note.startswith("short of memory: this arm needs about 1.9 GiB, 800 MiB may be taken")


def test_a_device_that_ran_out_of_memory_gets_smaller_arms_until_the_cheapest() -> None:
    spines, (first,) = arms.choose(SETTINGS, {}, [DEVICE], 1, 20, seed=7)
    given_: list[tuple[float, int]] = [(first.pace, first.rank)]
    pruning = first
    for _ in range(4):
        entry = RoundEntry(1, "training", 0.0, prunings=(pruning,))
        spines = arms.ran_short(SETTINGS, spines, entry, DEVICE.device_id)
        spines, (pruning,) = arms.choose(SETTINGS, spines, [DEVICE], 1, 20, seed=7)
        given_.append((pruning.pace, pruning.rank))
        assert pruning.note.startswith("ran out of memory before: rank ")
    assert [rank for _, rank in given_] == [8, 4, 2, 2, 2]
    assert [pace for pace, _ in given_[-2:]] == [1.0, 1.0]


def test_an_arm_that_was_drawn_and_ran_out_of_memory_is_not_drawn_again() -> None:
    spines = after_a_round(replace(MEMORY, room_bytes=9000 * MIB))
    spines, (before,) = arms.choose(SETTINGS, spines, [DEVICE], 2, 20, seed=7)
    spines = arms.ran_short(SETTINGS, spines, RoundEntry(2, "training", 0.0, prunings=(before,)), DEVICE.device_id)
    _, (after,) = arms.choose(SETTINGS, spines, [DEVICE], 2, 20, seed=7)
    assert after.rank <= max(SETTINGS.rank_min, before.rank // 2)


def test_fixed_arms_are_halved_too_once_a_device_has_run_out_of_memory() -> None:
    settings = replace(SETTINGS, choice="fixed", pace=0.5)
    spines, (before,) = arms.choose(settings, {}, [DEVICE], 1, 20, seed=7)
    spines = arms.ran_short(settings, spines, RoundEntry(1, "training", 0.0, prunings=(before,)), DEVICE.device_id)
    _, (after,) = arms.choose(settings, spines, [DEVICE], 1, 20, seed=7)
    assert (before.rank, after.rank, after.pace) == (32, 16, 0.5)


def test_ceilings_only_come_down() -> None:
    ceiling = NO_CEILING
    for rank, later in itertools.pairwise((32, 16, 8, 4, 2)):
        ceiling = armlimits.lowered(ceiling, rank, 2)
        assert ceiling == Ceiling(later, 0.0)
    assert armlimits.lowered(ceiling, 2, 2) == Ceiling(2, 1.0)
    assert armlimits.lowered(Ceiling(4, 0.0), 32, 2) == Ceiling(4, 0.0)


def test_a_round_that_memory_has_ended_is_opened_again_with_a_smaller_arm() -> None:
    plan = machine.JobPlan("job", 20, 1, 0, 1.0, 0.0, 0.0, 7, "none", 1, "loss", 0, 0.0, 15.0, pruning=SETTINGS)
    state = machine.JobMachine(plan)
    state.handle(machine.Started(), 0.0)
    state.handle(machine.PreparedEvent(Prepared(Blob("0" * 64, 1), "")), 0.0)
    ranks: list[int] = []
    for _ in range(2):
        (sent,) = (command for command in state.handle(machine.Offered((DEVICE,)), 1.0) if isinstance(command, machine.SendTask))
        assert state.round is not None
        ranks.append(state.round.prunings[0].rank)
        state.handle(machine.TaskFailed(sent.task_id, Failure("out_of_memory", "train", "killed")), 2.0)
    assert ranks == [8, 4]
    restored = records.load_machine(records.dump_machine(state))
    assert restored.spines == state.spines

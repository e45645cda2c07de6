"""Updates far larger than those of the rounds before are refused, whoever is first; who repeats it is quarantined."""

from __future__ import annotations

import itertools

import pytest

from fleetune.coordinator.domain import Update, UpdateKind
from fleetune.coordinator.rounds import machine as m
from fleetune.coordinator.rounds import normbound
from fleetune.coordinator.store import records
from support.machines import Desk, blob
from support.planned_machines import PlanDesk


def send(desk: Desk, name: str, norm: float, kind: UpdateKind = "delta") -> bool:
    """As the engine does: an update that is objected to comes as a failure. True where it was taken."""
    assert desk.machine.round is not None
    update = Update(blob(f"{name} {desk.machine.round.number}"), 1, norm=norm, kind=kind)
    objection = desk.machine.objection(update)
    desk.do(m.UpdateArrived(desk.task(name), update) if objection is None else m.TaskFailed(desk.task(name), objection))
    return objection is None


def committed(desk: Desk, **norms: float) -> Desk:
    """A whole round of these updates."""
    desk.open(*norms)
    for name, norm in norms.items():
        send(desk, name, norm)
    desk.fold()
    return desk


def test_the_bound_is_a_multiple_of_the_median_of_the_last_three_rounds() -> None:
    assert normbound.limit([[1.0, 2.0, 3.0]], 10.0) == 20.0
    assert normbound.limit([[100.0], [1.0], [2.0], [3.0]], 10.0) == 20.0


@pytest.mark.parametrize(("folded", "factor"), [([], 10.0), ([[]], 10.0), ([[1.0]], 0.0), ([[0.0, 0.0, 5.0]], 10.0)])
def test_there_is_no_bound_before_a_round_without_a_factor_and_over_zeros(folded: list[list[float]], factor: float) -> None:
    assert normbound.limit(folded, factor) == 0.0


def test_the_first_round_is_free() -> None:
    desk = Desk(update_norm_bound=10.0)
    desk.open("a", "b")
    assert send(desk, "a", 1e6)
    assert send(desk, "b", 1.0)


def test_the_same_updates_are_refused_in_whatever_order_they_come() -> None:
    norms = {"a": 1.0, "b": 10.0, "c": 10.1, "d": 1e30}
    outcomes: set[tuple[bool, ...]] = set()
    for order in itertools.permutations(norms):
        desk = committed(Desk(update_norm_bound=10.0, quorum=0.5), a=1.0, b=1.0, c=1.0, d=1.0)
        desk.open(*norms)
        taken = {name: send(desk, name, norms[name]) for name in order}
        outcomes.add(tuple(taken[name] for name in norms))
    assert outcomes == {(True, True, False, False)}


def test_what_was_refused_does_not_raise_the_bound() -> None:
    desk = committed(Desk(update_norm_bound=10.0, rounds=9), a=1.0, b=1.0)
    desk.open("a", "b")
    assert not send(desk, "a", 1000.0)
    assert send(desk, "b", 2.0)
    desk.fold()
    assert desk.machine.norms == [[1.0, 1.0], [2.0]]


@pytest.mark.parametrize("kind", ["state", "delta"])
def test_states_may_grow_and_a_bound_of_zero_lets_everything_through(kind: UpdateKind) -> None:
    desk = Desk(update_norm_bound=10.0 if kind == "state" else 0.0, rounds=9)
    for norm in (1.0, 1e3, 1e9):
        desk.open("a")
        assert send(desk, "a", norm, kind)
        desk.fold()


def test_the_third_offence_quarantines_a_device_though_good_updates_lie_between() -> None:
    desk = committed(Desk(update_norm_bound=10.0, rounds=9), a=1.0, b=1.0)
    for offence in range(1, 4):
        assert "id-a" not in desk.machine.quarantined
        desk.open("a", "b")
        assert not send(desk, "a", 500.0)
        send(desk, "b", 1.0)
        desk.fold()
        if offence < 3:
            committed(desk, a=1.0, b=1.0)
    assert desk.machine.quarantined == {"id-a": "a after 3 updates beyond the norm bound"}
    assert [sent.device_id for sent in desk.open("a", "b")] == ["id-b"]


def test_a_restart_keeps_the_bound_and_the_offences() -> None:
    desk = committed(Desk(update_norm_bound=10.0, rounds=9), a=1.0, b=1.0)
    desk.open("a", "b")
    send(desk, "a", 11.0)
    again = records.load_machine(records.dump_machine(desk.machine))
    assert again == desk.machine
    assert again.offences == {"id-a": 1}
    assert again.round is not None
    assert again.round.norm_limit == 10.0


# --- planned rounds


def planned(desk: PlanDesk, norms: dict[tuple[int, ...], float], kind: UpdateKind) -> list[tuple[int, ...]]:
    """A whole round whose updates have these norms by their blocks; the blocks of those that were refused."""
    refused: list[tuple[int, ...]] = []
    for name, depths in desk.training("a", "b", "c").items():
        update = Update(blob(f"{name} {depths}"), 1, norm=norms[depths], kind=kind)
        objection = desk.machine.objection(update, f"id-{name}")
        desk.do(m.UpdateArrived(desk.task(name), update) if objection is None else m.TaskFailed(desk.task(name), objection))
        refused += [] if objection is None else [depths]
    desk.fold()
    return refused


def test_blocks_of_a_planned_round_are_held_to_their_own_norms() -> None:
    desk = PlanDesk(update_norm_bound=10.0)
    assert planned(desk, {(1,): 1000.0, (2,): 1.0, (3,): 0.01}, "delta") == []
    assert planned(desk, {(1,): 2000.0, (2,): 2.0, (3,): 0.02}, "delta") == []
    assert planned(desk, {(1,): 1000.0, (2,): 1000.0, (3,): 0.01}, "delta") == [(2,)]
    assert desk.machine.block_norms == {"1": [[1000.0], [2000.0], [1000.0]], "2": [[1.0], [2.0]], "3": [[0.01], [0.02], [0.01]]}
    assert desk.machine.norms == []
    assert records.load_machine(records.dump_machine(desk.machine)) == desk.machine


def test_gradients_are_held_to_none() -> None:
    desk = PlanDesk(update_norm_bound=10.0)
    assert planned(desk, {(1,): 1.0, (2,): 1.0, (3,): 1.0}, "gradient") == []
    assert planned(desk, {(1,): 1e6, (2,): 1.0, (3,): 1e-9}, "gradient") == []

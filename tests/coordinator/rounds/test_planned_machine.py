"""Rounds of a method that plans: who is measured, who trains, who takes over, and what counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fleetune.coordinator.domain import Failure, PlanSettings
from fleetune.coordinator.rounds import machine as m
from fleetune.coordinator.store import records
from support.machines import Desk, only
from support.planned_machines import PlanDesk, candidates, figures

FREE = PlanSettings(rows=8, deadline_factor=0.0)


def test_a_round_begins_by_measuring_whom_it_does_not_know() -> None:
    desk = PlanDesk()
    sent = desk.open("a", "b", "c")
    assert [(task.device_id, task.kind) for task in sent] == [("id-a", "measure"), ("id-b", "measure"), ("id-c", "measure")]
    assert desk.phase() == "measuring"
    assert desk.machine.busy_devices() == {"id-a", "id-b", "id-c"}
    desk.tell("a")
    desk.tell("b")
    sent = only(desk.tell("c"), m.SendTask)
    assert [task.kind for task in sent] == ["train"] * 3
    assert desk.phase() == "training"
    assert sorted(desk.parts().values()) == [(1,), (2,), (3,)]


def test_who_has_told_is_not_asked_again() -> None:
    desk = PlanDesk()
    desk.training("a", "b", "c")
    for name in "abc":
        desk.update(name)
    desk.fold()
    assert [task.kind for task in desk.open("a", "b", "c")] == ["train"] * 3
    assert len(desk.asked) == 2


def measured_beside(desk: PlanDesk) -> list[str]:
    return [task.device_name for task in desk.machine.newcomers.values()]


def second_round(*names: str) -> PlanDesk:
    """A job whose first round a, b and c have trained, and which opens its second with these devices."""
    desk = PlanDesk(FREE, rounds=4)
    desk.training("a", "b", "c")
    for name in "abc":
        desk.update(name)
    desk.fold()
    desk.open(*names)
    return desk


def test_a_newcomer_is_measured_beside_the_round_and_is_in_the_next_plan() -> None:
    desk = second_round("a", "b", "c", "d")
    assert set(desk.parts()) == {"a", "b", "c"}
    assert measured_beside(desk) == ["d"]
    assert "id-d" in desk.machine.busy_devices()
    for name in "abc":
        desk.update(name)
    desk.fold()
    task = next(iter(desk.machine.newcomers))
    # Still at it when the next round opens: it is neither asked again nor waited for.
    assert {task.kind for task in desk.open("a", "b", "c", "d")} == {"train"}
    for name in "abc":
        desk.update(name)
    assert desk.do(m.FiguresArrived(task, figures(0.1))) == []
    desk.fold()
    assert measured_beside(desk) == []
    desk.open("a", "b", "c", "d")
    assert "d" in desk.parts()


def test_a_device_that_joins_while_others_train_is_measured_at_once() -> None:
    desk = second_round("a", "b", "c")
    sent = only(desk.do(m.Offered(candidates("d"))), m.SendTask)
    assert [(task.device_id, task.kind, task.round_number) for task in sent] == [("id-d", "measure", 2)]
    assert desk.do(m.Offered(candidates("d"))) == []
    assert desk.do(m.TaskRefused(sent[0].task_id, "on battery")) == []
    # Once in a round is enough.
    assert desk.do(m.Offered(candidates("d"))) == []
    assert desk.phase() == "training"


def test_a_newcomer_that_cannot_be_measured_costs_the_others_nothing() -> None:
    desk = second_round("a", "b", "c", "d", "e", "f")
    d, e, f = desk.machine.newcomers
    assert desk.do(m.TaskFailed(d, Failure("data", "measure", "x"))) == []
    assert "id-d" in desk.machine.excluded
    desk.do(m.DeviceOffline("id-e"))
    desk.do(m.DeviceOffline("id-f"))
    lost = only(desk.do(m.DeviceOnline("id-f", frozenset())), m.SendTask)
    assert [(task.task_id, task.kind) for task in lost] == [(f, "measure")]
    desk.now += desk.machine.plan.absent_grace_s + 1
    assert only(desk.do(m.Ticked()), m.WithdrawTask)[0].task_id == e
    desk.now += m.MEASURING_S
    assert only(desk.do(m.Ticked()), m.WithdrawTask)[0].task_id == f
    assert measured_beside(desk) == []
    assert desk.phase() == "training"


def test_a_newcomer_survives_a_restart_and_goes_with_its_job() -> None:
    desk = second_round("a", "b", "c", "d")
    desk.machine = records.load_machine(records.dump_machine(desk.machine))
    desk.do(m.Restarted())
    assert next(iter(desk.machine.newcomers.values())).offline_since_unix_s == desk.now
    ended = desk.do(m.CancelRequested("x"))
    assert "id-d" in {command.device_id for command in only(ended, m.WithdrawTask)}
    assert desk.machine.newcomers == {}


def test_where_no_plan_is_found_a_newcomer_is_waited_for_and_tried() -> None:
    desk = PlanDesk(FREE, minimum=1)
    desk.open("a")
    desk.tell("a", figures(held=0))
    assert desk.machine.status == "waiting"
    desk.open("a", "b")
    task = next(iter(desk.machine.newcomers))
    assert desk.open("a") == []
    desk.do(m.FiguresArrived(task, figures()))
    desk.open("a", "b")
    assert set(desk.parts()) == {"b"}


def test_a_newcomer_that_tells_before_the_others_turn_out_to_hold_nothing_is_not_overlooked() -> None:
    desk = PlanDesk(FREE, minimum=1)
    desk.open("a")
    desk.tell("a", figures(held=0))
    desk.hold = True
    desk.open("a", "b")
    desk.do(m.FiguresArrived(next(iter(desk.machine.newcomers)), figures()))
    desk.hold = False
    desk.answer(desk.asked[-1])
    assert desk.machine.status == "waiting"
    desk.open("a", "b")
    assert set(desk.parts()) == {"b"}


def test_with_too_few_that_are_known_newcomers_are_waited_for() -> None:
    desk = PlanDesk(minimum=2)
    desk.training("a", "b", "c")
    for name in "abc":
        desk.update(name)
    desk.fold()
    assert [(task.device_id, task.kind) for task in desk.open("a", "d")] == [("id-d", "measure")]
    assert desk.phase() == "measuring"


def test_only_those_in_the_plan_train_and_the_others_are_free() -> None:
    desk = PlanDesk()
    desk.training("a", "b", "c", "d", "e")
    assert desk.machine.round is not None
    assert len([t for t in desk.machine.round.tasks.values() if t.kind == "train"]) == 3
    assert len(desk.machine.busy_devices()) == 3
    assert desk.machine.held == ()


def test_figures_of_another_model_exclude_their_device() -> None:
    desk = PlanDesk()
    desk.open("a", "b", "c", "d")
    desk.tell("a", figures(depths=7))
    assert "7 times" in desk.machine.excluded["id-a"]
    for name in "bcd":
        desk.tell(name)
    assert set(desk.parts()) == {"b", "c", "d"}


def test_who_cannot_be_measured_is_left_out() -> None:
    desk = PlanDesk()
    desk.open("a", "b", "c", "d")
    desk.fail("a", "out_of_memory", "measure")
    desk.do(m.TaskRefused(desk.task("b", "measure"), "on battery"))
    desk.tell("c")
    desk.tell("d")
    assert set(desk.parts()) == {"c", "d"}
    assert desk.machine.round is not None
    assert desk.machine.round.plan is not None
    assert len(desk.machine.round.plan.uncovered_depths) == 1


def test_a_round_whose_devices_cannot_be_measured_is_opened_again() -> None:
    desk = PlanDesk(minimum=2)
    desk.open("a", "b")
    desk.tell("a")
    (abandoned,) = only(desk.fail("b", "crash", "measure"), m.AbandonRound)
    assert "1 of 2 devices told how fast they train" in abandoned.reason
    assert desk.status() == "waiting"
    assert desk.machine.setbacks == 1


def test_where_no_block_fits_the_job_waits_and_says_why() -> None:
    desk = PlanDesk()
    desk.open("a")
    commands = desk.tell("a", figures(held=0))
    assert [type(command) for command in commands[-1:]] == [m.AbandonRound]
    assert desk.status() == "waiting"
    assert "no device has memory for a block" in desk.machine.message
    assert desk.open("a") == [], "not in a loop"
    assert "no device has memory" in desk.machine.message
    assert desk.machine.setbacks == 0
    assert desk.machine.next_deadline_unix_s() == desk.now + m.PLAN_AGAIN_S
    desk.after(m.PLAN_AGAIN_S)
    desk.open("a")
    assert len(desk.asked) == 2, "tried again after a while"
    desk.open("a", "b")
    desk.do(m.FiguresArrived(next(iter(desk.machine.newcomers)), figures()))
    desk.open("a", "b")
    assert desk.phase() == "training", "or at once with another device"


def test_the_wait_for_a_fleet_that_fits_is_bounded_as_any_other() -> None:
    desk = PlanDesk(wait_s=100.0)
    desk.open("a")
    desk.tell("a", figures(held=0))
    for _ in range(3):
        desk.after(m.PLAN_AGAIN_S)
        desk.open("a")
    desk.after(20.0)
    assert desk.status() == "failed"
    assert "no device has memory" in desk.machine.message


def test_a_device_that_left_before_the_plan_came_is_planned_around() -> None:
    desk = PlanDesk()
    desk.away = {"a"}
    parts = desk.training("a", "b", "c", "d")
    assert set(parts) == {"b", "c", "d"}
    assert len(desk.asked) == 2


def test_a_round_that_all_have_left_before_the_plan_came_is_given_back() -> None:
    desk = PlanDesk()
    desk.away = {"a", "b"}
    desk.open("a", "b")
    desk.tell("a")
    desk.tell("b")
    assert desk.status() == "waiting"
    assert desk.machine.setbacks == 0


def test_an_answer_to_an_older_question_is_not_taken() -> None:
    desk = PlanDesk()
    desk.hold = True
    desk.open("a", "b", "c")
    for name in "abc":
        desk.tell(name)
    (command,) = desk.asked
    assert desk.do(m.Planned(command.asked - 1, None, "old")) == []
    assert desk.phase() == "measuring"
    desk.answer(command)
    assert desk.phase() == "training"
    assert desk.answer(command) == []


def test_the_deadline_is_the_plans_or_the_jobs_whichever_is_sooner() -> None:
    desk = PlanDesk()
    desk.training("a", "b", "c")
    entry = desk.machine.round
    assert entry is not None
    assert entry.plan is not None
    assert entry.deadline_unix_s == desk.now + 1.5 * entry.plan.round_s + m.FIRST_SLACK_S, "models are to be loaded"
    for name in "abc":
        desk.update(name)
    desk.fold()
    desk.training("a", "b", "c")
    entry = desk.machine.round
    assert entry is not None
    assert entry.plan is not None
    assert entry.deadline_unix_s == desk.now + 1.5 * entry.plan.round_s + m.PLAN_SLACK_S
    desk = PlanDesk(deadline_s=3.0)
    desk.training("a", "b", "c")
    assert desk.machine.round is not None
    assert desk.machine.round.deadline_unix_s == desk.now + 3.0
    desk = PlanDesk(FREE)
    desk.training("a", "b", "c")
    assert desk.machine.round is not None
    assert desk.machine.round.deadline_unix_s == 0.0


def test_a_spare_takes_over_the_part_of_a_device_that_fails() -> None:
    desk = PlanDesk(FREE)
    parts = desk.training("a", "b", "c", "d")
    (idle,) = set("abcd") - set(parts)
    broken = next(name for name, depths in parts.items() if depths == (2,))
    desk.free = candidates(idle)
    (sent,) = only(desk.fail(broken), m.SendTask)
    assert (sent.device_id, sent.kind) == (f"id-{idle}", "train")
    assert sent.part is not None
    assert sent.part.depths == (2,)
    assert desk.parts()[idle] == (2,)
    for name in {*parts, idle} - {broken}:
        desk.update(name)
    assert desk.phase() == "folding"


def test_a_part_that_no_spare_can_do_in_time_is_skipped() -> None:
    desk = PlanDesk(quorum=0.5)
    parts = desk.training("a", "b", "c", "d")
    (idle,) = set("abcd") - set(parts)
    desk.free = candidates(idle)
    assert desk.machine.round is not None
    late = desk.machine.round.deadline_unix_s - desk.now - 2.0
    desk.now += late
    broken, *others = sorted(parts)
    assert only(desk.fail(broken), m.SendTask) == []
    for name in others:
        desk.update(name)
    assert desk.phase() == "folding"
    desk.fold()
    assert desk.machine.depth_rounds == [0 if (depth,) == parts[broken] else 1 for depth in (1, 2, 3)]


def test_without_spares_a_part_is_skipped_at_once() -> None:
    desk = PlanDesk(PlanSettings(rows=8, spares=False))
    parts = desk.training("a", "b", "c", "d")
    assert only(desk.fail(min(parts)), m.SeekSpares) == []


def test_the_quorum_counts_blocks() -> None:
    desk = PlanDesk(FREE, quorum=1.0)
    parts = desk.training("a", "b", "c")
    broken, *others = sorted(parts)
    for name in others:
        desk.update(name)
    (abandoned,) = only(desk.fail(broken), m.AbandonRound)
    assert "2 of 3 blocks were trained, the quorum is 3" in abandoned.reason


def test_in_depth_a_block_that_another_device_has_trained_counts() -> None:
    desk = PlanDesk(replace(FREE, layout="depth"), quorum=1.0)
    desk.training("a", "b", "c")
    parts = desk.parts()
    assert len(parts) > 1
    whole = [name for name, depths in parts.items() if depths == (1, 2, 3)]
    assert whole
    desk.update(whole[0])
    for name in set(parts) - {whole[0]}:
        desk.fail(name)
    assert desk.phase() == "folding"


def test_a_lost_task_is_given_again_with_the_same_part() -> None:
    desk = PlanDesk()
    parts = desk.training("a", "b", "c")
    name = min(parts)
    desk.do(m.DeviceOffline(f"id-{name}"))
    (again,) = only(desk.do(m.DeviceOnline(f"id-{name}", frozenset())), m.SendTask)
    assert again.part is not None
    assert again.part.depths == parts[name]


def test_a_damaged_update_of_a_planned_round_is_trained_again() -> None:
    desk = PlanDesk()
    parts = desk.training("a", "b", "c")
    for name in parts:
        desk.update(name)
    assert desk.phase() == "folding"
    assert desk.machine.round is not None
    lease = desk.machine.round.tasks[desk.task("a")].lease
    desk.now += 50.0
    (again,) = only(desk.do(m.UpdateDamaged(desk.task("a"), lease, online=True)), m.SendTask)
    assert again.part is not None
    assert again.deadline_unix_s > desk.now
    desk.update("a")
    assert desk.phase() == "folding"


def test_a_plan_that_failed_leaves_more_time_the_next_time() -> None:
    desk = PlanDesk(quorum=1.0)
    desk.training("a", "b", "c")
    entry = desk.machine.round
    assert entry is not None
    desk.now = entry.deadline_unix_s
    (abandoned,) = only(desk.do(m.Ticked()), m.AbandonRound)
    assert "0 of 3 blocks were trained" in abandoned.reason
    desk.training("a", "b", "c")
    entry = desk.machine.round
    assert entry is not None
    assert entry.plan is not None
    assert entry.deadline_unix_s == desk.now + 2 * 1.5 * entry.plan.round_s + m.FIRST_SLACK_S


def test_a_depth_that_took_more_memory_than_there_was_is_not_given_again() -> None:
    desk = PlanDesk(FREE, rounds=5)
    for _ in range(2):
        parts = desk.training("a", "b", "c", "d")
        deepest = next(name for name, depths in parts.items() if depths == (3,))
        if desk.machine.depths_failed:
            assert deepest not in {device_id.removeprefix("id-") for device_id in desk.machine.depths_failed}
        desk.fail(deepest, "out_of_memory")
        for name in set(parts) - {deepest}:
            desk.update(name, figures=figures())
        desk.fold()
    assert set(desk.machine.depths_failed.values()) == {3}
    assert len(desk.machine.depths_failed) == 2


def test_updates_tell_figures_and_lateness_for_the_next_plan() -> None:
    desk = PlanDesk()
    desk.machine.extra_s = {"id-a": 0.0, "id-b": 0.0}
    parts = desk.training("a", "b", "c")
    assert desk.machine.round is not None
    assert desk.machine.round.plan is not None
    ready_s = {part.device_id: part.ready_s for part in desk.machine.round.plan.parts}
    desk.update("a", figures=figures(2.0), ready_s=ready_s["id-a"] + 10.0)
    desk.update("b", ready_s=ready_s["id-b"] - 3.0)
    desk.update("c")
    assert desk.machine.figures["id-a"] == figures(2.0)
    assert desk.machine.extra_s["id-a"] == pytest.approx(3.0)
    assert desk.machine.extra_s["id-b"] == 0.0
    assert desk.machine.extra_s["id-c"] == 0.0, "the first time is not counted: the model was loaded in it"
    task = desk.machine.round.tasks[desk.task("a")]
    assert task.update is not None
    assert task.update.figures is None, "they lie in one place only"
    assert set(parts) == {"a", "b", "c"}


def test_rotation_and_the_rounds_that_a_block_waits_come_from_the_rounds_before() -> None:
    desk = PlanDesk(PlanSettings(rows=8, rotate_rounds=2))
    met: set[tuple[str, tuple[int, ...]]] = set()
    for number in (1, 2, 3):
        parts = desk.training("a", "b", "c")
        assert not met & set(parts.items()), "nobody trains the same block again"
        met |= set(parts.items())
        for name in parts:
            desk.update(name)
        desk.fold()
        assert desk.machine.committed == number
        assert len(desk.machine.turns) == min(number, 2)
    assert desk.machine.depth_rounds == [3, 3, 3]


def test_fewer_devices_than_blocks_train_those_that_have_waited() -> None:
    desk = PlanDesk(rounds=9)
    trained: list[set[int]] = []
    for _ in range(3):
        parts = desk.training("a", "b")
        trained.append({depth for depths in parts.values() for depth in depths})
        for name in parts:
            desk.update(name)
        desk.fold()
    assert trained[0] | trained[1] == {1, 2, 3}
    assert [len(depths) for depths in trained] == [2, 2, 2]


def test_a_restart_before_the_plan_waits_for_devices_again() -> None:
    desk = PlanDesk()
    desk.hold = True
    desk.open("a", "b", "c")
    for name in "abc":
        desk.tell(name)
    again = records.load_machine(records.dump_machine(desk.machine))
    assert again == desk.machine
    desk.machine = again
    (abandoned,) = desk.do(m.Restarted())
    assert isinstance(abandoned, m.AbandonRound)
    assert desk.status() == "waiting"
    desk.hold = False
    assert [task.kind for task in desk.open("a", "b", "c")] == ["train"] * 3


def test_a_restart_while_devices_measure_goes_on_with_them() -> None:
    desk = PlanDesk()
    desk.open("a", "b", "c")
    desk.tell("a")
    desk.machine = records.load_machine(records.dump_machine(desk.machine))
    assert desk.do(m.Restarted()) == []
    desk.do(m.DeviceOnline("id-b", frozenset({desk.task("b", "measure")})))
    (again,) = only(desk.do(m.DeviceOnline("id-c", frozenset())), m.SendTask)
    assert again.kind == "measure"
    desk.tell("b")
    desk.tell("c")
    assert desk.phase() == "training"


def test_a_restart_while_a_spare_is_sought_seeks_again() -> None:
    desk = PlanDesk(FREE)
    parts = desk.training("a", "b", "c", "d")
    desk.hold = True
    desk.fail(min(parts))
    assert desk.machine.seeking
    desk.machine = records.load_machine(records.dump_machine(desk.machine))
    assert only(desk.do(m.Restarted()), m.SeekSpares)
    desk.do(m.SparesOffered(1, ()))
    assert not desk.machine.seeking


def test_a_device_that_stays_away_while_measuring_is_missed() -> None:
    desk = PlanDesk()
    desk.open("a", "b", "c", "d")
    for name in "abc":
        desk.tell(name)
    desk.do(m.DeviceOffline("id-d"))
    desk.after(desk.machine.plan.absent_grace_s)
    assert desk.phase() == "training"
    assert set(desk.parts()) == {"a", "b", "c"}


def test_measuring_has_a_deadline_of_its_own() -> None:
    desk = PlanDesk(deadline_s=3.0)
    desk.open("a", "b", "c", "d")
    desk.after(60.0)
    assert desk.phase() == "measuring", "to fetch a base takes longer than a round"
    for name in "abc":
        desk.tell(name)
    desk.after(m.MEASURING_S)
    assert desk.phase() == "training"
    assert set(desk.parts()) == {"a", "b", "c"}


def test_pausing_and_cancelling_while_devices_measure() -> None:
    desk = PlanDesk()
    desk.open("a", "b", "c")
    desk.do(m.PauseRequested())
    assert desk.machine.message == m.PAUSES_LATER
    commands = desk.do(m.CancelRequested("enough"))
    assert len(only(commands, m.WithdrawTask)) == 3
    assert desk.status() == "cancelled"
    assert desk.machine.held == ()


def test_figures_that_come_late_or_twice_change_nothing() -> None:
    desk = PlanDesk()
    desk.open("a", "b", "c")
    desk.tell("a")
    before = records.dump_machine(desk.machine)
    assert desk.tell("a", figures(9.0)) == []
    assert records.dump_machine(desk.machine) == before
    desk.tell("b")
    task = desk.task("c", "measure")
    desk.tell("c")
    assert desk.do(m.FiguresArrived(task, figures(9.0))) == []
    assert desk.do(m.TaskFailed(task, Failure("crash", "measure", "x"))) == []


def test_a_machine_from_before_planning_is_read() -> None:
    """A job that waited for its second round when the coordinator was upgraded."""
    desk = Desk()
    desk.commit("a")
    document = json.loads(records.dump_machine(desk.machine))
    for name in ("figures", "extra_s", "held", "plans_asked", "seeking", "depth_rounds", "turns", "unplannable", "no_plan", "retry_unix_s"):
        del document[name]
    del document["plan"]["planning"]
    del document["prepared"]["blocks"]
    old = records.load_machine(json.dumps(document))
    assert old == desk.machine
    desk.machine = old
    assert [task.kind for task in desk.open("a")] == ["train"]

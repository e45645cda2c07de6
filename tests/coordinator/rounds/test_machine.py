"""The round machine, transition by transition."""

from __future__ import annotations

import math

import pytest

from fleetune.coordinator.domain import Blob, Candidate, Evaluation, Failure, FoldOutcome, Update
from fleetune.coordinator.rounds import machine as m
from fleetune.coordinator.store import records
from support.machines import Desk, blob, devices, only


def test_a_job_prepares_waits_trains_folds_and_commits() -> None:
    desk = Desk(rounds=1)
    assert desk.prepare() == [m.Prepare()]
    assert desk.machine.status == "waiting"
    sent = desk.open("a", "b")
    assert [(s.device_id, s.kind, s.round_number, s.lease, s.state) for s in sent] == [
        ("id-a", "train", 1, 1, blob("state 0")),
        ("id-b", "train", 1, 2, blob("state 0")),
    ]
    assert desk.update("b", samples=3) == []
    (fold,) = only(desk.update("a", samples=2), m.Fold)
    assert [(c.device_id, c.weight) for c in fold.contributions] == [("id-a", 2), ("id-b", 3)]
    commit, end = desk.fold()
    assert isinstance(commit, m.CommitRound)
    assert commit.entry.phase == "committed"
    assert end == m.EndJob("completed")
    assert (desk.machine.status, desk.machine.committed, desk.machine.state) == ("completed", 1, blob("state 1"))


def test_the_order_of_arrival_does_not_change_the_fold() -> None:
    folds: list[m.Fold] = []
    for order in ("abc", "cab", "bca"):
        desk = Desk()
        desk.open("a", "b", "c")
        commands = [command for name in order for command in desk.update(name, samples=ord(name))]
        folds += only(commands, m.Fold)
    assert folds[0] == folds[1] == folds[2]


@pytest.mark.parametrize(
    ("asked", "delivered", "quorum", "folds"),
    [
        (4, 2, 0.5, True),
        (4, 1, 0.5, False),
        (3, 1, 0.34, False),
        (3, 1, 1 / 3, True),
        (1, 0, 0.01, False),
        (10, 7, 0.7, True),
        (2, 1, 1.0, False),
    ],
)
def test_a_round_counts_once_the_quorum_has_delivered(asked: int, delivered: int, quorum: float, folds: bool) -> None:
    desk = Desk(quorum=quorum)
    names = [f"d{index}" for index in range(asked)]
    desk.open(*names)
    commands = [c for name in names[:delivered] for c in desk.update(name)]
    commands += [c for name in names[delivered:] for c in desk.fail(name)]
    assert bool(only(commands, m.Fold)) is folds
    assert bool(only(commands, m.AbandonRound)) is not folds


def test_a_round_without_enough_devices_is_not_opened() -> None:
    desk = Desk(minimum=3)
    assert desk.open("a", "b") == []
    assert "2 of at least 3" in desk.machine.message
    assert len(desk.open("a", "b", "c")) == 3


def test_the_deadline_closes_the_round_without_the_missing() -> None:
    desk = Desk(deadline_s=60.0)
    desk.open("a", "b")
    desk.update("a")
    assert desk.machine.next_deadline_unix_s() == 1060.0
    assert desk.after(59.0) == []
    withdrawn, fold = desk.after(1.0)
    assert isinstance(withdrawn, m.WithdrawTask)
    assert withdrawn.device_id == "id-b"
    assert isinstance(fold, m.Fold)
    assert [c.device_id for c in fold.contributions] == ["id-a"]


def test_after_training_has_closed_no_deadline_is_waited_for() -> None:
    desk = Desk(deadline_s=60.0, evaluation="heldout")
    desk.open("a")
    desk.update("a")
    assert desk.machine.next_deadline_unix_s() is None
    desk.fold()
    assert desk.machine.next_deadline_unix_s() is None
    assert desk.after(1000.0) == []


def test_an_offline_device_is_waited_for_during_its_grace() -> None:
    desk = Desk()
    desk.open("a", "b")
    desk.update("a")
    desk.do(m.DeviceOffline("id-b"))
    assert desk.machine.next_deadline_unix_s() == 1015.0
    assert desk.after(14.0) == []
    commands = desk.after(1.0)
    assert only(commands, m.WithdrawTask)
    assert only(commands, m.Fold)


def test_a_second_offline_event_does_not_lengthen_the_grace() -> None:
    desk = Desk()
    desk.open("a", "b")
    desk.do(m.DeviceOffline("id-b"))
    desk.now += 10
    desk.do(m.DeviceOffline("id-b"))
    assert desk.machine.next_deadline_unix_s() == 1015.0


def test_a_device_that_is_back_with_its_task_goes_on() -> None:
    desk = Desk()
    desk.open("a")
    desk.do(m.DeviceOffline("id-a"))
    assert desk.do(m.DeviceOnline("id-a", frozenset({desk.task("a")}))) == []
    assert desk.after(100.0) == []


def test_a_device_that_has_lost_its_task_gets_it_again_under_a_new_lease() -> None:
    desk = Desk()
    (first,) = desk.open("a")
    desk.do(m.DeviceOffline("id-a"))
    (again,) = only(desk.do(m.DeviceOnline("id-a", frozenset())), m.SendTask)
    assert (again.task_id, again.state) == (first.task_id, first.state)
    assert again.lease > first.lease


def test_an_evaluation_is_handed_out_again_with_the_new_state() -> None:
    desk = Desk(evaluation="devices")
    desk.open("a")
    desk.update("a")
    desk.fold("a")
    (again,) = only(desk.do(m.DeviceOnline("id-a", frozenset())), m.SendTask)
    assert (again.kind, again.state) == ("evaluate", blob("state 1"))


def test_a_late_update_is_counted_and_not_folded() -> None:
    desk = Desk(deadline_s=10.0)
    desk.open("a", "b")
    late = desk.task("b")
    desk.update("a")
    desk.after(10.0)
    assert desk.do(m.UpdateArrived(late, Update(blob("late"), 1))) == []
    desk.do(m.UpdateLate(late, blob("late").digest))
    (commit,) = only(desk.fold(), m.CommitRound)
    assert commit.entry.late == 1
    assert [task.device_name for task in commit.entry.trained()] == ["a"]


def test_an_update_for_an_evaluate_task_and_the_reverse_are_ignored() -> None:
    desk = Desk(evaluation="devices")
    desk.open("a")
    assert desk.do(m.EvaluationArrived(desk.task("a"), Evaluation({}, 1))) == []
    desk.update("a")
    desk.fold("a")
    assert desk.do(m.UpdateArrived(desk.task("a", "evaluate"), Update(blob("x"), 1))) == []
    assert desk.machine.round is not None
    assert desk.machine.round.phase == "evaluating"


def test_results_are_counted_once() -> None:
    desk = Desk()
    desk.open("a", "b")
    desk.update("a")
    assert desk.update("a", samples=99) == []
    assert desk.fail("a") == []
    (fold,) = only(desk.update("b"), m.Fold)
    assert [c.weight for c in fold.contributions] == [1, 1]


# --- failures


@pytest.mark.parametrize("kind", ["data", "model", "unsupported"])
def test_a_lasting_failure_excludes_the_device(kind: str) -> None:
    desk = Desk()
    desk.open("a", "b")
    desk.fail("a", kind)  # type: ignore[arg-type]
    desk.update("b")
    desk.fold()
    assert [s.device_id for s in desk.open("a", "b")] == ["id-b"]


def test_three_failures_in_a_row_exclude_the_device_and_a_success_forgets_them() -> None:
    desk = Desk(rounds=100, quorum=0.5)
    for outcome in ("fail", "fail", "update", "fail", "fail"):
        assert len(desk.open("a", "b")) == 2
        desk.update("b")
        desk.fail("a") if outcome == "fail" else desk.update("a")
        desk.fold()
    desk.open("a", "b")
    desk.update("b")
    desk.fail("a")
    desk.fold()
    assert [s.device_id for s in desk.open("a", "b")] == ["id-b"]


def test_a_job_fails_when_every_device_asked_cannot_take_part_any_more() -> None:
    desk = Desk()
    desk.open("a", "b")
    desk.fail("a", "data")
    commands = desk.fail("b", "model")
    assert m.EndJob("failed") in commands
    assert "a: a data" in desk.machine.message
    assert desk.machine.last_failure_device == "b"


def test_a_single_device_that_keeps_crashing_fails_the_job() -> None:
    desk = Desk()
    desk.prepare()
    ended: list[m.Command] = []
    for _ in range(m.DEVICE_FAILURES):
        assert desk.machine.status == "waiting"
        desk.open("a")
        ended = desk.fail("a")
    assert m.EndJob("failed") in ended


def test_a_waiting_job_says_how_many_devices_it_has_given_up() -> None:
    desk = Desk(minimum=2)
    desk.open("a", "b")
    desk.fail("a", "data")
    desk.fail("b")
    desk.open("a", "b")
    assert "1 get no more tasks" in desk.machine.message


def test_a_round_is_opened_again_a_bounded_number_of_times() -> None:
    desk = Desk(minimum=1, quorum=1.0)
    ids: set[str] = set()
    commands: list[m.Command] = []
    for attempt in range(m.ROUND_ATTEMPTS):
        # Another device fails each time, so that none is excluded.
        names = ("x", f"d{attempt}")
        desk.open(*names)
        ids.add(desk.task("x"))
        desk.update("x")
        commands = desk.fail(names[1])
    assert m.EndJob("failed") in commands
    assert len(ids) == m.ROUND_ATTEMPTS


def test_refusals_alone_never_fail_a_job() -> None:
    desk = Desk()
    for _ in range(3 * m.ROUND_ATTEMPTS):
        desk.open("a")
        desk.refuse("a")
    assert desk.machine.status == "waiting"
    assert "on battery" in desk.machine.message


def test_an_abandoned_rounds_tasks_have_other_names_the_next_time() -> None:
    desk = Desk(quorum=1.0)
    desk.open("a", "b")
    first = desk.task("a")
    desk.update("a")
    desk.fail("b")
    desk.open("a", "b")
    assert desk.task("a") != first
    assert desk.do(m.UpdateArrived(first, Update(blob("old"), 1))) == []


def test_a_device_that_cannot_evaluate_still_trains() -> None:
    desk = Desk(evaluation="devices")
    desk.open("a", "b")
    desk.update("a")
    desk.update("b")
    desk.fold("a", "b")
    desk.fail("a", "data", "evaluate")
    desk.measured("b", accuracy=0.5)
    assert [s.device_id for s in desk.open("a", "b")] == ["id-a", "id-b"]
    desk.update("a")
    desk.update("b")
    assert [s.device_id for s in only(desk.fold("a", "b"), m.SendTask)] == ["id-b"]


@pytest.mark.parametrize("stage", ["preparing", "folding", "evaluating"])
def test_trouble_on_the_coordinator_fails_the_job(stage: str) -> None:
    desk = Desk(evaluation="heldout")
    desk.do(m.Started())
    if stage != "preparing":
        desk = Desk(evaluation="heldout")
        desk.open("a")
        desk.update("a")
    if stage == "evaluating":
        desk.fold()
    commands = desk.do(m.HostFailed(stage, Failure("internal", stage, "no such base")))
    assert m.EndJob("failed") in commands
    assert desk.machine.message == f"{stage} failed on the coordinator: no such base"


# --- evaluation, best round, early stop


def test_evaluations_of_devices_are_averaged_by_rows() -> None:
    desk = Desk(evaluation="devices")
    desk.open("a", "b")
    desk.update("a")
    desk.update("b")
    assert len(only(desk.fold("a", "b"), m.SendTask)) == 2
    desk.measured("a", rows=10, accuracy=1.0, loss=math.nan)
    (commit,) = only(desk.measured("b", rows=30, accuracy=0.0, loss=2.0), m.CommitRound)
    assert commit.entry.metrics == {"accuracy": 0.25, "loss": 2.0}
    assert commit.entry.evaluation_rows == 40


def test_a_device_without_validation_rows_weighs_nothing() -> None:
    desk = Desk(evaluation="devices")
    desk.open("a")
    desk.update("a")
    desk.fold("a")
    (commit,) = only(desk.measured("a", rows=0, accuracy=1.0), m.CommitRound)
    assert commit.entry.metrics == {}


def test_a_round_is_committed_unmeasured_when_nobody_can_evaluate() -> None:
    desk = Desk(evaluation="devices", rounds=2)
    desk.open("a")
    desk.update("a")
    assert only(desk.fold(), m.CommitRound)


def test_an_evaluation_past_its_deadline_is_left_out() -> None:
    desk = Desk(evaluation="devices", deadline_s=60.0)
    desk.open("a", "b")
    desk.update("a")
    desk.update("b")
    desk.now += 50
    desk.fold("a", "b")
    desk.measured("a", accuracy=0.5)
    assert desk.after(59.0) == []
    (commit,) = only(desk.after(1.0), m.CommitRound)
    assert commit.entry.metrics == {"accuracy": 0.5}


def test_only_every_kth_round_and_the_last_are_evaluated() -> None:
    desk = Desk(evaluation="heldout", evaluate_every=3, rounds=5)
    evaluated: list[int] = []
    for number in range(1, 6):
        desk.open("a")
        desk.update("a")
        if only(desk.fold(), m.EvaluateHeldout):
            evaluated.append(number)
            desk.do(m.HeldoutEvaluated(number, Evaluation({"accuracy": 0.5}, 5)))
    assert evaluated == [3, 5]
    assert desk.machine.status == "completed"


def run_with(values: list[float], **changes: object) -> Desk:
    desk = Desk(evaluation="heldout", rounds=len(values), **changes)
    for number, value in enumerate(values, 1):
        if desk.machine.status == "completed":
            break
        desk.open("a")
        desk.update("a")
        desk.fold()
        desk.do(m.HeldoutEvaluated(number, Evaluation({str(changes.get("metric", "accuracy")): value}, 5)))
    return desk


@pytest.mark.parametrize(
    ("changes", "values", "best", "committed"),
    [
        ({}, [0.1, 0.5, 0.4], 2, 3),
        ({"metric": "loss"}, [3.0, 1.0, 2.0], 2, 3),
        ({"metric": "macro_f1"}, [0.3, 0.2], 1, 2),
        ({"patience": 2}, [0.5, 0.4, 0.4, 0.9], 1, 3),
        ({"patience": 1, "metric": "loss"}, [1.0, 1.0, 0.5], 1, 2),
        ({"patience": 1, "min_delta": 0.1}, [0.5, 0.55, 0.9], 2, 2),
        ({"patience": 2}, [0.5, math.nan, math.nan, math.nan, 0.6], 5, 5),
        ({"patience": 1}, [math.nan, 0.5, 0.6], 3, 3),
        ({"metric": "loss"}, [math.inf, 5.0], 2, 2),
    ],
)
def test_the_best_round_is_kept_and_no_gain_ends_the_job(
    changes: dict[str, object], values: list[float], best: int, committed: int
) -> None:
    desk = run_with(values, **changes)
    assert (desk.machine.best_round, desk.machine.committed) == (best, committed)
    assert desk.machine.status == "completed"
    assert ("stopped early" in desk.machine.message) is (committed < len(values))


# --- choice of devices, waiting


def test_the_choice_of_devices_is_the_seeds_alone() -> None:
    def chosen(seed: int, order: str) -> list[list[str]]:
        desk = Desk(per_round=2, seed=seed, rounds=5)
        found: list[list[str]] = []
        for _ in range(5):
            found.append([s.device_id for s in desk.open(*order)])
            for device_id in found[-1]:
                desk.update(device_id.removeprefix("id-"))
            desk.fold()
        return found

    assert chosen(1, "abcdef") == chosen(1, "fbdeca")
    assert chosen(1, "abcdef") != chosen(2, "abcdef")
    assert all(len(names) == 2 for names in chosen(1, "abcdef"))


def test_at_least_the_minimum_is_asked_even_if_fewer_are_wanted_per_round() -> None:
    assert len(Desk(per_round=1, minimum=3).open("a", "b", "c", "d")) == 3


def test_waiting_for_devices_ends_after_wait_s() -> None:
    desk = Desk(wait_s=100.0, minimum=2)
    desk.open("a")
    assert desk.machine.next_deadline_unix_s() == 1100.0
    assert desk.after(99.0) == []
    assert m.EndJob("failed") in desk.after(1.0)
    assert "1 of at least 2" in desk.machine.message
    assert "devices.wait_s" in desk.machine.message


def test_a_paused_job_is_not_given_up() -> None:
    desk = Desk(wait_s=100.0)
    desk.prepare()
    desk.do(m.PauseRequested())
    assert desk.machine.next_deadline_unix_s() is None
    assert desk.after(1000.0) == []
    desk.do(m.ResumeRequested())
    assert desk.after(99.0) == []
    assert m.EndJob("failed") in desk.after(1.0)


# --- pause, resume, cancel, restart: at every place of a job's life


def at(place: str) -> Desk:
    desk = Desk(evaluation="heldout" if place == "evaluating on the coordinator" else "devices", rounds=3, wait_s=100.0)
    if place == "queued":
        return desk
    desk.do(m.Started())
    if place == "preparing":
        return desk
    desk = Desk(evaluation="heldout" if place == "evaluating on the coordinator" else "devices", rounds=3, wait_s=100.0)
    desk.prepare()
    if place == "waiting":
        return desk
    desk.open("a", "b")
    if place == "training":
        desk.update("a")
        return desk
    desk.update("a")
    desk.update("b")
    if place == "folding":
        return desk
    desk.fold("a", "b")
    return desk


PLACES = ["queued", "preparing", "waiting", "training", "folding", "evaluating", "evaluating on the coordinator"]


def go_on(desk: Desk) -> None:
    """Whatever the job waits for happens."""
    machine = desk.machine
    if machine.status == "preparing" or (machine.status == "queued" and not machine.paused):
        desk.prepare()
    elif machine.status == "waiting":
        desk.open("a", "b")
    elif machine.round is not None and machine.round.phase == "folding":
        desk.fold("a", "b")
    elif machine.round is not None:
        for task in list(machine.round.tasks.values()):
            if task.status == "assigned":
                desk.update(task.device_name) if task.kind == "train" else desk.measured(task.device_name, accuracy=0.5)
        if desk.phase() == "evaluating":
            desk.do(m.HeldoutEvaluated(machine.committed + 1, Evaluation({"accuracy": 0.5}, 3)))


@pytest.mark.parametrize("place", PLACES)
def test_a_paused_job_ends_its_round_and_opens_no_other_until_resumed(place: str) -> None:
    desk = at(place)
    desk.do(m.PauseRequested())
    desk.do(m.PauseRequested())
    assert "pause" in desk.machine.message
    for _ in range(6):
        go_on(desk)
    assert desk.status() == ("queued" if place == "queued" else "paused")
    assert desk.machine.committed == (0 if place in ("queued", "preparing", "waiting") else 1)
    assert not desk.machine.wants_devices()
    assert desk.open("a", "b") == [] or place == "queued"
    desk.do(m.ResumeRequested())
    desk.do(m.ResumeRequested())
    for _ in range(20):
        go_on(desk)
    assert desk.status() == "completed"


@pytest.mark.parametrize("place", PLACES)
def test_resuming_before_the_pause_took_hold_leaves_no_trace(place: str) -> None:
    desk = at(place)
    desk.do(m.PauseRequested())
    desk.do(m.ResumeRequested())
    assert not desk.machine.paused
    assert "pause" not in desk.machine.message
    for _ in range(20):
        go_on(desk)
    assert desk.status() == "completed"


@pytest.mark.parametrize("place", PLACES)
def test_a_cancelled_job_withdraws_its_tasks_and_stays_cancelled(place: str) -> None:
    desk = at(place)
    open_tasks = [t.device_id for t in desk.machine.round.tasks.values() if t.status == "assigned"] if desk.machine.round else []
    commands = desk.do(m.CancelRequested("enough"))
    assert commands[-1] == m.EndJob("cancelled")
    assert [w.device_id for w in only(commands, m.WithdrawTask)] == open_tasks
    assert bool(only(commands, m.AbandonRound)) is ("ing" in place and place not in ("preparing", "waiting"))
    before = records.dump_machine(desk.machine)
    late: list[m.Event] = [
        m.Started(),
        m.Offered(devices("a")),
        m.Ticked(),
        m.CancelRequested("again"),
        m.PauseRequested(),
        m.ResumeRequested(),
        m.Restarted(),
        m.Folded(1, FoldOutcome(blob("x")), ()),
        m.HeldoutEvaluated(1, Evaluation({}, 1)),
        m.HostFailed("folding", Failure("internal", "fold", "x")),
    ]
    assert [command for event in late for command in desk.do(event)] == []
    assert records.dump_machine(desk.machine) == before


@pytest.mark.parametrize("place", PLACES)
def test_a_restarted_coordinator_goes_on_where_it_was(place: str) -> None:
    desk = at(place)
    desk.machine = records.load_machine(records.dump_machine(desk.machine))
    desk.now += 500
    commands = desk.do(m.Restarted())
    kinds = {"preparing": m.Prepare, "folding": m.Fold, "evaluating on the coordinator": m.EvaluateHeldout}
    assert [type(c) for c in commands] == ([kinds[place]] if place in kinds else [])
    assert desk.do(m.Ticked()) == []
    for _ in range(20):
        go_on(desk)
    assert desk.status() == "completed"


def test_a_restart_past_the_deadline_leaves_devices_the_time_to_come_back() -> None:
    desk = Desk(deadline_s=60.0)
    desk.open("a", "b")
    desk.now += 500
    desk.do(m.Restarted())
    assert desk.do(m.Ticked()) == []
    desk.do(m.DeviceOnline("id-a", frozenset({desk.task("a")})))
    assert desk.update("a") == []
    assert only(desk.after(15.0), m.Fold)


def test_devices_that_stay_away_after_a_restart_are_missed() -> None:
    desk = Desk()
    desk.open("a", "b")
    desk.update("a")
    desk.do(m.Restarted())
    assert only(desk.after(15.0), m.Fold)


def test_a_machine_with_strange_figures_is_the_same_after_a_restart() -> None:
    desk = Desk(evaluation="devices")
    desk.open("a")
    desk.update("a", metrics={"loss": math.nan, "norm": math.inf})
    desk.fold("a")
    again = records.load_machine(records.dump_machine(desk.machine))
    assert again.round is not None
    (task, _) = again.round.tasks.values()
    assert task.update is not None
    assert math.isnan(task.update.metrics["loss"])
    assert task.update.metrics["norm"] == math.inf
    assert again.state == Blob(blob("state 0").digest, 100)


# --- damaged updates


def test_a_damaged_update_takes_a_folding_round_back_to_training_under_a_new_lease() -> None:
    desk = Desk(deadline_s=60.0)
    sent = {order.device_id: order for order in desk.open("a", "b")}
    desk.update("a")
    desk.now += 50.0
    assert only(desk.update("b"), m.Fold)
    (again,) = desk.do(m.UpdateDamaged(desk.task("a"), sent["id-a"].lease, online=True))
    assert isinstance(again, m.SendTask)
    assert (again.task_id, again.state) == (sent["id-a"].task_id, sent["id-a"].state)
    assert again.lease > max(order.lease for order in sent.values())
    assert again.deadline_unix_s == desk.now + 60.0, "the whole time once more"
    assert desk.phase() == "training"
    (fold,) = only(desk.update("a", samples=7), m.Fold)
    assert [c.weight for c in fold.contributions] == [7, 1]


def test_damage_found_under_an_older_lease_or_after_the_fold_changes_nothing() -> None:
    desk = Desk()
    (sent,) = desk.open("a")
    desk.update("a")
    assert desk.do(m.UpdateDamaged(desk.task("a"), sent.lease, online=True)) != []
    assert desk.do(m.UpdateDamaged(desk.task("a"), sent.lease, online=True)) == [], "told twice"
    desk.update("a")
    task, lease = desk.task("a"), desk.machine.lease
    desk.fold("a")
    assert desk.do(m.UpdateDamaged(task, lease, online=True)) == []


def test_a_damaged_update_of_an_absent_device_is_waited_for_no_longer_than_for_any_absent_one() -> None:
    desk = Desk(absent_grace_s=15.0)
    sent = {order.device_id: order for order in desk.open("a", "b")}
    desk.update("a")
    desk.update("b")
    desk.do(m.UpdateDamaged(desk.task("a"), sent["id-a"].lease, online=False))
    (fold,) = only(desk.after(15.0), m.Fold)
    assert [c.device_id for c in fold.contributions] == ["id-b"]


# --- who trains and who measures


def who(*words: str) -> tuple[Candidate, ...]:
    """Candidates as "name:te": what each can do, train or evaluate."""
    split = [word.partition(":") for word in words]
    return tuple(Candidate(f"id-{name}", name, "t" in can, "e" in can) for name, _, can in split)


def test_a_device_without_train_rows_never_trains_and_does_not_count_for_the_minimum() -> None:
    desk = Desk(minimum=2)
    desk.prepare()
    assert desk.do(m.Offered(who("a:te", "panel:e"))) == []
    assert desk.machine.message == "waits for devices: 1 of at least 2 are ready; 1 more can only measure"
    sent = only(desk.do(m.Offered(who("a:te", "b:t", "panel:e"))), m.SendTask)
    assert [(task.device_id, task.kind) for task in sent] == [("id-a", "train"), ("id-b", "train")]


def test_a_sample_of_devices_is_drawn_from_those_that_train() -> None:
    for seed in range(20):
        desk = Desk(per_round=2, seed=seed)
        desk.prepare()
        sent = only(desk.do(m.Offered(who("a:t", "b:t", "c:te", "p:e", "q:e"))), m.SendTask)
        assert len(sent) == 2 and not {task.device_id for task in sent} & {"id-p", "id-q"}


def test_a_device_without_validation_rows_never_measures() -> None:
    desk = Desk(evaluation="devices")
    desk.open("a", "b")
    desk.update("a")
    desk.update("b")
    measured = only(desk.do(m.Folded(1, FoldOutcome(blob("state 1")), who("a:te", "b:t", "panel:e"))), m.SendTask)
    assert [(task.device_id, task.kind) for task in measured] == [("id-a", "evaluate"), ("id-panel", "evaluate")]


def test_a_round_that_nobody_can_measure_is_committed_all_the_same() -> None:
    desk = Desk(evaluation="devices")
    desk.open("a")
    desk.update("a")
    commands = desk.do(m.Folded(1, FoldOutcome(blob("state 1")), who("a:t")))
    assert only(commands, m.CommitRound)[0].entry.metrics == {}


def test_a_round_whose_devices_are_away_is_measured_when_they_are_back() -> None:
    desk = Desk(evaluation="devices", absent_grace_s=30.0)
    desk.open("a", "b")
    desk.update("a")
    desk.update("b")
    desk.do(m.Folded(1, FoldOutcome(blob("state 1")), (), absent=frozenset({"id-a", "id-b"})))
    assert desk.machine.round is not None and desk.machine.round.phase == "evaluating"
    desk.now += 20
    sent = only(desk.do(m.DeviceOnline("id-a", frozenset())), m.SendTask)
    assert [(task.device_id, task.kind) for task in sent] == [("id-a", "evaluate")]
    assert desk.measured("a", accuracy=0.5) == [], "b may be back yet"
    commands = desk.after(15)
    assert only(commands, m.CommitRound)[0].entry.metrics == {"accuracy": 0.5}
    assert only(commands, m.WithdrawTask)[0].device_id == "id-b"


def test_nobody_is_waited_for_who_cannot_measure_or_never_comes_back() -> None:
    desk = Desk(evaluation="devices", absent_grace_s=30.0)
    desk.open("a", "b")
    desk.update("a")
    desk.update("b")
    # b is there, and has nothing to measure on; an absent one that was not in the round has no say in it.
    desk.do(m.Folded(1, FoldOutcome(blob("state 1")), who("b:t"), absent=frozenset({"id-a", "id-z"})))
    assert desk.machine.round is not None
    assert {task.device_id for task in desk.machine.round.tasks.values() if task.kind == "evaluate"} == {"id-a"}
    assert only(desk.after(31), m.CommitRound)[0].entry.metrics == {}


# --- a turn for a resumed job


def test_a_job_resumed_while_others_have_their_turn_gets_in_line_again() -> None:
    desk = Desk()
    desk.commit("a")
    desk.do(m.PauseRequested())
    assert desk.status() == "paused"
    assert desk.do(m.ResumeRequested(turn=False)) == []
    assert (desk.status(), desk.machine.message) == ("queued", "resumed; waits for its turn")
    started = desk.machine.started_unix_s
    desk.now += 50
    assert desk.do(m.Started()) == [], "it is prepared"
    assert (desk.status(), desk.machine.started_unix_s, desk.machine.waiting_since_unix_s) == ("waiting", started, desk.now)
    desk.commit("a")
    assert desk.machine.committed == 2


def test_a_job_in_line_again_may_be_paused_and_resumed_there() -> None:
    desk = Desk()
    desk.prepare()
    desk.do(m.PauseRequested())
    desk.do(m.ResumeRequested(turn=False))
    desk.do(m.PauseRequested())
    assert (desk.status(), desk.machine.message) == ("queued", m.PAUSED_IN_LINE)
    desk.do(m.ResumeRequested(turn=True))
    assert (desk.status(), desk.machine.message) == ("queued", "")
    desk.do(m.Started())
    assert desk.status() == "waiting"


def test_a_job_that_pauses_later_goes_on_where_it_is() -> None:
    desk = Desk()
    desk.open("a")
    desk.do(m.PauseRequested())
    desk.do(m.ResumeRequested(turn=False))
    assert (desk.status(), desk.machine.paused, desk.machine.message) == ("running", False, "")


# --- a new state that is damaged before its commit


def in_evaluation(source: str = "devices") -> Desk:
    """A round whose fold is done: `a` has measured it, `b` measures."""
    desk = Desk(evaluation=source)
    desk.open("a", "b")
    desk.update("a", samples=2)
    desk.update("b", samples=3)
    desk.fold("a", "b")
    if source == "devices":
        desk.measured("a", accuracy=0.1)
    return desk


def test_a_damaged_new_state_is_folded_again_and_measured_again_by_all() -> None:
    desk = in_evaluation()
    withdrawn, fold = desk.do(m.StateDamaged(1))
    assert withdrawn == m.WithdrawTask(desk.machine.plan.job_id + "/1/id-b/evaluate", "id-b", withdrawn.reason)  # type: ignore[union-attr]
    assert isinstance(fold, m.Fold)
    assert [(c.device_id, c.weight) for c in fold.contributions] == [("id-a", 2), ("id-b", 3)]
    assert desk.phase() == "folding"
    assert desk.machine.round is not None and desk.machine.round.state is None
    sent = only(desk.fold("a", "b"), m.SendTask)
    assert [(task.device_id, task.kind) for task in sent] == [("id-a", "evaluate"), ("id-b", "evaluate")]
    desk.measured("a", accuracy=0.5)
    (commit,) = only(desk.measured("b", accuracy=0.7), m.CommitRound)
    assert commit.entry.metrics == {"accuracy": pytest.approx(0.6)}


def test_a_damaged_new_state_of_another_round_or_phase_changes_nothing() -> None:
    desk = in_evaluation()
    assert desk.do(m.StateDamaged(2)) == []
    assert desk.phase() == "evaluating"
    desk = Desk()
    desk.open("a")
    assert desk.do(m.StateDamaged(1)) == []
    assert desk.phase() == "training"


@pytest.mark.parametrize("source", ["devices", "heldout"])
def test_a_new_state_damaged_while_the_coordinator_was_down_is_folded_once(source: str) -> None:
    desk = in_evaluation(source)
    commands = desk.do(m.Restarted(state_damaged=True))
    assert len(only(commands, m.Fold)) == 1
    assert not only(commands, m.EvaluateHeldout)
    again = desk.fold("a", "b")
    assert only(again, m.SendTask) if source == "devices" else only(again, m.EvaluateHeldout)

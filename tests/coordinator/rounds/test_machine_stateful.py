"""Whatever happens to a job, in whatever order: its machine stays sound, counts an update once, and survives a restart unchanged."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from fleetune.coordinator.domain import ENDED, Evaluation, Failure, FoldOutcome, Update
from fleetune.coordinator.rounds import machine as m
from fleetune.coordinator.store import records
from support.machines import Desk, blob, devices

NAMES = ["a", "b", "c", "d"]
names = st.sampled_from(NAMES)
figures = st.floats(allow_nan=True, allow_infinity=True)
rows = st.integers(0, 5)


class Jobs(RuleBasedStateMachine):
    """Events of devices, operators and the coordinator itself, also late, twice and about tasks that never were."""

    tasks = Bundle("tasks")
    pending = Bundle("pending")

    @initialize(
        minimum=st.integers(1, 3),
        per_round=st.integers(0, 3),
        quorum=st.sampled_from([0.25, 0.5, 1.0]),
        deadline_s=st.sampled_from([0.0, 20.0]),
        wait_s=st.sampled_from([0.0, 50.0]),
        evaluation=st.sampled_from(["devices", "heldout", "none"]),
        evaluate_every=st.integers(1, 2),
        patience=st.integers(0, 2),
    )
    def begin(self, **changes: Any) -> None:
        self.desk = Desk(rounds=4, **changes)
        self.committed = 0
        self.lease = 0
        self.ended_as = ""
        self.accepted: dict[str, str] = {}

    def _do(self, event: m.Event) -> Any:
        machine = self.desk.machine
        before = machine.open_task(event.task_id) if isinstance(event, m.UpdateArrived) else None
        counts = before is not None and before.status == "assigned" and before.kind == "train"
        commands = self.desk.do(event)
        if isinstance(event, m.UpdateArrived) and counts:
            assert event.task_id not in self.accepted, "an update counts once"
            self.accepted[event.task_id] = event.update.blob.digest
        if isinstance(event, m.UpdateDamaged) and commands:
            del self.accepted[event.task_id]
            assert [type(command) for command in commands] == [m.SendTask], "the task is given again, nothing else"
            assert self.desk.phase() == "training"
        sent: list[str] = []
        for command in commands:
            if isinstance(command, m.SendTask):
                assert command.lease > self.lease, "leases only grow"
                self.lease = command.lease
                sent.append(command.task_id)
            elif isinstance(command, m.Fold):
                assert command.contributions
                assert len({c.device_id for c in command.contributions}) == len(command.contributions)
                assert {c.blob.digest for c in command.contributions} <= set(self.accepted.values())
            elif isinstance(command, m.CommitRound):
                assert command.entry.number == self.committed + 1, "committed rounds grow one by one"
                self.committed = command.entry.number
            elif isinstance(command, m.EndJob):
                assert command is commands[-1], "nothing comes after the end"
        return multiple(*sent)

    @rule(target=tasks, asked=st.sets(names))
    def offer(self, asked: set[str]) -> Any:
        return self._do(m.Offered(devices(*asked)))

    @rule(target=tasks)
    def work_of_the_coordinator_ends(self) -> Any:
        machine = self.desk.machine
        if machine.status == "queued":
            return self._do(m.Started())
        if machine.status == "preparing":
            self.desk.prepare()
            return multiple()
        if machine.round is not None and machine.round.phase == "folding":
            number = machine.round.number
            return self._do(m.Folded(number, FoldOutcome(blob(f"s{number}")), devices(*NAMES[:2])))
        return multiple()

    @rule(target=tasks, name=names, number=st.integers(0, 5), kind=st.sampled_from(["train", "evaluate"]))
    def name_any_task(self, name: str, number: int, kind: str) -> str:
        return f"job/{number}/id-{name}/{kind}"

    @rule(target=pending, task=tasks, word=st.sampled_from(["x", "y"]))
    def train(self, task: str, word: str) -> tuple[str, str]:
        return (task, word)

    @rule(what=consumes(pending), samples=st.integers(1, 9), loss=figures)
    def update_arrives(self, what: tuple[str, str], samples: int, loss: float) -> None:
        self._do(m.UpdateArrived(what[0], Update(blob("".join(what)[-30:]), samples, {"loss": loss})))

    @rule(what=pending)
    def update_arrives_twice(self, what: tuple[str, str]) -> None:
        for _ in range(2):
            self._do(m.UpdateArrived(what[0], Update(blob("".join(what)[-30:]), 1)))

    @rule(target=tasks, task=tasks, stale=st.booleans(), online=st.booleans())
    def update_turns_out_damaged(self, task: str, stale: bool, online: bool) -> Any:
        entry = self.desk.machine.open_task(task)
        lease = entry.lease if entry is not None and not stale else 0
        counted = entry is not None and entry.update is not None and not stale and self.desk.phase() in ("training", "folding")
        sent = self._do(m.UpdateDamaged(task, lease, online))
        if counted:
            assert entry is not None
            assert (entry.status, entry.update) == ("assigned", None)
        return sent

    @rule(target=tasks, number=st.integers(0, 5))
    def new_state_turns_out_damaged(self, number: int) -> Any:
        machine = self.desk.machine
        counted = machine.round is not None and machine.round.phase == "evaluating" and machine.round.number == number
        sent = self._do(m.StateDamaged(number))
        if counted:
            assert machine.round is not None
            assert (machine.round.phase, machine.round.state) == ("folding", None)
        return sent

    @rule(task=tasks)
    def late(self, task: str) -> None:
        self._do(m.UpdateLate(task, "d" * 64))

    @rule(task=tasks, value=figures, count=rows)
    def evaluation_arrives(self, task: str, value: float, count: int) -> None:
        self._do(m.EvaluationArrived(task, Evaluation({"accuracy": value}, count)))

    @rule(task=tasks, kind=st.sampled_from(["data", "crash", "stalled", "out_of_memory"]))
    def task_fails(self, task: str, kind: Any) -> None:
        self._do(m.TaskFailed(task, Failure(kind, "train", "x")))

    @rule(task=tasks)
    def task_is_refused(self, task: str) -> None:
        self._do(m.TaskRefused(task, "busy"))

    @rule(name=names)
    def offline(self, name: str) -> None:
        self._do(m.DeviceOffline(f"id-{name}"))

    @rule(target=tasks, name=names, keeps=st.booleans())
    def online(self, name: str, keeps: bool) -> Any:
        machine = self.desk.machine
        held = {t for t, e in machine.round.tasks.items() if e.device_id == f"id-{name}"} if machine.round and keeps else set[str]()
        return self._do(m.DeviceOnline(f"id-{name}", frozenset(held)))

    @rule(number=st.integers(0, 5), value=figures)
    def heldout(self, number: int, value: float) -> None:
        self._do(m.HeldoutEvaluated(number, Evaluation({"accuracy": value}, 3)))

    @rule(target=tasks, number=st.integers(0, 5))
    def stray_fold(self, number: int) -> Any:
        machine = self.desk.machine
        if machine.round is not None and machine.round.phase == "folding" and machine.round.number == number:
            return multiple()
        return self._do(m.Folded(number, FoldOutcome(blob("stray")), devices("a")))

    @rule(seconds=st.sampled_from([0.0, 1.0, 16.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.desk.now += seconds
        self._do(m.Ticked())

    @rule(pause=st.booleans(), turn=st.booleans())
    def operator(self, pause: bool, turn: bool) -> None:
        self._do(m.PauseRequested() if pause else m.ResumeRequested(turn))
        if self.desk.machine.status == "queued" and not self.desk.machine.paused and turn:
            self._do(m.Started())

    @rule(chance=st.integers(0, 19))
    def cancel(self, chance: int) -> None:
        if chance == 0:
            self._do(m.CancelRequested("x"))

    @rule(damaged=st.booleans())
    def restart(self, damaged: bool) -> None:
        text = records.dump_machine(self.desk.machine)
        again = records.load_machine(text)
        assert records.dump_machine(again) == text
        self.desk.machine = again
        self._do(m.Restarted(state_damaged=damaged))

    @invariant()
    def sound(self) -> None:
        machine = self.desk.machine if hasattr(self, "desk") else Desk().machine
        machine.validate()
        if not hasattr(self, "desk"):
            return
        assert machine.committed == self.committed <= 4
        if self.ended_as:
            assert machine.status == self.ended_as, "an ended job stays ended"
        if machine.status in ENDED:
            self.ended_as = machine.status
            assert machine.round is None
            assert not machine.busy_devices()
            assert machine.next_deadline_unix_s() is None
        due = machine.next_deadline_unix_s()
        if due is not None and due <= self.desk.now:
            before = records.dump_machine(machine)
            self._do(m.Ticked())
            assert records.dump_machine(machine) != before, "a deadline that has passed changes something"


Jobs.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestJobs = Jobs.TestCase

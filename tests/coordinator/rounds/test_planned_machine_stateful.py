"""Whatever happens to a planned job, in whatever order: its machine stays sound, survives restarts, and its events lead to it again."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fleetune.coordinator.domain import ENDED, Candidate, Failure, FoldOutcome, LinkFigures, PlanSettings, Update
from fleetune.coordinator.history import replay
from fleetune.coordinator.history.facts import Happened, JobHistory, RoundRow
from fleetune.coordinator.rounds import machine as m
from fleetune.coordinator.rounds import planning
from fleetune.coordinator.store import records
from support.machines import blob
from support.planned_machines import PlanDesk, figures

NAMES = ["a", "b", "c", "d", "e"]
names = st.sampled_from(NAMES)
kinds = st.sampled_from(["measure", "train"])


def candidate(name: str, up_mbps: int) -> Candidate:
    return Candidate(f"id-{name}", name, link=LinkFigures(up_mbps * 1e6, 1e7, 0.01))


class PlannedJobs(RuleBasedStateMachine):
    @initialize(
        minimum=st.integers(1, 3),
        per_round=st.integers(0, 4),
        quorum=st.sampled_from([0.25, 0.6, 1.0]),
        deadline_s=st.sampled_from([0.0, 40.0]),
        layout=st.sampled_from(["blocks", "depth", "data-parallel", "single", "auto"]),
        factor=st.sampled_from([0.0, 1.5]),
        spares=st.booleans(),
        rotate=st.integers(0, 2),
        airtime=st.booleans(),
    )
    def begin(self, layout: Any, factor: float, spares: bool, rotate: int, airtime: bool, **changes: Any) -> None:
        made = PlanSettings(
            layout=layout,
            rows=8,
            deadline_factor=factor,
            spares=spares,
            rotate_rounds=rotate,
            resource="airtime" if airtime else "ingress",
            uplink_bits_per_s=0.0 if airtime else 2e6,
        )
        self.desk = PlanDesk(made, rounds=4, **changes)
        self.desk.hold = True
        self.asked: list[m.PlanRound] = []
        self.events: list[Happened] = []
        self.rounds: list[RoundRow] = []
        self.lease = 0
        self._do(m.Started())
        self.desk.do = self._do  # type: ignore[method-assign]  # so that `prepare` is recorded, too
        self.desk.prepare()

    def _do(self, event: m.Event) -> Any:
        commands = self.desk.machine.handle(event, self.desk.now)
        if commands or not isinstance(event, m.Ticked | m.Offered | m.Planned):  # as the engine writes them
            self.events.append(Happened(len(self.events), self.desk.now, event))
        for command in commands:
            if isinstance(command, m.SendTask):
                assert command.lease > self.lease, "leases only grow"
                self.lease = command.lease
                assert (command.part is None) == (command.kind != "train")
                if command.part is not None:
                    assert command.part.device_id == command.device_id
            elif isinstance(command, m.PlanRound):
                self.asked.append(command)
                assert command.request.candidates
            elif isinstance(command, m.CommitRound):
                record = copy.deepcopy(command.entry)
                assert record.state is not None
                self.rounds.append(RoundRow(record.number, record.state.digest, record.state.size_bytes, record))
            elif isinstance(command, m.Fold):
                entry = self.desk.machine.round
                assert entry is not None
                assert entry.plan is not None
                assert {c.device_id for c in command.contributions} <= {part.device_id for part in entry.plan.parts}
        return commands

    def _open(self, name: str, kind: str) -> str | None:
        entry = self.desk.machine.round
        tasks = [*self.desk.machine.newcomers.values(), *(entry.tasks.values() if entry is not None else ())]
        return next((t.task_id for t in tasks if t.device_name == name and t.kind == kind), None)

    @rule(steps=st.integers(1, 6))
    def goes_well(self, steps: int) -> None:
        """What would happen next if nothing went wrong: else few examples would ever train."""
        for _ in range(steps):
            machine = self.desk.machine
            entry = machine.round
            if machine.status == "paused":
                self._do(m.ResumeRequested())
            elif machine.status == "waiting":
                self._do(m.Offered(tuple(candidate(name, 1) for name in NAMES)))
            elif entry is None:
                return
            elif machine.seeking:
                self.spares_are_told(set(NAMES) - {part.device_id[3:] for part in entry.plan.parts} if entry.plan else set(), 1)
            elif any(task.status == "assigned" and task.kind == "measure" for task in entry.tasks.values()):
                self.all_tell(1.0)
            elif entry.phase == "measuring":
                self.plan_comes(set(), 1)
            elif entry.phase == "training":
                self.all_updates_arrive()
            else:
                self.fold_ends()

    @rule(asked=st.sets(names, min_size=1), up_mbps=st.integers(0, 3))
    def offer(self, asked: set[str], up_mbps: int) -> None:
        self._do(m.Offered(tuple(candidate(name, up_mbps) for name in sorted(asked))))

    @rule(name=names, speed=st.sampled_from([0.5, 1.0, 4.0]), held=st.integers(0, 3), depths=st.sampled_from([3, 3, 3, 2]))
    def device_tells(self, name: str, speed: float, held: int, depths: int) -> None:
        if (task := self._open(name, "measure")) is not None:
            self._do(m.FiguresArrived(task, figures(speed, held, depths)))

    @rule(speed=st.sampled_from([1.0, 2.0]))
    def all_tell(self, speed: float) -> None:
        for number, name in enumerate(NAMES):
            self.device_tells(name, speed, min(3, 1 + number), 3)

    @rule(away=st.sets(names, max_size=2), stale=st.integers(0, 4))
    def plan_comes(self, away: set[str], stale: int) -> None:
        if not self.asked:
            return
        command = self.asked[-1] if stale else self.asked[0]
        made = planning.plan_round(command.request)
        gone = frozenset(f"id-{name}" for name in away)
        self._do(m.Planned(command.asked, None if isinstance(made, str) else made, made if isinstance(made, str) else "", gone))

    @rule(free=st.sets(names), number=st.integers(0, 4))
    def spares_are_told(self, free: set[str], number: int) -> None:
        entry = self.desk.machine.round
        self._do(m.SparesOffered(entry.number if entry and number else number, tuple(candidate(name, 1) for name in sorted(free))))

    @rule(name=names, told=st.booleans(), ready_s=st.sampled_from([0.0, 3.0, 50.0]))
    def update_arrives(self, name: str, told: bool, ready_s: float) -> None:
        if (task := self._open(name, "train")) is not None:
            made = Update(blob(task[-30:]), 8, kind="gradient", ready_s=ready_s, sent_s=1.0, figures=figures(2.0) if told else None)
            self._do(m.UpdateArrived(task, made))

    @rule()
    def all_updates_arrive(self) -> None:
        for name in NAMES:
            self.update_arrives(name, told=True, ready_s=5.0)

    @rule(name=names, stale=st.booleans())
    def update_turns_out_damaged(self, name: str, stale: bool) -> None:
        if (task := self._open(name, "train")) is not None:
            entry = self.desk.machine.open_task(task)
            self._do(m.UpdateDamaged(task, entry.lease if entry and not stale else 0, online=True))

    @rule(name=names, kind=kinds, why=st.sampled_from(["crash", "out_of_memory", "data"]))
    def task_fails(self, name: str, kind: str, why: Any) -> None:
        if (task := self._open(name, kind)) is not None:
            self._do(m.TaskFailed(task, Failure(why, kind, "x")))

    @rule(name=names, kind=kinds)
    def task_is_refused(self, name: str, kind: str) -> None:
        if (task := self._open(name, kind)) is not None:
            self._do(m.TaskRefused(task, "busy"))

    @rule(name=names)
    def offline(self, name: str) -> None:
        self._do(m.DeviceOffline(f"id-{name}"))

    @rule(name=names)
    def online(self, name: str) -> None:
        self._do(m.DeviceOnline(f"id-{name}", frozenset()))

    @rule()
    def fold_ends(self) -> None:
        entry = self.desk.machine.round
        if entry is not None and entry.phase == "folding":
            self._do(m.Folded(entry.number, FoldOutcome(blob(f"s{entry.number}")), ()))

    @rule(seconds=st.sampled_from([0.5, 16.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.desk.now += seconds
        self._do(m.Ticked())

    @rule(pause=st.booleans())
    def operator(self, pause: bool) -> None:
        self._do(m.PauseRequested() if pause else m.ResumeRequested())

    @rule(chance=st.integers(0, 19))
    def cancel(self, chance: int) -> None:
        if chance == 0:
            self._do(m.CancelRequested("x"))

    @rule()
    def restart(self) -> None:
        text = records.dump_machine(self.desk.machine)
        self.desk.machine = records.load_machine(text)
        assert records.dump_machine(self.desk.machine) == text
        self._do(m.Restarted())

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "desk"):
            return
        machine = self.desk.machine
        machine.validate()
        if machine.status in ENDED:
            assert machine.round is None
            assert not machine.busy_devices()
        due = machine.next_deadline_unix_s()
        if due is not None and due <= self.desk.now:
            before = records.dump_machine(machine)
            self._do(m.Ticked())
            assert records.dump_machine(machine) != before, "a deadline that has passed changes something"

    def teardown(self) -> None:
        if hasattr(self, "desk"):
            found = [
                violation
                for violation in replay.violations(
                    JobHistory("job", self.desk.machine.status, "", self.desk.machine, self.rounds, events=self.events)
                )
                if violation.rule == "replay_differs"
            ]
            assert not found, found


PlannedJobs.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestPlannedJobs = PlannedJobs.TestCase

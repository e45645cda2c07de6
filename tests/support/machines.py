"""A round machine on a desk: a plan with defaults, a clock that is moved by hand, and short words for what happens to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from fleetune.coordinator.domain import (
    Blob,
    Candidate,
    Evaluation,
    Failure,
    FailureKind,
    FoldOutcome,
    JobStatus,
    Metrics,
    Phase,
    Prepared,
    Update,
)
from fleetune.coordinator.rounds import machine as m
from fleetune.coordinator.rounds.machine import Command, Event, JobMachine, JobPlan

C = TypeVar("C")

PLAN = JobPlan(
    job_id="job",
    rounds=3,
    minimum=1,
    per_round=0,
    quorum=0.5,
    deadline_s=0.0,
    wait_s=0.0,
    seed=0,
    evaluation="none",
    evaluate_every=1,
    metric="accuracy",
    patience=0,
    min_delta=0.0,
    absent_grace_s=15.0,
)


def blob(word: str) -> Blob:
    """A stand-in address; equal words are equal blobs."""
    return Blob(word.encode().hex().ljust(64, "0")[:64], 100)


def devices(*names: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(f"id-{name}", name) for name in names)


class Desk:
    """One job's machine; `now` is moved by the test."""

    def __init__(self, **changes: object) -> None:
        self.machine = JobMachine(replace(PLAN, **changes))  # type: ignore[arg-type]  # checked by the dataclass's own names
        self.now = 1000.0

    def status(self) -> JobStatus:
        return self.machine.status

    def phase(self) -> Phase | None:
        """Of the open round."""
        return self.machine.round.phase if self.machine.round is not None else None

    def do(self, event: Event) -> list[Command]:
        return self.machine.handle(event, self.now)

    def prepare(self) -> list[Command]:
        commands = self.do(m.Started())
        return commands + self.do(m.PreparedEvent(Prepared(blob("state 0"), "t" * 64)))

    def open(self, *names: str) -> list[m.SendTask]:
        """Prepare if need be, and open a round with these devices."""
        if self.machine.status == "queued":
            self.prepare()
        return only(self.do(m.Offered(devices(*names))), m.SendTask)

    def task(self, name: str, kind: str = "train") -> str:
        """Id of the device's newest task of the open round."""
        assert self.machine.round is not None
        found = [t.task_id for t in self.machine.round.tasks.values() if t.device_id == f"id-{name}" and t.kind == kind]
        return found[-1]

    def update(self, name: str, samples: int = 1, metrics: Metrics | None = None) -> list[Command]:
        assert self.machine.round is not None
        made = Update(blob(f"{name} {self.machine.round.number}"), samples, metrics or {})
        return self.do(m.UpdateArrived(self.task(name), made))

    def measured(self, name: str, rows: int = 10, **metrics: float) -> list[Command]:
        return self.do(m.EvaluationArrived(self.task(name, "evaluate"), Evaluation(metrics, rows)))

    def fail(self, name: str, kind: FailureKind = "crash", task_kind: str = "train") -> list[Command]:
        return self.do(m.TaskFailed(self.task(name, task_kind), Failure(kind, "train", f"{name} {kind}")))

    def refuse(self, name: str) -> list[Command]:
        return self.do(m.TaskRefused(self.task(name), "on battery"))

    def fold(self, *evaluators: str) -> list[Command]:
        assert self.machine.round is not None
        number = self.machine.round.number
        return self.do(m.Folded(number, FoldOutcome(blob(f"state {number}")), devices(*evaluators)))

    def commit(self, *names: str) -> list[Command]:
        """A whole round without evaluation."""
        self.open(*names)
        for name in names:
            self.update(name)
        return self.fold()

    def after(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self.do(m.Ticked())


def only(commands: Iterable[Command], kind: type[C]) -> list[C]:
    return [command for command in commands if isinstance(command, kind)]

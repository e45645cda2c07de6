"""What has happened since the start, counted: the engine tells of each group of events once it is committed. Pure."""

from __future__ import annotations

import bisect
import logging
from dataclasses import dataclass, field
from typing import get_args

from fleetune.coordinator.domain import ENDED, FailureKind, RoundEntry, TaskKind
from fleetune.coordinator.metrics.catalog import DURATION_BOUNDS_S, PHASES
from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.batch import Batch
from fleetune.coordinator.rounds.job import LiveJob

log = logging.getLogger("fleetune.metrics")

_PHASE_OF: dict[TaskKind, str] = {"measure": "measuring", "train": "training", "evaluate": "evaluating"}

Key = tuple[str, tuple[str, ...]]
"""A metric's name and its labels' values."""


@dataclass
class Histogram:
    """Counts of values up to each bound, the last of all others."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BOUNDS_S) + 1))
    total: float = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(DURATION_BOUNDS_S, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        return Histogram(list(self.counts), self.total)


@dataclass(frozen=True)
class Paired:
    """What a round was expected to take, and what it took."""

    predicted_s: float
    measured_s: float


@dataclass
class _Open:
    """The open round of a job, as far as its durations go."""

    number: int
    phase: str
    since_unix_s: float
    sent: set[str] = field(default_factory=set[str])


@dataclass
class Tally:
    """Written on the event loop alone, by `committed`."""

    counters: dict[Key, float] = field(default_factory=dict[Key, float])
    histograms: dict[Key, Histogram] = field(default_factory=dict[Key, Histogram])
    moved_unix_s: dict[str, float] = field(default_factory=dict[str, float])
    """Open job -> when the engine last decided on an event of it."""
    paired: dict[str, Paired] = field(default_factory=dict[str, Paired])
    """Open job -> its last round that had a prediction."""
    _rounds: dict[str, _Open] = field(default_factory=dict[str, _Open])

    def __post_init__(self) -> None:
        # At 0 from the start: Prometheus sees no increase in a series whose first value it meets is 1.
        known: dict[str, tuple[str, ...]] = {
            "jobs_ended": tuple(sorted(ENDED)),
            "tasks_sent": get_args(TaskKind),
            "tasks_resent": get_args(TaskKind),
            "task_failures": get_args(FailureKind),
            "updates": ("accepted", "late", "damaged"),
        }
        for name in ("rounds_committed", "rounds_abandoned", "task_refusals"):
            self._add(name, count=0)
        for name, words in known.items():
            for word in words:
                self._add(name, word, count=0)
        self.histograms["fleetune_round_duration_seconds", ()] = Histogram()
        for phase in PHASES:
            self.histograms["fleetune_round_phase_duration_seconds", (phase,)] = Histogram()

    def committed(self, batch: Batch) -> None:
        """Count what a committed group of events holds. Raises nothing: the engine's loop must not end for a figure."""
        try:
            self._count(batch)
        except Exception:  # whatever it is, it is a bug of the counting alone
            log.exception("events were not counted")

    def _count(self, batch: Batch) -> None:
        if not batch.events:
            return
        now = batch.events[-1].unix_s
        for row in batch.events:
            self.moved_unix_s[row.job_id] = row.unix_s
            match row.event:
                case machine.UpdateArrived():
                    self._add("updates", "accepted")
                case machine.UpdateLate():
                    self._add("updates", "late")
                case machine.UpdateDamaged():
                    self._add("updates", "damaged")
                case machine.TaskFailed(_, failure):
                    self._add("task_failures", failure.kind)
                case machine.TaskRefused():
                    self._add("task_refusals")
                case _:
                    pass
        for job, command in batch.commands:
            self._follow(job, command, now)
        for job_id in [job_id for job_id, job in batch.jobs.items() if job.ended]:
            self.moved_unix_s.pop(job_id, None)  # a late update of a job that has ended moves nothing

    def _follow(self, job: LiveJob, command: machine.Command, now: float) -> None:
        """Count a command and tell by it in which phase the job's round is."""
        match command:
            case machine.SendTask(task_id, _, kind, number):
                open_ = self._open(job, number, now)
                self._add("tasks_sent", kind)
                if task_id in open_.sent:
                    self._add("tasks_resent", kind)
                open_.sent.add(task_id)
                self._enter(open_, _PHASE_OF[kind], now)
            case machine.PlanRound(_, request):
                self._enter(self._open(job, request.round_number, now), "measuring", now)
            case machine.Fold(number):
                self._enter(self._open(job, number, now), "folding", now)
            case machine.EvaluateHeldout(number):
                self._enter(self._open(job, number, now), "evaluating", now)
            case machine.CommitRound(entry):
                self._enter(self._open(job, entry.number, now), "", now)
                self._rounds.pop(job.job_id, None)
                taken_s = max(0.0, entry.ended_unix_s - entry.started_unix_s)
                self._add("rounds_committed")
                self.histograms["fleetune_round_duration_seconds", ()].observe(taken_s)
                if job.predicted_round is not None and job.predicted_round[0] == entry.number:
                    self.paired[job.job_id] = Paired(job.predicted_round[1], taken_s)
            case machine.AbandonRound():
                self._rounds.pop(job.job_id, None)
                self._add("rounds_abandoned")
            case machine.EndJob(status):
                self._add("jobs_ended", status)
                for kept in (self._rounds, self.moved_unix_s, self.paired):
                    kept.pop(job.job_id, None)
            case _:
                pass

    def _open(self, job: LiveJob, number: int, now: float) -> _Open:
        open_ = self._rounds.get(job.job_id)
        if open_ is None or open_.number != number:
            open_ = _Open(number, *_first_phase(job.machine.round, number, now))
            self._rounds[job.job_id] = open_
        return open_

    def _enter(self, open_: _Open, phase: str, now: float) -> None:
        """The round is in `phase` from now on; a phase of no name was not seen to begin and is not counted."""
        # A repeated train task of a damaged update begins no new training: its round goes back from folding.
        if open_.phase == phase:
            return
        if open_.phase:
            self.histograms["fleetune_round_phase_duration_seconds", (open_.phase,)].observe(max(0.0, now - open_.since_unix_s))
        open_.phase, open_.since_unix_s = phase, now

    def _add(self, name: str, *labels: str, count: float = 1) -> None:
        key = (f"fleetune_{name}_total", labels)
        self.counters[key] = self.counters.get(key, 0) + count


def _first_phase(entry: RoundEntry | None, number: int, now: float) -> tuple[str, float]:
    """In which phase a round is that is met for the first time, and since when. No phase where its beginning was not seen.

    Of a round that a restart went on with, the first phase is known from the machine's own record.
    """
    first = "measuring" if entry is not None and entry.plan is not None else "training"
    if entry is not None and entry.number == number and entry.phase in (first, "measuring"):
        return entry.phase, entry.started_unix_s
    return "", now

"""What is counted of the engine's events, and how long a round's phases took."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import cast

import pytest

from fleetune.coordinator.domain import Blob, Failure, PlanRequest, PlanSettings, RoundEntry, TaskKind, Update
from fleetune.coordinator.metrics.tally import Histogram, Paired, Tally
from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.batch import Batch
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.store.records import EventRow

BLOB = Blob("00", 1)
TASK = "job/1/device-a"


class Machine:
    def __init__(self, round_: RoundEntry | None) -> None:
        self.round = round_


class Job:
    """As much of a live job as is looked at."""

    def __init__(self, round_: RoundEntry | None = None, predicted: tuple[int, float] | None = None) -> None:
        self.job_id = "job"
        self.machine = Machine(round_)
        self.predicted_round = predicted


def batch(job: Job, now: float, *commands: machine.Command, event: machine.Event | None = None) -> Batch:
    row = EventRow(now, "job", event or machine.Ticked())
    return Batch(events=[row], commands=[(cast(LiveJob, job), command) for command in commands])


def sent(task_id: str = TASK, kind: TaskKind = "train") -> machine.SendTask:
    return machine.SendTask(task_id, "device-a", kind, 1, 1, BLOB, 0.0)


def phase(tally: Tally, name: str) -> Histogram:
    return tally.histograms["fleetune_round_phase_duration_seconds", (name,)]


def count(tally: Tally, name: str, *labels: str) -> float:
    return tally.counters[f"fleetune_{name}_total", labels]


def test_every_phase_of_a_round_is_timed() -> None:
    tally, entry = Tally(), RoundEntry(1, "training", 100.0, ended_unix_s=118.0)
    job = Job(entry)
    tally.committed(batch(job, 100.0, sent()))
    tally.committed(batch(job, 110.0, machine.Fold(1, BLOB, None, ())))
    tally.committed(batch(job, 113.0, sent("job/1/device-b", "evaluate")))
    tally.committed(batch(job, 118.0, machine.CommitRound(entry)))
    assert [phase(tally, name).total for name in ("training", "folding", "evaluating")] == [10.0, 3.0, 5.0]
    assert tally.histograms["fleetune_round_duration_seconds", ()].total == 18.0
    assert count(tally, "rounds_committed") == 1


def test_of_a_round_that_a_restart_went_on_with_the_training_counts_from_its_own_record() -> None:
    tally, entry = Tally(), RoundEntry(1, "training", 50.0)
    tally.committed(batch(Job(entry), 100.0, sent()))
    tally.committed(batch(Job(entry), 110.0, machine.Fold(1, BLOB, None, ())))
    assert phase(tally, "training").total == 60.0


def test_of_a_planned_round_measuring_and_planning_are_a_phase_of_their_own() -> None:
    tally, entry = Tally(), RoundEntry(1, "measuring", 100.0)
    request = PlanRequest(PlanSettings(), 1, 0, (), 1, (), {}, {}, ())
    tally.committed(batch(Job(entry), 100.0, sent(kind="measure")))
    tally.committed(batch(Job(entry), 104.0, machine.PlanRound(1, request)))
    tally.committed(batch(Job(replace(entry, phase="training")), 105.0, sent()))
    tally.committed(batch(Job(replace(entry, phase="folding")), 115.0, machine.Fold(1, BLOB, None, ())))
    assert [phase(tally, name).total for name in ("measuring", "training")] == [5.0, 10.0]
    assert count(tally, "tasks_sent", "measure") == 1


def test_an_abandoned_round_is_counted_and_its_number_begins_anew() -> None:
    tally, entry = Tally(), RoundEntry(1, "training", 100.0)
    tally.committed(batch(Job(entry), 100.0, sent()))
    tally.committed(batch(Job(), 200.0, machine.AbandonRound(entry, "why")))
    again = RoundEntry(1, "training", 300.0)
    tally.committed(batch(Job(again), 300.0, sent()))
    tally.committed(batch(Job(again), 301.0, machine.Fold(1, BLOB, None, ())))
    assert count(tally, "rounds_abandoned") == 1
    assert count(tally, "tasks_resent", "train") == 0
    assert phase(tally, "training").total == 1.0


def test_a_task_that_is_given_twice_in_a_round_is_a_repeat() -> None:
    tally, job = Tally(), Job(RoundEntry(1, "training", 100.0))
    tally.committed(batch(job, 100.0, sent()))
    tally.committed(batch(job, 105.0, sent()))
    assert (count(tally, "tasks_sent", "train"), count(tally, "tasks_resent", "train")) == (2, 1)


def test_updates_failures_and_refusals_are_counted_by_kind() -> None:
    tally, job = Tally(), Job()
    for event in (
        machine.UpdateArrived(TASK, Update(BLOB, 1)),
        machine.UpdateLate(TASK, "00"),
        machine.UpdateDamaged(TASK, 1),
        machine.TaskFailed(TASK, Failure("out_of_memory", "train", "no room")),
        machine.TaskRefused(TASK, "on battery"),
    ):
        tally.committed(batch(job, 100.0, event=event))
    assert [count(tally, "updates", outcome) for outcome in ("accepted", "late", "damaged")] == [1, 1, 1]
    assert count(tally, "task_failures", "out_of_memory") == 1
    assert count(tally, "task_failures", "crash") == 0, "kinds that did not happen stand at 0 from the start"
    assert count(tally, "task_refusals") == 1


def test_a_prediction_stands_beside_what_its_round_took() -> None:
    tally, entry = Tally(), RoundEntry(1, "training", 100.0, ended_unix_s=130.0)
    tally.committed(batch(Job(entry, predicted=(1, 25.0)), 130.0, machine.CommitRound(entry)))
    assert tally.paired == {"job": Paired(25.0, 30.0)}
    unplanned = RoundEntry(2, "training", 130.0, ended_unix_s=140.0)
    tally.committed(batch(Job(unplanned, predicted=(1, 25.0)), 140.0, machine.CommitRound(unplanned)))
    assert tally.paired == {"job": Paired(25.0, 30.0)}, "an older prediction is none of this round"


def test_nothing_is_kept_of_a_job_that_has_ended() -> None:
    tally, entry = Tally(), RoundEntry(1, "training", 100.0, ended_unix_s=130.0)
    tally.committed(batch(Job(entry, predicted=(1, 25.0)), 100.0, sent()))
    tally.committed(batch(Job(None, predicted=(1, 25.0)), 130.0, machine.CommitRound(entry), machine.EndJob("completed")))
    assert not tally.paired and not tally.moved_unix_s
    assert count(tally, "jobs_ended", "completed") == 1


def test_a_bug_in_the_counting_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        Tally().committed(cast(Batch, None))
    assert "not counted" in caplog.text


def test_a_value_falls_into_the_first_bound_that_holds_it() -> None:
    histogram = Histogram()
    for value in (0.0, 0.1, 0.2, 1e9):
        histogram.observe(value)
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-1]) == (2, 1, 1)

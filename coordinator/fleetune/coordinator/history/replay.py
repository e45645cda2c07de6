"""The table of events played through the round machine once more, and compared with what is stored."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace

from fleetune.coordinator.domain import RoundEntry
from fleetune.coordinator.history.facts import Happened, JobHistory, Violation
from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.machine import JobMachine

FOR_PEOPLE = frozenset({"message", "retry_unix_s"})
"""What an event that was not worth a row may change: an offer of too few devices rewrites what the job waits for, time passes."""


def violations(job: JobHistory) -> Iterator[Violation]:
    """Every event that was not the machine's to take, then every difference to what is stored."""
    state = JobMachine(job.machine.plan)
    commits: dict[int, RoundEntry] = {}
    lease = 0
    for item in job.events:
        yield from _in_time(job.job_id, state, item)
        try:
            commands = state.handle(item.event, item.unix_s)
        except AssertionError as error:
            message = f"event {item.sequence}, {type(item.event).__name__}, breaks an invariant: {error}"
            yield Violation("illegal_event", job.job_id, state.committed + 1, message)
            return
        for command in commands:
            if isinstance(command, machine.SendTask):
                if command.lease <= lease:
                    message = f"{command.task_id} got lease {command.lease} after lease {lease} was given"
                    yield Violation("lease_not_grown", job.job_id, command.round_number, message)
                lease = max(lease, command.lease)
            elif isinstance(command, machine.CommitRound):
                commits[command.entry.number] = copy.deepcopy(command.entry)
    yield from _leases(job)
    yield from _compared(job, state, commits)


def _in_time(job_id: str, state: JobMachine, item: Happened) -> Iterator[Violation]:
    """A result is of an open task, a fold or a measurement of the open round; anything of a committed round is too late."""
    match item.event:
        case (
            machine.UpdateArrived(task_id) | machine.EvaluationArrived(task_id) | machine.TaskFailed(task_id) | machine.TaskRefused(task_id)
        ):
            entry = state.open_task(task_id)
            if entry is not None and entry.status == "assigned":
                return
            number = int(task_id.split("/")[1])
        case machine.Folded(number) | machine.HeldoutEvaluated(number):
            if number > state.committed:
                return
        case _:
            return
    kind = type(item.event).__name__
    if number <= state.committed:
        yield Violation("event_after_commit", job_id, number, f"event {item.sequence}, {kind}, came after the round's commit")
    else:
        yield Violation("illegal_event", job_id, number, f"event {item.sequence}, {kind}, is of no open task")


def _leases(job: JobHistory) -> Iterator[Violation]:
    """Those of a round are above those of the rounds before it; no two tasks share one."""
    before = 0
    entries = [row.entry for row in job.rounds] + ([job.machine.round] if job.machine.round is not None else [])
    for entry in entries:
        leases = [task.lease for task in entry.tasks.values()]
        if leases and (min(leases) <= before or len(set(leases)) < len(leases)):
            message = f"its tasks have leases {min(leases)} to {max(leases)}, {before} was the last one before"
            yield Violation("lease_not_grown", job.job_id, entry.number, message)
        before = max(leases, default=before)


def _compared(job: JobHistory, state: JobMachine, commits: dict[int, RoundEntry]) -> Iterator[Violation]:
    stored = {row.number: row.entry for row in job.rounds}
    for number in sorted(commits.keys() | stored.keys()):
        mine, theirs = commits.get(number), stored.get(number)
        if mine is None or theirs is None:
            said = "was committed by the events and is not stored" if theirs is None else "is stored and was committed by no event"
            yield Violation("replay_differs", job.job_id, number, f"the round {said}")
        elif mine != theirs:
            names = [field.name for field in fields(RoundEntry) if getattr(mine, field.name) != getattr(theirs, field.name)]
            yield Violation("replay_differs", job.job_id, number, f"the events give another {', '.join(names)} than is stored")
    if replace(state, message="", retry_unix_s=0.0) != replace(job.machine, message="", retry_unix_s=0.0):
        names = [field.name for field in fields(JobMachine) if field.name not in FOR_PEOPLE]
        wrong = [name for name in names if getattr(state, name) != getattr(job.machine, name)]
        yield Violation("replay_differs", job.job_id, 0, f"the events lead to a machine with another {', '.join(wrong)} than is stored")

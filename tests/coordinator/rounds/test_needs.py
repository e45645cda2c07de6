"""What jobs need is never among what may go, whatever the jobs, their rounds and what guards them."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator.domain import Blob, Prepared, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds import needs
from fleetune.coordinator.rounds.history import History
from fleetune.coordinator.rounds.machine import JobMachine
from fleetune.coordinator.rounds.needs import JobFacts, Trim
from support.machines import PLAN

WORDS = [f"{number:02x}" * 32 for number in range(24)]
digests = st.sampled_from(WORDS)
blobs = st.builds(Blob, digests, st.integers(1, 9))
maybe = st.none() | blobs


def _entry(number: int, parts: tuple[Any, ...]) -> RoundEntry:
    start, state, optimizer, updates = parts
    entry = RoundEntry(number, "training", 0.0, start_state=start, state=state, optimizer=optimizer)
    for index, update in enumerate(updates):
        status: Any = "done" if update else "assigned"
        task = TaskEntry(f"job/{number}/d{index}/train", f"d{index}", f"n{index}", "train", index + 1, status)
        task.update = Update(update, 1) if update else None
        entry.tasks[task.task_id] = task
    return entry


rounds = st.tuples(maybe, maybe, maybe, st.lists(maybe, max_size=3))


@st.composite
def facts(draw: Any, name: str = "job") -> JobFacts:
    machine = JobMachine(PLAN)
    machine.status = draw(st.sampled_from(["queued", "waiting", "running", "paused", "completed", "failed", "cancelled"]))
    history = [_entry(i + 1, draw(rounds)) for i in range(draw(st.integers(0, 5)))]
    machine.committed = len(history)
    machine.best_round = draw(st.integers(0, len(history)))
    machine.state, machine.optimizer = draw(maybe), draw(maybe)
    machine.ended_unix_s = draw(st.floats(0, 1000))
    if draw(st.booleans()):
        machine.prepared = Prepared(draw(blobs), "t", files=tuple(("f", b.digest, b.size_bytes) for b in draw(st.lists(blobs, max_size=3))))
    if machine.status == "running":
        machine.round = _entry(len(history) + 1, draw(rounds))
    return JobFacts(name + draw(st.sampled_from("abc")), machine, History.of(history, range(100)), draw(st.integers(0, 4)))


jobs_of = st.lists(facts(), max_size=4)


def _last_and_best(job: JobFacts) -> set[str]:
    numbers = {job.machine.committed, job.machine.best_round} - {0}
    return {state.digest for n in numbers if (entry := job.history.get(n)) is not None and (state := entry.state) is not None}


def _running(job: JobFacts) -> set[str]:
    """Written out once more, on purpose without the code under test."""
    if job.machine.status in ("completed", "failed", "cancelled"):
        return set()
    found = {b.digest for b in (job.machine.state, job.machine.optimizer) if b is not None}
    if job.machine.prepared is not None:
        found |= {digest for _, digest, _ in job.machine.prepared.files}
    if (entry := job.machine.round) is not None:
        found |= {b.digest for b in (entry.start_state, entry.state, entry.optimizer) if b is not None}
        found |= {task.update.blob.digest for task in entry.tasks.values() if task.update is not None}
    return found


@settings(max_examples=400, deadline=None)
@given(jobs=jobs_of, there=st.sets(digests), held=st.sets(digests), incoming=st.sets(digests))
def test_what_a_job_needs_or_something_guards_is_never_doomed(
    jobs: list[JobFacts], there: set[str], held: set[str], incoming: set[str]
) -> None:
    doomed = needs.doomed(there, jobs, held, incoming)
    for job in jobs:
        assert not doomed & _running(job)
        assert not doomed & _last_and_best(job)
    assert not doomed & (held | incoming)
    assert doomed <= there
    assert doomed | (there & (needs.needed(jobs) | held | incoming)) == there, "and all the rest goes"


@settings(max_examples=200, deadline=None)
@given(jobs=jobs_of, keep=st.integers(1, 4), before=st.floats(0, 1000), numbers=st.sets(st.integers(1, 6)))
def test_trimming_touches_neither_running_jobs_nor_last_and_best(jobs: list[JobFacts], keep: int, before: float, numbers: set[int]) -> None:
    trimmed = needs.trimmed(jobs, Trim(keep, before))
    for job in jobs:
        if not job.ended or job.machine.ended_unix_s > before:
            assert job.job_id not in trimmed or any(other.ended and other.job_id == job.job_id for other in jobs if other is not job)
    for job in jobs:
        left = JobFacts(job.job_id, job.machine, job.history, trimmed.get(job.job_id, job.keep_rounds))
        assert _last_and_best(job) | _running(job) <= needs.needed([left])
        stale = needs.stale_folders([left], {job.job_id: numbers}).get(job.job_id, [])
        assert not {job.machine.committed, job.machine.best_round} & set(stale)
        assert not stale or job.ended


def test_without_a_wish_nothing_is_trimmed() -> None:
    machine = JobMachine(PLAN)
    machine.status, machine.committed = "completed", 5
    assert needs.trimmed([JobFacts("job", machine, History(), 3)], None) == {}
    assert needs.trimmed([JobFacts("job", machine, History(), 3)], Trim(1, 0.0)) == {"job": 1}
    assert needs.trimmed([JobFacts("job", machine, History(), 3)], Trim(4, 0.0)) == {}, "never more than before"

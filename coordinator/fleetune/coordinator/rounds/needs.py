"""Which blobs and round folders the jobs still stand on, and which of those that are there may go. Facts in, digests out; no I/O.

A job needs the states of the rounds it keeps (its last ones, its best, its final one); as long as it runs also its current state,
the optimiser's state, the base's files and everything of the open round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from fleetune.coordinator.domain import ENDED, Blob
from fleetune.coordinator.rounds.history import History
from fleetune.coordinator.rounds.machine import JobMachine


@dataclass(frozen=True)
class JobFacts:
    """What is to be known of a job: its machine, its committed rounds, and how many of the last ones it keeps."""

    job_id: str
    machine: JobMachine
    history: History
    keep_rounds: int

    @property
    def ended(self) -> bool:
        return self.machine.status in ENDED


@dataclass(frozen=True)
class Trim:
    """An operator's wish: ended jobs keep their last `keep_rounds` rounds, if they ended before `before_unix_s`."""

    keep_rounds: int
    before_unix_s: float


def kept_rounds(job: JobFacts) -> set[int]:
    """Rounds whose folder and state stay: the last ones, the best one, always the latest."""
    return kept_numbers(job.machine, job.keep_rounds)


def kept_numbers(machine: JobMachine, keep_rounds: int) -> set[int]:
    """As `kept_rounds`, for a job that keeps its last `keep_rounds` rounds."""
    committed = machine.committed
    last = range(max(1, committed - max(1, keep_rounds) + 1), committed + 1)
    return {*last, machine.best_round} - {0}


def kept_states(job: JobFacts) -> dict[str, Blob]:
    """What the kept rounds have published, by digest: their states, or the adapters made of them."""
    entries = (job.history.get(number) for number in sorted(kept_rounds(job)))
    return {blob.digest: blob for entry in entries if entry is not None and (blob := entry.published) is not None}


def running_states(job: JobFacts) -> dict[str, Blob]:
    """What a running job computes with, by digest: its states and those of its open round; nothing of an ended job."""
    if job.ended:
        return {}
    blobs = [job.machine.state, job.machine.optimizer]
    if (entry := job.machine.round) is not None:
        blobs += [entry.start_state, entry.state, entry.optimizer, entry.adapter]
    return {blob.digest: blob for blob in blobs if blob is not None}


def fresh_states(job: JobFacts) -> dict[str, Blob]:
    """What the fold of a round in evaluation has made, by digest, unless it also is what the round began with: it can be made again."""
    entry = job.machine.round
    if job.ended or entry is None or entry.phase != "evaluating":
        return {}
    older = {blob.digest for blob in (job.machine.state, job.machine.optimizer, entry.start_state) if blob is not None}
    made = (entry.state, entry.optimizer, entry.adapter)
    return {blob.digest: blob for blob in made if blob is not None and blob.digest not in older}


def open_updates(job: JobFacts) -> dict[str, Blob]:
    """The accepted updates of the open round by digest."""
    entry = job.machine.round
    if job.ended or entry is None:
        return {}
    return {task.update.blob.digest: task.update.blob for task in entry.trained() if task.update is not None}


def base_files(job: JobFacts) -> dict[str, Blob]:
    """The base's files that devices of a running job may still fetch, by digest."""
    prepared = job.machine.prepared
    if job.ended or prepared is None:
        return {}
    return {digest: Blob(digest, size_bytes) for _, digest, size_bytes in prepared.files}


def needed_by(job: JobFacts) -> dict[str, Blob]:
    """Every blob that the job stands on, by digest."""
    return {**kept_states(job), **running_states(job), **base_files(job), **open_updates(job)}


def needed(jobs: Iterable[JobFacts]) -> set[str]:
    """Digests that some job still stands on."""
    return {digest for job in jobs for digest in needed_by(job)}


def doomed(there: Iterable[str], jobs: Iterable[JobFacts], *guarded: AbstractSet[str]) -> set[str]:
    """Which of the blobs that are `there` may go: no job needs them and nothing guards them."""
    return set(there).difference(needed(jobs), *guarded)


def trimmed(jobs: Iterable[JobFacts], trim: Trim | None) -> dict[str, int]:
    """Job id -> rounds that it keeps from now on, for ended jobs that are to keep fewer than they do."""
    if trim is None:
        return {}
    old = (job for job in jobs if job.ended and job.machine.ended_unix_s <= trim.before_unix_s)
    return {job.job_id: trim.keep_rounds for job in old if 1 <= trim.keep_rounds < job.keep_rounds}


def stale_folders(jobs: Iterable[JobFacts], folders: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """Job id -> round folders of ended jobs beyond what they keep. Running jobs clear up after each round themselves."""
    kept = {job.job_id: kept_rounds(job) for job in jobs if job.ended}
    stale = {job_id: sorted(set(numbers) - kept[job_id]) for job_id, numbers in folders.items() if job_id in kept}
    return {job_id: numbers for job_id, numbers in stale.items() if numbers}


def open_task_ids(jobs: Iterable[JobFacts]) -> set[str]:
    """Tasks whose update may still be on its way."""
    return {
        task.task_id
        for job in jobs
        if not job.ended and job.machine.round is not None
        for task in job.machine.round.tasks.values()
        if task.status == "assigned" and task.kind == "train"
    }

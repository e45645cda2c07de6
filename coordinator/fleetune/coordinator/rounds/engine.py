"""The engine: the one writer of all jobs. Events in, one transaction, then the commands go out.

The simple version, a transaction per event, makes a round of N devices wait for N fsyncs of the database one after the other.
Here the loop takes every event that has arrived while the last transaction was written, lets the machines decide on all of them,
commits the lot at once and only then acts and answers. Under load the groups grow by themselves; alone, an event waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import shutil
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, ParamSpec, Protocol, TypeVar, cast

from google.protobuf.message import Message
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from fleetune.coordinator import jobfolders, jobspec, recipes
from fleetune.coordinator.domain import Blob, Candidate, Evaluation, Failure, FoldOutcome, Prepared, RoundEntry, TaskEntry, Update
from fleetune.coordinator.jobrules import is_folder
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.table import METHODS
from fleetune.coordinator.registry import Registry, Session
from fleetune.coordinator.rounds import adapter, aggregate, damage, machine, needs
from fleetune.coordinator.rounds.host import HostError, ModelHost, encode
from fleetune.coordinator.rounds.job import LiveJob, Progress, plan_of
from fleetune.coordinator.rounds.machine import JobMachine
from fleetune.coordinator.rounds.needs import JobFacts, Trim
from fleetune.coordinator.rounds.retention import Garbage, Retention, rounds_kept
from fleetune.coordinator.store import records
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.coordinator.store.db import Database
from fleetune.errors import DiskFullError, DurabilityError, FleetuneError, ModelError, WireError
from fleetune.wire import codec
from fleetune.workers import Workers

log = logging.getLogger("fleetune.engine")

P = ParamSpec("P")
T = TypeVar("T")

EVENTS_QUEUED_MAX = 100_000
"""Events waiting for the writer; a fleet that outruns it is slowed by its unanswered uploads long before."""

SAMPLES_MAX = 2**32
"""Rows of one update; the fold's weights must stay whole numbers in float64 whatever the number of devices."""

STALL_S = 900.0
"""A task whose stage and count have not moved for so long is taken for stuck. A step may take minutes on a small board."""

RECHECK_AFTER_S = 60.0
"""What was checked more recently than this is still in memory: to read it again would tell nothing about the disk, and take a part of
every short round."""

COMMIT_RETRY_S = 1.0

FOLD_RETRY_S = 2.0
"""A fold that found no room on the disk tries again after this."""

ReceiptStatus = Literal["accepted", "duplicate", "late", "refused"]


@dataclass(frozen=True)
class Receipt:
    status: ReceiptStatus
    reason: str = ""


@dataclass(frozen=True)
class Order:
    """A task as it leaves the engine for the transport."""

    command: machine.SendTask
    job: LiveJob
    payload: Message
    deadline_s: float


class Dispatcher(Protocol):
    """The transport's side: both calls return at once; a device that is not connected gets it when it is back."""

    def send_task(self, order: Order) -> None: ...

    def withdraw(self, device_id: str, task_id: str, reason: str) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What the engine must know of the coordinator's configuration."""

    state_dir: Path
    keep_rounds: int = 3
    parallel_jobs: int = 1
    absent_grace_s: float = 15.0
    stall_s: float = STALL_S


@dataclass
class _Item:
    job_id: str
    event: machine.Event
    answer: asyncio.Future[Receipt] | None = None


@dataclass
class _Batch:
    """What one transaction writes, and what follows it."""

    events: list[records.EventRow] = field(default_factory=list[records.EventRow])
    taken_back: list[str] = field(default_factory=list[str])
    """Tasks whose accepted update is damaged."""
    updates: list[records.UpdateRow] = field(default_factory=list[records.UpdateRow])
    blobs: list[records.BlobRow] = field(default_factory=list[records.BlobRow])
    rounds: list[tuple[str, RoundEntry]] = field(default_factory=list[tuple[str, RoundEntry]])
    failures: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    jobs: dict[str, LiveJob] = field(default_factory=dict[str, LiveJob])
    commands: list[tuple[LiveJob, machine.Command]] = field(default_factory=list[tuple[LiveJob, machine.Command]])
    answers: list[tuple[asyncio.Future[Receipt], Receipt]] = field(default_factory=list[tuple[asyncio.Future[Receipt], Receipt]])


_Deed = (
    machine.Prepare
    | machine.WithdrawTask
    | machine.Fold
    | machine.EvaluateHeldout
    | machine.CommitRound
    | machine.AbandonRound
    | machine.EndJob
)
"""Every command but SendTask, which needs to know what else is sent."""

_Assigned = dict[str, Mapping[str, Message]]
"""Job id -> what its method assigned to the devices of the open round."""


class Engine:
    """Owns every job. All its methods are called on the event loop; disk, fold and database work leave it."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        blobs: BlobStore,
        registry: Registry,
        host: ModelHost,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.jobs: dict[str, LiveJob] = {}
        self.registry = registry
        self.blobs = blobs
        self.stalled = ""
        """Why nothing is committed just now, for a person; empty while all is well."""
        self._no_room: dict[str, str] = {}
        """What waits for room on the disk -> why, for a person."""
        self._settings = settings
        self._database = database
        self._host = host
        self._wall = wall
        self._monotonic = monotonic
        self._dispatcher: Dispatcher | None = None
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(EVENTS_QUEUED_MAX)
        self._work: set[asyncio.Task[None]] = set()
        # One thread folds: it is bound by memory bandwidth, and two folds would only halve each other.
        self._folder = Workers("fold")
        self._disk = Workers("engine-disk", 2)
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._submitting = asyncio.Lock()
        self._scratch = settings.state_dir / "scratch"
        self.jobs_folder = settings.state_dir / "jobs"
        self.retention = Retention(blobs, database, self.jobs_folder, self._disk, self._all_facts, self._start_unless_closing, monotonic)
        self._fatal: DurabilityError | None = None

    # -- life

    def attach(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def open(self) -> None:
        """Load all jobs and go on with the open ones."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        self.jobs_folder.mkdir(exist_ok=True)
        for row in await self._database.read(records.load_jobs):
            spec = jobspec.parse(row.toml)
            job = self._live(row.job_id, spec, row.toml, row.submit_id, row.submitted_unix_s, row.machine)
            job.history = await self._database.read(functools.partial(records.load_rounds, job_id=row.job_id))
            job.keep_rounds = await self._database.read(
                functools.partial(rounds_kept, job_id=row.job_id, default=self._settings.keep_rounds)
            )
            self.jobs[row.job_id] = job
        for job in self.jobs.values():
            if ailment := await self._on_disk(damage.ailment, self.blobs, self.jobs_folder, damage.standing(self._facts(job))):
                self.post(job.job_id, machine.HostFailed("the check at start", Failure("internal", "storage", ailment)))
            if not job.ended:
                self.post(job.job_id, machine.Restarted())
                self._spawn(job, self._check_after_restart(job), f"check {job.job_id}")
            await self._on_disk(self._mend_folders, job)
            if job.ended:
                job.settled.set()
        await self.retention.sweep()

    async def settled(self, job: LiveJob) -> None:
        """Wait until the job has ended, its end is committed and its last folder is written."""
        await job.settled.wait()

    async def run(self) -> None:
        """The writer's loop; ends by cancellation."""
        while True:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            if self._fatal is not None:
                raise self._fatal
            self.retention.guard(self._facts(self.jobs[job_id]) for job_id in {item.job_id for item in items} if job_id in self.jobs)
            batch = self._decide(items)
            await self._commit(batch)
            self.retention.committed()
            self._act(batch)
            self._arm_timer()

    @property
    def trouble(self) -> str:
        """What of the disk holds work up just now, for a person; empty while there is room."""
        return self.stalled or next(iter(self._no_room.values()), "")

    def note_room(self, who: str, reason: str) -> None:
        """`who` waits for room because of `reason`, or no longer where that is empty. Wakes those who watch."""
        if self._no_room.get(who, "") == reason:
            return
        if reason:
            self._no_room[who] = reason
        else:
            del self._no_room[who]
        for job in self._open_jobs():
            job.touch()

    def give_up(self, error: DurabilityError) -> None:
        """A flush has failed: end `run`, and with it the process, before anything else is acknowledged."""
        self._fatal = DurabilityError(error.message, error.remedy)  # without the frames that it came through, and what they hold open
        self._wake()

    async def close(self) -> None:
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await self._host.close()
        self._folder.close()
        self._disk.close()

    # -- what operators ask

    async def submit(self, toml: str, submit_id: str) -> LiveJob:
        """Make a job. Raises JobFileError or DiskFullError; a known `submit_id` answers the job it made."""
        async with self._submitting:
            for job in self.jobs.values():
                if job.submit_id == submit_id:
                    return job
            return await self._submit(toml, submit_id)

    async def _submit(self, toml: str, submit_id: str) -> LiveJob:
        spec = await self.checked(toml)
        job_id = self._new_id(spec.name)
        now = self._wall()
        job = self._live(job_id, spec, toml, submit_id, now, JobMachine(plan_of(job_id, spec, self._settings.absent_grace_s)))
        row = records.JobRow(job_id, spec.name, submit_id, toml, now, job.machine)
        try:
            await self._database.write(lambda tx: records.add_job(tx, row))
        except OperationalError as error:
            if not _is_full(error):
                self.give_up(DurabilityError(f"The database does not take what is written: {error.orig}.", "Look at the disk's health."))
                raise
            raise DiskFullError(f"The disk of {self._settings.state_dir} is full: the job was not taken.", "Make room there.") from error
        self.jobs[job_id] = job
        log.info("job=%s submitted name=%s method=%s rounds=%d", job_id, spec.name, job.method.name, spec.rounds.count)
        self._wake()
        return job

    async def checked(self, toml: str) -> jobspec.JobSpec:
        """The job that a text describes. Raises JobFileError with every complaint, missing folders and files included."""
        spec = jobspec.parse(toml)
        missing = await self._on_disk(jobfolders.complaints, spec, lambda name: name in self.jobs and self.jobs[name].machine.committed > 0)
        if missing:
            raise jobspec.JobFileError(missing)
        return spec

    async def collect_garbage(self, keep_rounds: int, older_than_s: float, *, dry_run: bool) -> Garbage:
        """Remove, or with `dry_run` only count, what no running job and no kept adapter needs.

        Jobs that ended more than `older_than_s` ago keep their last `keep_rounds` rounds and the best; 0 leaves what they keep as it is.
        Raises DiskFullError where that cannot even be written down.
        """
        trim = Trim(keep_rounds, self._wall() - older_than_s) if keep_rounds else None

        def keep(trimmed: Mapping[str, int]) -> None:
            for job_id, rounds in trimmed.items():
                self.jobs[job_id].keep_rounds = rounds

        try:
            return await self.retention.collect(trim, keep, dry_run=dry_run)
        except OperationalError as error:
            if not _is_full(error):
                raise
            raise DiskFullError("The disk is too full to note which rounds go.", "Run `fleetune gc` without options first.") from error

    def find(self, name: str) -> LiveJob | None:
        """By id, by an unambiguous beginning of one, or the last submitted for "last"."""
        if name in self.jobs:
            return self.jobs[name]
        if name == "last":
            return max(self.jobs.values(), key=lambda job: job.submitted_unix_s, default=None)
        matches = [job for job_id, job in self.jobs.items() if name and job_id.startswith(name)]
        return matches[0] if len(matches) == 1 else None

    def post(self, job_id: str, event: machine.Event) -> None:
        """Hand in an event; the state changes when its group is committed."""
        self._queue.put_nowait(_Item(job_id, event))

    async def ask(self, job_id: str, event: machine.Event) -> Receipt:
        """Hand in an event and wait until it is durable. A caller that is cut off takes nothing back: the event counts all the same."""
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        if isinstance(event, machine.UpdateArrived):
            # Nor does its blob go with the caller, whose `keeping` may end before the machine has seen the event.
            digest = event.update.blob.digest
            self.retention.expect(digest)
            answer.add_done_callback(lambda _: self.retention.settle(digest))
        try:
            await self._queue.put(_Item(job_id, event, answer))
        except asyncio.CancelledError:
            answer.cancel()
            raise
        return await asyncio.shield(answer)

    # -- what the fleet says

    def device_online(self, session: Session, held: frozenset[str], running: frozenset[str]) -> None:
        """The device's session is open. `held` are the tasks that it works on or has a result of, `running` the former."""
        device_id = session.greeting.device_id
        for job in self._open_jobs():
            if device_id in job.machine.busy_devices():
                self.post(job.job_id, machine.DeviceOnline(device_id, held))
            job.touch()
        for task_id in sorted(running):
            job_, entry = self._task(task_id)
            if job_ is not None and entry is not None and entry.status == "assigned" and entry.device_id == device_id:
                job_.progress.setdefault(task_id, Progress(moved_monotonic_s=self._monotonic()))
            elif self._dispatcher is not None:
                # Withdrawn while it could not hear of it; a finished result is answered when it comes.
                self._dispatcher.withdraw(device_id, task_id, "the round has gone on without this task")
        self._wake()

    def device_offline(self, device_id: str) -> None:
        for job in self._open_jobs():
            if device_id in job.machine.busy_devices():
                self.post(job.job_id, machine.DeviceOffline(device_id))
            job.touch()

    def availability_changed(self) -> None:
        self._wake()

    def note_progress(self, task_id: str, device_id: str, stage: int, done: int, total: int, loss: float | None) -> None:
        job = self.job_of_task(task_id)
        entry = job.machine.open_task(task_id) if job else None
        if job is None or entry is None or entry.device_id != device_id:
            return
        progress = job.progress.setdefault(task_id, Progress(moved_monotonic_s=self._monotonic()))
        if (stage, done) != (progress.stage, progress.done):
            progress.moved_monotonic_s = self._monotonic()
        progress.stage, progress.done, progress.total = stage, done, total
        progress.loss = loss if loss is not None else progress.loss
        job.touch()

    def job_of_task(self, task_id: str) -> LiveJob | None:
        return self.jobs.get(task_id.partition("/")[0])

    def _task(self, task_id: str) -> tuple[LiveJob | None, TaskEntry | None]:
        job = self.job_of_task(task_id)
        return job, job.machine.open_task(task_id) if job else None

    async def judge(self, task_id: str, device_id: str, digest: str) -> Receipt | None:
        """The receipt that an update already has, or None where it is still wanted. A late one is recorded by this."""
        job, name = self.job_of_task(task_id), _parse_task_id(task_id)
        if job is None or name is None or not 1 <= name.round_number <= job.machine.committed + 1:
            return Receipt("refused", f"no job has a task {task_id[:200]!r}")
        if name.device_id != device_id:
            return Receipt("refused", f"task {task_id!r} is not this device's")
        if name.kind != "train":
            return Receipt("refused", f"task {task_id!r} has an evaluation for its result, not an update")
        entry = job.machine.open_task(task_id)
        if entry is not None and entry.status == "assigned":
            return None
        if entry is not None and entry.update is not None:
            return _same_or_other(entry.update.blob.digest, digest)
        row = await self._database.read(lambda c: records.find_update(c, task_id))
        if row is not None and row.status == "accepted":
            return _same_or_other(row.digest, digest)
        if row is None and device_id in self.registry.names.values():
            await self.ask(job.job_id, machine.UpdateLate(task_id, digest))
        return Receipt("late", "the round is over or has gone on without this device")

    async def take_update(self, task_id: str, device_id: str, update: Update, spooled: Path, storing: Awaitable[object]) -> Receipt:
        """Check a received update against the job's tensors and count it, once `storing` has made its blob durable, or raise its error.

        The check and the disk's flush take about as long and need different things, so they go side by side: `spooled` is where the bytes
        lie until `storing` moves them to the blob's place.
        """
        job = self.job_of_task(task_id)
        settled = await self.judge(task_id, device_id, update.blob.digest)
        if job is None or settled is not None:
            await storing
            return settled or Receipt("refused", "unknown job")
        table = await self._table(job)
        places = (spooled, self.blobs.path(update.blob.digest))
        failure, found = None, await asyncio.gather(self._on_disk(_inspected, places, table), storing, return_exceptions=True)
        if isinstance(found[1], BaseException):
            raise found[1]
        facts = found[0]
        if not 0 < update.samples <= SAMPLES_MAX:
            message = f"the update's weight (samples) is {update.samples}; 1 to {SAMPLES_MAX} are allowed."
            failure = Failure("internal", "upload", message)
        elif isinstance(facts, aggregate.NotFiniteUpdateError):
            failure = Failure("not_finite", "upload", str(facts))
        elif isinstance(facts, WireError):
            failure = Failure("model", "upload", str(facts))
        if failure is not None:
            await self.ask(job.job_id, machine.TaskFailed(task_id, failure))
            return Receipt("refused", failure.message)
        if isinstance(facts, BaseException):
            raise facts
        checked = Update(update.blob, update.samples, update.metrics, update.seconds, update.peak_rss_bytes, facts.norm, facts.kind)
        if (objection := job.machine.objection(checked)) is not None:
            await self.ask(job.job_id, machine.TaskFailed(task_id, objection))
            if device_id in job.machine.quarantined:
                log.warning("job=%s device=%s quarantined reason=%r", job.job_id, device_id, job.machine.quarantined[device_id])
            return Receipt("refused", objection.message)
        receipt = await self.ask(job.job_id, machine.UpdateArrived(task_id, checked))
        if receipt.status == "late":  # the round closed while the update was being checked
            await self.ask(job.job_id, machine.UpdateLate(task_id, update.blob.digest))
        return receipt

    async def take_evaluation(self, task_id: str, device_id: str, evaluation: Evaluation) -> Receipt:
        return await self._take(task_id, device_id, machine.EvaluationArrived(task_id, evaluation))

    async def take_failure(self, task_id: str, device_id: str, failure: Failure) -> Receipt:
        job, entry = self._task(task_id)
        if failure.kind == "transfer" and job is not None and entry is not None and entry.device_id == device_id:
            self._spawn(job, self._check_after_failed_fetch(job), f"check {job.job_id}")
        return await self._take(task_id, device_id, machine.TaskFailed(task_id, failure))

    async def take_refusal(self, task_id: str, device_id: str, reason: str) -> Receipt:
        return await self._take(task_id, device_id, machine.TaskRefused(task_id, reason))

    async def add_log(self, task_id: str, device_id: str, device_name: str, lines: list[str]) -> None:
        job, name = self.job_of_task(task_id), _parse_task_id(task_id)
        if job is None or name is None or name.device_id != device_id or name.round_number > job.machine.committed + 1:
            return
        now = self._wall()
        rows = [records.LogRow(now, job.job_id, name.round_number, device_name, line) for line in lines]
        await self._database.write(lambda tx: records.add_logs(tx, rows))

    # -- deciding

    def _decide(self, items: list[_Item]) -> _Batch:
        batch = _Batch()
        now = self._wall()
        for item in items:
            job = self.jobs.get(item.job_id)
            if job is None:  # a wake-up: nothing has happened to any job, but devices or turns may be free
                continue
            receipt = self._apply(batch, job, item.event, now)
            if item.answer is not None:
                batch.answers.append((item.answer, receipt))
        self._start_and_offer(batch, now)
        return batch

    def _apply(self, batch: _Batch, job: LiveJob, event: machine.Event, now: float) -> Receipt:
        """Let the machine decide on one event; the answer is the event's receipt."""
        before = self._status_of(job, event)
        if before is not None and before.status != "accepted":
            return before
        if isinstance(event, machine.Folded):
            # As of now: since the fold ended, another job may have taken a device, or it has left.
            event = replace(event, candidates=self._candidates(job))
        elif isinstance(event, machine.UpdateDamaged):
            entry = job.machine.open_task(event.task_id)
            event = replace(event, online=entry is not None and entry.device_id in self.registry.sessions)
        message = job.machine.message
        commands = job.machine.handle(event, now)
        if isinstance(event, machine.Ticked | machine.Offered) and not commands:
            if job.machine.message != message:
                job.touch()
            return Receipt("accepted")
        if isinstance(event, machine.UpdateDamaged) and not commands:
            return Receipt("accepted")  # it was about a lease that is over
        batch.events.append(records.EventRow(now, job.job_id, event))
        batch.jobs[job.job_id] = job
        batch.commands += [(job, command) for command in commands]
        self._note(batch, job, event, now)
        for command in commands:
            if isinstance(command, machine.CommitRound):
                batch.rounds.append((job.job_id, command.entry))
                job.history.append(command.entry)
        return Receipt("accepted")

    def _status_of(self, job: LiveJob, event: machine.Event) -> Receipt | None:
        """Whether a device's result still counts; None for events that are no results."""
        match event:
            case machine.UpdateArrived(task_id, update):
                entry = job.machine.open_task(task_id)
                if entry is not None and entry.update is not None:
                    return _same_or_other(entry.update.blob.digest, update.blob.digest)
                wanted = entry is not None and entry.status == "assigned" and entry.kind == "train"
                return Receipt("accepted") if wanted else Receipt("late", "the round is over or has gone on without this device")
            case machine.EvaluationArrived(task_id) | machine.TaskFailed(task_id) | machine.TaskRefused(task_id):
                entry = job.machine.open_task(task_id)
                if entry is None:
                    return Receipt("late", "the round is over")
                if isinstance(event, machine.EvaluationArrived) and entry.kind != "evaluate":
                    return Receipt("refused", f"task {task_id!r} has an update for its result, not an evaluation")
                return Receipt("accepted") if entry.status == "assigned" else Receipt("duplicate")
            case _:
                return None

    def _note(self, batch: _Batch, job: LiveJob, event: machine.Event, now: float) -> None:
        """Rows beside the machine's own, and the log's story."""
        match event:
            case machine.UpdateArrived(task_id, update):
                device_id, number = task_id.split("/")[2], int(task_id.split("/")[1])
                batch.updates.append(records.UpdateRow(task_id, job.job_id, number, device_id, update.blob.digest, "accepted", now))
                batch.blobs.append(records.BlobRow(update.blob.digest, update.blob.size_bytes, "update", job.job_id, now))
                log.info(
                    "job=%s round=%d device=%s update samples=%d bytes=%d",
                    job.job_id,
                    number,
                    device_id,
                    update.samples,
                    update.blob.size_bytes,
                )
            case machine.UpdateLate(task_id, digest):
                device_id, number = task_id.split("/")[2], int(task_id.split("/")[1])
                batch.updates.append(records.UpdateRow(task_id, job.job_id, number, device_id, digest, "late", now))
                log.info("job=%s round=%d device=%s update late", job.job_id, number, device_id)
            case machine.UpdateDamaged(task_id):
                batch.taken_back.append(task_id)
                device_id, number = task_id.split("/")[2], int(task_id.split("/")[1])
                log.error("job=%s round=%d device=%s update damaged on disk, its task is given again", job.job_id, number, device_id)
            case machine.TaskFailed(task_id, failure):
                batch.failures.append((task_id.split("/")[2], failure.message))
                log.warning(
                    "job=%s task=%s failed stage=%s kind=%s message=%r", job.job_id, task_id, failure.stage, failure.kind, failure.message
                )
            case machine.TaskRefused(task_id, reason):
                log.info("job=%s task=%s refused reason=%r", job.job_id, task_id, reason)
            case machine.PreparedEvent(prepared):
                batch.blobs.append(records.BlobRow(prepared.state.digest, prepared.state.size_bytes, "state", job.job_id, now))
                batch.blobs += [records.BlobRow(digest, size, "base", job.job_id, now) for _, digest, size in prepared.files]
            case machine.Folded(_, outcome):
                batch.blobs.append(records.BlobRow(outcome.state.digest, outcome.state.size_bytes, "state", job.job_id, now))
                if outcome.optimizer is not None:
                    batch.blobs.append(
                        records.BlobRow(outcome.optimizer.digest, outcome.optimizer.size_bytes, "optimizer", job.job_id, now)
                    )
            case _:
                pass

    def _start_and_offer(self, batch: _Batch, now: float) -> None:
        """Give queued jobs their turn and free devices to the jobs that wait for them, oldest job first."""
        open_jobs = self._open_jobs()
        running = sum(job.machine.status not in ("queued", "paused") for job in open_jobs)
        for job in open_jobs:
            if job.machine.status == "queued" and running < self._settings.parallel_jobs and not job.machine.paused:
                running += 1
                self._apply(batch, job, machine.Started(), now)
        for job in open_jobs:
            if job.machine.wants_devices():
                self._apply(batch, job, machine.Offered(self._candidates(job)), now)

    def _candidates(self, job: LiveJob) -> tuple[Candidate, ...]:
        return self.registry.candidates(job.needs, self.busy_devices(), self._monotonic())

    def busy_devices(self) -> set[str]:
        """Devices that hold an open task of any job."""
        return {device for job in self._open_jobs() for device in job.machine.busy_devices()}

    def _open_jobs(self) -> list[LiveJob]:
        return sorted((job for job in self.jobs.values() if not job.ended), key=lambda job: job.submitted_unix_s)

    # -- committing

    async def _commit(self, batch: _Batch) -> None:
        """One transaction for the whole group. A full disk holds everything up until there is space; nothing is sent before."""
        if not batch.events:
            return
        machines = {job_id: (job.machine.status, records.dump_machine(job.machine)) for job_id, job in batch.jobs.items()}

        def change(tx: Connection) -> None:
            # The blobs' folders first: a row must never name a blob that a power cut takes away.
            self.blobs.sync()
            records.add_events(tx, batch.events)
            records.drop_updates(tx, batch.taken_back)
            records.add_updates(tx, batch.updates)
            records.add_blobs(tx, batch.blobs)
            for job_id, entry in batch.rounds:
                records.save_round(tx, job_id, entry)
            records.count_accepted(tx, [row.device_id for row in batch.updates if row.status == "accepted"])
            for device_id, message in batch.failures:
                records.count_for_device(tx, device_id, 0, 1, message)
            for job_id, (status, text) in machines.items():
                records.save_machine(tx, job_id, status, text)

        while True:
            try:
                await self._database.write(change)
                break
            except OperationalError as error:
                if not _is_full(error):
                    raise
                if not self.stalled:
                    log.error("the disk of %s is full; waiting for space, nothing is lost", self._settings.state_dir)
                self.stalled = f"the disk of {self._settings.state_dir} is full"
                await asyncio.sleep(COMMIT_RETRY_S)
        if self.stalled:
            log.info("the disk has space again; going on")
            self.stalled = ""

    # -- acting

    def _act(self, batch: _Batch) -> None:
        for answer, receipt in batch.answers:
            if not answer.done():
                answer.set_result(receipt)
        assigned: _Assigned = {}
        for job, command in batch.commands:
            if isinstance(command, machine.SendTask):
                self._send(job, command, assigned)
            else:
                self._carry_out(job, command)
        for job in batch.jobs.values():
            job.touch()

    def _carry_out(self, job: LiveJob, command: _Deed) -> None:
        match command:
            case machine.WithdrawTask(task_id, device_id, reason):
                if self._dispatcher is not None:
                    self._dispatcher.withdraw(device_id, task_id, reason)
            case machine.Prepare():
                self._spawn(job, self._prepare(job), f"prepare {job.job_id}", stage="preparing")
            case machine.Fold():
                self._spawn(job, self._fold(job, command), f"fold {job.job_id}/{command.round_number}", stage="folding")
            case machine.EvaluateHeldout(number, state):
                self._spawn(job, self._evaluate(job, number, state), f"evaluate {job.job_id}/{number}", stage="evaluating")
            case machine.CommitRound(entry):
                log.info("job=%s round=%d committed devices=%d metrics=%s", job.job_id, entry.number, len(entry.trained()), entry.metrics)
                job.progress.clear()
                self._spawn(job, self._publish(job, entry), f"publish {job.job_id}/{entry.number}")
            case machine.AbandonRound(entry, reason):
                log.warning("job=%s round=%d abandoned reason=%r", job.job_id, entry.number, reason)
                job.progress.clear()
                self._spawn(job, self._drop_round(entry), f"clear {job.job_id}/{entry.number}")
            case machine.EndJob(status):
                log.info("job=%s ended status=%s message=%r", job.job_id, status, job.machine.message)
                for task in job.on_host:
                    task.cancel()
                self._spawn(job, self._wrap_up(job), f"wrap up {job.job_id}")

    def _send(self, job: LiveJob, command: machine.SendTask, assigned: _Assigned) -> None:
        if self._dispatcher is None or job.machine.round is None:
            return
        payload = assigned.get(job.job_id)
        if payload is None:
            # Once for all tasks of a batch: the method plans for the whole round.
            devices = sorted(t.device_id for t in job.machine.round.tasks.values() if t.kind == "train")
            payload = job.method.assign(job.spec, RoundFacts(command.round_number, devices or [command.device_id]))
            assigned[job.job_id] = payload
        message = payload.get(command.device_id) or next(iter(payload.values()))
        deadline_s = max(0.1, command.deadline_unix_s - self._wall()) if command.deadline_unix_s > 0 else 0.0
        job.progress[command.task_id] = Progress(moved_monotonic_s=self._monotonic())
        self._dispatcher.send_task(Order(command, job, message, deadline_s))

    async def _prepare(self, job: LiveJob) -> None:
        async with contextlib.AsyncExitStack() as kept:
            try:
                prepared = await self._prepared(job, kept)
            except HostError as error:
                self.post(job.job_id, machine.HostFailed("preparing", error.failure))
            except DurabilityError as error:
                self.give_up(error)
            except (FleetuneError, OSError) as error:
                self.post(job.job_id, machine.HostFailed("preparing", _failure(error, "prepare")))
            else:
                await self.ask(job.job_id, machine.PreparedEvent(prepared))

    async def _prepared(self, job: LiveJob, kept: contextlib.AsyncExitStack) -> Prepared:
        """The first global state, its blobs stored and kept until `kept` is closed."""
        spec = job.spec
        folder = self._scratch / f"prepare-{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            if not job.method.needs_model:
                path = folder / adapter.STATE_FILE
                initial = await self._on_disk(job.method.initial, spec, path)
                await kept.enter_async_context(self.retention.keeping(initial.state.digest))
                await self._on_disk(self.blobs.put_file, path, link=True, digest=initial.state.digest)
                return Prepared(initial.state, initial.trainables_digest)
            init = spec.lora.init_adapter
            if init in self.jobs:
                init = str(await self._on_disk(self._own_adapter, self.jobs[init], folder))
            request = {
                "base": str(_expanded(spec.model.base)) if is_folder(spec.model.base) else spec.model.base,
                "revision": spec.model.revision,
                "allow_hub": spec.model.allow_hub,
                "recipe": encode(job.recipe),
                "seed": spec.seed,
                "init_adapter": str(_expanded(init)) if init else None,
                "out_folder": str(folder),
            }

            def on_event(event: Mapping[str, object]) -> None:
                if event.get("event") == "progress":
                    job.host_stage = str(event.get("stage", ""))
                    job.touch()

            prepared, out = await self._host.prepare(request, on_event)
            await kept.enter_async_context(self.retention.keeping(prepared.state.digest))
            await self._on_disk(self.blobs.put_file, out / adapter.STATE_FILE, link=True, digest=prepared.state.digest)
            for name, digest, size_bytes in prepared.files:
                await kept.enter_async_context(self.retention.keeping(digest))
                if not await self._on_disk(damage.is_whole, self.blobs, Blob(digest, size_bytes)):
                    await self._on_disk(self.blobs.put_file, Path(prepared.base_folder) / name, link=False, digest=digest)
            if spec.evaluation.source != "heldout":
                return prepared
            job.host_stage = "evaluating the base"
            job.touch()
            heldout = _expanded(spec.evaluation.heldout)
            initial_figures = await self._host.evaluate(prepared.base_folder, job.recipe, self.blobs.path(prepared.state.digest), heldout)
            return replace(prepared, initial=initial_figures)
        finally:
            job.host_stage = ""
            await self._on_disk(shutil.rmtree, folder, ignore_errors=True)
            if spec.evaluation.source != "heldout":
                self._host.rest()

    def _own_adapter(self, source: LiveJob, folder: Path) -> Path:
        """A job's last adapter in a folder that nobody else clears up."""
        prepared = source.machine.prepared
        if not source.history or prepared is None or not prepared.adapter_config:
            raise ModelError(f"job {source.job_id} has no adapter to start from.", "Name a job with a committed round, or a folder.")
        state = source.history[-1].state
        if state is None or not damage.is_whole(self.blobs, state):
            raise ModelError(f"the last adapter of job {source.job_id} is damaged on disk.", "Name a folder with a whole one.")
        return adapter.write(folder / "init", self.blobs, adapter.Adapter(source.job_id, source.spec, prepared, source.history[-1]))

    # -- damage at rest

    async def _check_updates(self, job: LiveJob) -> bool:
        """Take back the acceptance of updates whose bytes are damaged; True where there was one."""
        entry = job.machine.round
        if entry is None or entry.phase not in ("training", "folding"):
            return False
        tasks = [(task.task_id, task.lease, task.update.blob) for task in entry.trained() if task.update is not None]
        found = False
        for task_id, lease, blob in tasks:
            if await self._on_disk(damage.is_whole, self.blobs, blob):
                continue
            task = job.machine.open_task(task_id)
            if task is None or task.lease != lease:
                continue  # the round has gone on, and its updates with it
            found = await self._on_disk(damage.withdrawn, self.blobs, blob) or found
            self.post(job.job_id, machine.UpdateDamaged(task_id, lease))
        return found

    def _has_lain(self, job: LiveJob) -> bool:
        """Whether anything that the open round folds was written longer than RECHECK_AFTER_S ago. A restart checks by itself."""
        entry = job.machine.round
        written = [entry.started_unix_s] if entry is not None else []
        written += [job.history[-1].ended_unix_s] if job.history else []
        return not written or self._wall() - min(written) >= RECHECK_AFTER_S

    async def _check_after_restart(self, job: LiveJob) -> None:
        """Early, since a device that must train again does so while the others still train. The coordinator serves meanwhile."""
        await self._check_updates(job)

    async def _check_after_failed_fetch(self, job: LiveJob) -> None:
        """A device got other bytes than were announced: is it the disk here? One look at a time."""
        if job.checking or job.ended:
            return
        job.checking = True
        try:
            standing = damage.standing(self._facts(job))
            if ailment := await self._on_disk(damage.ailment, self.blobs, self.jobs_folder, standing, base_in_full=True):
                self.post(job.job_id, machine.HostFailed("serving files", Failure("internal", "storage", ailment)))
        finally:
            job.checking = False

    async def _fold(self, job: LiveJob, command: machine.Fold) -> None:
        """Fold; without room for the result as often as it takes, since the updates lie safe and somebody may make room."""
        waits = f"fold {job.job_id}"
        try:
            while (full := await self._folded(job, command)) is not None and not job.ended:
                if waits not in self._no_room:
                    log.error("job=%s round=%d waits with its fold: %s", job.job_id, command.round_number, full)
                self.note_room(waits, str(full))
                await asyncio.sleep(FOLD_RETRY_S)
        finally:
            self.note_room(waits, "")

    async def _folded(self, job: LiveJob, command: machine.Fold) -> DiskFullError | None:
        """One attempt; what came of it is posted, but for the lack of room."""
        stem = f"{job.job_id}-{command.round_number}-{uuid.uuid4().hex[:8]}"
        out, out_optimizer = self._scratch / f"{stem}.state", self._scratch / f"{stem}.optimizer"
        try:
            if self._has_lain(job):
                # The bytes lay on a disk since their digests were checked: nothing damaged gets into the sum.
                if await self._check_updates(job):
                    return None
                standing = damage.standing(self._facts(job))
                if ailment := await self._on_disk(damage.ailment, self.blobs, self.jobs_folder, standing):
                    self.post(job.job_id, machine.HostFailed("folding", Failure("internal", "storage", ailment)))
                    return None
            result = await self._folder.run(self._fold_now, job, command, out, out_optimizer)
            async with contextlib.AsyncExitStack() as kept:
                found = ((out, result.digest), (out_optimizer, result.optimizer_digest))
                files = [(path, digest) for path, digest in found if digest is not None]
                for _, digest in files:
                    await kept.enter_async_context(self.retention.keeping(digest))
                await self._folder.run(self._store, files)
                optimizer = Blob(result.optimizer_digest, result.optimizer_size_bytes) if result.optimizer_digest is not None else None
                coverage = min(result.coverage.values(), default=0)
                outcome = FoldOutcome(Blob(result.digest, result.size_bytes), optimizer, coverage, result.update_norm)
                await self.ask(job.job_id, machine.Folded(command.round_number, outcome, ()))
        except DurabilityError as error:
            self.give_up(error)
        except DiskFullError as error:
            return error
        except (FleetuneError, OSError) as error:
            self.post(job.job_id, machine.HostFailed("folding", _failure(error, "fold")))
        return None

    def _fold_now(self, job: LiveJob, command: machine.Fold, out: Path, out_optimizer: Path) -> aggregate.FoldResult:
        """On the fold thread."""
        server = job.method.fold(job.spec)
        plan = aggregate.FoldPlan(
            base_state=self.blobs.path(command.state.digest),
            contributions=tuple(
                aggregate.Contribution(c.device_id, self.blobs.path(c.blob.digest), c.weight) for c in command.contributions
            ),
            out_state=out,
            server=server,
            optimizer_state=self.blobs.path(command.optimizer.digest) if command.optimizer and server else None,
            out_optimizer_state=out_optimizer if server else None,
        )
        return aggregate.fold(plan)

    def _store(self, files: Sequence[tuple[Path, str]]) -> None:
        """Make blobs of finished files, which lose their first name. On the fold thread."""
        for path, digest in files:
            try:
                self.blobs.put_file(path, link=True, digest=digest)
            finally:
                path.unlink(missing_ok=True)

    async def _evaluate(self, job: LiveJob, number: int, state: Blob) -> None:
        assert job.machine.prepared is not None
        try:
            evaluation = await self._host.evaluate(
                job.machine.prepared.base_folder, job.recipe, self.blobs.path(state.digest), _expanded(job.spec.evaluation.heldout)
            )
        except HostError as error:
            self.post(job.job_id, machine.HostFailed("evaluating", error.failure))
            return
        except (FleetuneError, OSError) as error:
            self.post(job.job_id, machine.HostFailed("evaluating", _failure(error, "evaluate")))
            return
        self.post(job.job_id, machine.HeldoutEvaluated(number, evaluation))

    async def _publish(self, job: LiveJob, entry: RoundEntry) -> None:
        """Write the round's folder and let go of what it replaces."""
        prepared = job.machine.prepared
        assert prepared is not None
        async with job.publishing:
            await self._on_disk(self._publish_now, job, entry, prepared)
            dropped = await self._on_disk(self.retention.drop_old_folders, self._facts(job))
        await self._drop_updates(entry)
        states = [job.history[number - 1].state for number in dropped if number <= len(job.history)]
        # What this round replaced: the optimiser's state before it and, for the first round, the state the job began with.
        replaced = [job.history[entry.number - 2].optimizer] if entry.number > 1 else [prepared.state]
        await self.retention.forget({blob.digest for blob in (*states, *replaced) if blob is not None})
        job.touch()

    def _publish_now(self, job: LiveJob, entry: RoundEntry, prepared: Prepared) -> None:
        try:
            adapter.write(self.jobs_folder, self.blobs, adapter.Adapter(job.job_id, job.spec, prepared, entry))
        except (OSError, DiskFullError) as error:
            # The round is committed; its folder is written again at the next start or export.
            log.error("job=%s round=%d adapter folder not written: %s", job.job_id, entry.number, error)
            return
        if job.machine.best_round == entry.number:
            adapter.point(self.jobs_folder, job.job_id, "best", entry.number)

    def _mend_folders(self, job: LiveJob) -> None:
        """Write kept rounds' folders that a crash between commit and write has cost."""
        if job.machine.prepared is None:
            return
        for entry in job.history:
            if entry.number in needs.kept_rounds(self._facts(job)) and entry.state is not None and self.blobs.has(entry.state.digest):
                found = adapter.Adapter(job.job_id, job.spec, job.machine.prepared, entry)
                if not adapter.is_whole(self.jobs_folder, found):  # a power cut may leave a folder of empty files
                    adapter.drop(self.jobs_folder, job.job_id, entry.number)
                self._publish_now(job, entry, job.machine.prepared)
        if job.ended and job.machine.committed:
            adapter.point(self.jobs_folder, job.job_id, "final", job.machine.committed)

    async def _drop_updates(self, entry: RoundEntry) -> None:
        await self.retention.forget({task.update.blob.digest for task in entry.trained() if task.update})

    async def _drop_round(self, entry: RoundEntry) -> None:
        """Everything that an abandoned round has made."""
        await self._drop_updates(entry)
        await self.retention.forget({blob.digest for blob in (entry.state, entry.optimizer) if blob is not None})

    def _facts(self, job: LiveJob) -> JobFacts:
        return JobFacts(job.job_id, job.machine, job.history, job.keep_rounds)

    def _all_facts(self) -> list[JobFacts]:
        return [self._facts(job) for job in self.jobs.values()]

    async def _wrap_up(self, job: LiveJob) -> None:
        """After the last of the job's work: link its final adapter and let go of what only a running job needs."""
        if others := job.work - {cast("asyncio.Task[None]", asyncio.current_task())}:
            await asyncio.wait(others)
        try:
            if job.machine.committed:
                await self._on_disk(adapter.point, self.jobs_folder, job.job_id, "final", job.machine.committed)
            prepared = job.machine.prepared
            made = [job.machine.optimizer, job.machine.state, prepared.state if prepared else None]
            files = {digest for _, digest, _ in prepared.files} if prepared else set[str]()
            await self.retention.forget({blob.digest for blob in made if blob is not None} | files)
        finally:
            job.settled.set()
            job.touch()
        if not any(other.spec.evaluation.source == "heldout" for other in self._open_jobs()):
            self._host.rest()
        self._wake()

    # -- small parts

    async def _take(self, task_id: str, device_id: str, event: machine.Event) -> Receipt:
        job, name = self.job_of_task(task_id), _parse_task_id(task_id)
        if job is None or name is None or name.device_id != device_id:
            return Receipt("refused", f"no task {task_id[:200]!r} of this device is known")
        if job.ended:
            return Receipt("late", "the job has ended")
        return await self.ask(job.job_id, event)

    async def _table(self, job: LiveJob) -> codec.TensorTable:
        if job.table is None:
            assert job.machine.state is not None
            job.table = await self._on_disk(codec.read_table, self.blobs.path(job.machine.state.digest))
        return job.table

    async def _on_disk(self, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """The one way from the event loop to blocking work that is neither database nor fold."""
        return await self._disk.run(call, *arguments, **named)

    def _spawn(self, job: LiveJob, coroutine: Coroutine[object, object, None], name: str, stage: str = "") -> None:
        """Start work of a job. With a `stage`, the job stands on it: a bug there fails the job, which would else wait for ever."""
        task = self._start(coroutine, name)
        job.work.add(task)
        task.add_done_callback(job.work.discard)
        if stage in ("preparing", "evaluating"):
            job.on_host.add(task)
            task.add_done_callback(job.on_host.discard)
        if stage:
            task.add_done_callback(functools.partial(self._fail_stage, job.job_id, stage))

    def _start(self, coroutine: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Start work beside the loop; what it raises is logged."""
        task = asyncio.create_task(coroutine, name=name)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        task.add_done_callback(_log_failure)
        return task

    def _start_unless_closing(self, coroutine: Coroutine[object, object, None], name: str) -> None:
        if self._closing:
            coroutine.close()
        else:
            self._start(coroutine, name)

    def _fail_stage(self, job_id: str, stage: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self.post(job_id, machine.HostFailed(stage, Failure("internal", stage, f"{type(error).__name__}: {error}", trace)))

    def _wake(self) -> None:
        """Make the loop look for jobs to start and devices to give."""
        self._queue.put_nowait(_Item("", machine.Ticked()))

    def _arm_timer(self) -> None:
        """One timer for the nearest deadline of all jobs; no polling."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._closing:
            return
        now = self._wall()
        waits = [due - now for job in self._open_jobs() if (due := job.machine.next_deadline_unix_s()) is not None]
        free_again_s = self.registry.next_return_s(self._monotonic())
        if free_again_s is not None and any(job.machine.wants_devices() for job in self._open_jobs()):
            waits.append(free_again_s - self._monotonic())
        waits += [self._stall_wait_s(job) for job in self._open_jobs() if job.machine.round is not None]
        if waits:
            self._timer = asyncio.get_running_loop().call_later(max(0.01, min(waits)), self._on_timer)

    def _stall_wait_s(self, job: LiveJob) -> float:
        moved = [job.progress[t].moved_monotonic_s for t in self._watched_tasks(job)]
        return min((m + self._settings.stall_s - self._monotonic() for m in moved), default=self._settings.stall_s)

    def _watched_tasks(self, job: LiveJob) -> list[str]:
        entry = job.machine.round
        if entry is None:
            return []
        return [
            t.task_id for t in entry.tasks.values() if t.status == "assigned" and t.task_id in job.progress and not t.offline_since_unix_s
        ]

    def _on_timer(self) -> None:
        self._timer = None
        self._wake()
        for job in self._open_jobs():
            for task_id in self._watched_tasks(job):
                still_s = self._monotonic() - job.progress[task_id].moved_monotonic_s
                if still_s >= self._settings.stall_s:
                    stage = f"no step for {still_s:.0f} s"
                    entry = job.machine.open_task(task_id)
                    self.post(
                        job.job_id,
                        machine.TaskFailed(
                            task_id,
                            Failure("stalled", entry.kind if entry else "", f"the device is connected, its task has not moved: {stage}."),
                        ),
                    )
                    if entry is not None and self._dispatcher is not None:
                        self._dispatcher.withdraw(entry.device_id, task_id, stage)
            self.post(job.job_id, machine.Ticked())

    def _live(self, job_id: str, spec: jobspec.JobSpec, toml: str, submit_id: str, submitted: float, state: JobMachine) -> LiveJob:
        method = METHODS[spec.method.name]
        return LiveJob(
            job_id, spec, toml, submit_id, submitted, method, recipes.recipe(spec), state, keep_rounds=self._settings.keep_rounds
        )

    def _new_id(self, name: str) -> str:
        while True:
            job_id = f"{name}-{uuid.uuid4().hex[:4]}"
            if job_id not in self.jobs:
                return job_id


@dataclass(frozen=True)
class _TaskName:
    round_number: int
    device_id: str
    kind: str


def _parse_task_id(task_id: str) -> _TaskName | None:
    """The parts of "<job>/<round>/<device>/<kind>[/<attempt>]"; None for anything else, since the text comes from the network."""
    found = _TASK_ID.fullmatch(task_id)
    return _TaskName(int(found[1]), found[2], found[3]) if found else None


_TASK_ID = re.compile(r"[^/]{1,100}/([1-9][0-9]{0,5})/([A-Za-z0-9-]{1,64})/(train|evaluate)(?:/[0-9]{1,9})?", re.ASCII)


def _expanded(place: str) -> Path:
    return Path(place).expanduser()


def _failure(error: FleetuneError | OSError, stage: str) -> Failure:
    return Failure("disk_full" if isinstance(error, DiskFullError) else "internal", stage, str(error))


def _is_full(error: OperationalError) -> bool:
    return "database or disk is full" in str(error.orig)


def _inspected(places: Sequence[Path], expected: codec.TensorTable) -> aggregate.UpdateFacts:
    """Facts of the update that lies at the first of `places`, or on its way from there at the second."""
    try:
        return aggregate.inspect(places[0], expected)
    except FileNotFoundError:
        return aggregate.inspect(places[1], expected)


def _same_or_other(known: str, digest: str) -> Receipt:
    if known == digest:
        return Receipt("duplicate")
    return Receipt("refused", f"this task's result was received before, with digest {known[:12]}; this one has {digest[:12]}.")


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s failed", task.get_name(), exc_info=error)

"""The engine: the one writer of all jobs. Events in, one transaction, then the commands go out.

The simple version, a transaction per event, makes a round of N devices wait for N fsyncs of the database one after the other.
Here the loop takes every event that has arrived while the last transaction was written, lets the machines decide on all of them,
commits the lot at once and only then acts and answers. Under load the groups grow by themselves; alone, an event waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, ParamSpec, Protocol, TypeVar

from google.protobuf.message import Message
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from fleetune.coordinator import jobspec, recipes
from fleetune.coordinator.domain import Blob, Evaluation, Failure, FoldOutcome, Prepared, RoundEntry, Update
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.table import METHODS
from fleetune.coordinator.registry import Registry, Session
from fleetune.coordinator.rounds import adapter, aggregate, machine
from fleetune.coordinator.rounds.host import HostError, ModelHost, encode
from fleetune.coordinator.rounds.job import LiveJob, Progress, plan_of
from fleetune.coordinator.rounds.machine import JobMachine
from fleetune.coordinator.store import records
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.coordinator.store.db import Database
from fleetune.errors import DiskFullError, FleetuneError, WireError
from fleetune.wire import codec

log = logging.getLogger("fleetune.engine")

P = ParamSpec("P")
T = TypeVar("T")

EVENTS_QUEUED_MAX = 100_000
"""Events waiting for the writer; a fleet that outruns it is slowed by its unanswered uploads long before."""

STALL_S = 900.0
"""A task whose stage and count have not moved for so long is taken for stuck. A step may take minutes on a small board."""

COMMIT_RETRY_S = 1.0

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

    events: list[records.EventRow] = field(default_factory=list)
    updates: list[records.UpdateRow] = field(default_factory=list)
    blobs: list[records.BlobRow] = field(default_factory=list)
    rounds: list[tuple[str, RoundEntry]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    jobs: dict[str, LiveJob] = field(default_factory=dict)
    commands: list[tuple[LiveJob, machine.Command]] = field(default_factory=list)
    answers: list[tuple[asyncio.Future[Receipt], Receipt]] = field(default_factory=list)


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
        self._settings = settings
        self._database = database
        self._host = host
        self._wall = wall
        self._monotonic = monotonic
        self._dispatcher: Dispatcher | None = None
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(EVENTS_QUEUED_MAX)
        self._work: set[asyncio.Task[None]] = set()
        # One thread folds: it is bound by memory bandwidth, and two folds would only halve each other.
        self._folder = ThreadPoolExecutor(1, thread_name_prefix="fold")
        self._disk = ThreadPoolExecutor(2, thread_name_prefix="engine-disk")
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._scratch = settings.state_dir / "scratch"
        self.jobs_folder = settings.state_dir / "jobs"

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
            self.jobs[row.job_id] = job
        for job in self.jobs.values():
            if not job.ended:
                self.post(job.job_id, machine.Restarted())
            await self._on_disk(self._mend_folders, job)

    async def settled(self, job: LiveJob) -> None:
        """Wait until nothing runs off the loop for an ended job any more."""
        if job.work:
            await asyncio.wait(set(job.work))

    async def run(self) -> None:
        """The writer's loop; ends by cancellation."""
        while True:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            batch = self._decide(items)
            await self._commit(batch)
            self._act(batch)
            self._arm_timer()

    async def close(self) -> None:
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await self._host.close()
        self._folder.shutdown(wait=True)
        self._disk.shutdown(wait=True)

    # -- what operators ask

    async def submit(self, toml: str, submit_id: str) -> LiveJob:
        """Make a job. Raises JobFileError; a known `submit_id` answers the job it made."""
        for job in self.jobs.values():
            if job.submit_id == submit_id:
                return job
        spec = jobspec.parse(toml)
        if spec.lora.init_adapter and not spec.lora.init_adapter.startswith("/") and spec.lora.init_adapter not in self.jobs:
            raise jobspec.JobFileError(
                [
                    jobspec.Complaint(
                        "lora.init_adapter",
                        spec.lora.init_adapter,
                        "an absolute folder or the id of a job on this coordinator",
                        "Take an id that `fleetune jobs` shows.",
                    )
                ]
            )
        job_id = self._new_id(spec.name)
        now = self._wall()
        job = self._live(job_id, spec, toml, submit_id, now, JobMachine(plan_of(job_id, spec, self._settings.absent_grace_s)))
        self.jobs[job_id] = job
        row = records.JobRow(job_id, spec.name, submit_id, toml, now, job.machine)
        await self._database.write(lambda tx: records.add_job(tx, row))
        log.info("job=%s submitted name=%s method=%s rounds=%d", job_id, spec.name, job.method.name, spec.rounds.count)
        self._wake()
        return job

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
        """Hand in an event and wait until it is durable."""
        answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        await self._queue.put(_Item(job_id, event, answer))
        return await answer

    # -- what the fleet says

    def device_online(self, session: Session, held: frozenset[str]) -> None:
        device_id = session.greeting.device_id
        for job in self._open_jobs():
            if device_id in job.machine.busy_devices():
                self.post(job.job_id, machine.DeviceOnline(device_id, held))
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
        progress = job.progress.setdefault(task_id, Progress())
        if (stage, done) != (progress.stage, progress.done):
            progress.moved_monotonic_s = self._monotonic()
        progress.stage, progress.done, progress.total = stage, done, total
        progress.loss = loss if loss is not None else progress.loss
        job.touch()

    def job_of_task(self, task_id: str) -> LiveJob | None:
        return self.jobs.get(task_id.partition("/")[0])

    async def judge(self, task_id: str, device_id: str, digest: str) -> Receipt | None:
        """The receipt that a result already has, or None where it is still wanted."""
        job = self.job_of_task(task_id)
        if job is None:
            return Receipt("refused", f"no job has a task {task_id!r}")
        parts = task_id.split("/")
        if len(parts) < 4 or parts[2] != device_id:
            return Receipt("refused", f"task {task_id!r} is not this device's")
        entry = job.machine.open_task(task_id)
        if entry is not None and entry.status == "assigned":
            return None
        if entry is not None and entry.update is not None:
            return _same_or_other(entry.update.blob.digest, digest)
        row = await self._database.read(lambda c: records.find_update(c, task_id))
        if row is not None and row.status == "accepted":
            return _same_or_other(row.digest, digest)
        return Receipt("late", "the round is over or has gone on without this device")

    async def take_update(self, task_id: str, device_id: str, update: Update, path: Path) -> Receipt:
        """Check a received update against the job's tensors and count it. The blob is durable when this is called."""
        job = self.job_of_task(task_id)
        settled = await self.judge(task_id, device_id, update.blob.digest)
        if job is None or settled is not None:
            if settled is not None and settled.status == "late" and job is not None:
                await self.ask(job.job_id, machine.UpdateLate(task_id, update.blob.digest))
            return settled or Receipt("refused", "unknown job")
        if update.samples <= 0:
            return await self._refuse(
                job, task_id, Failure("internal", "upload", "the update's weight (samples) is 0; it must be above 0.")
            )
        try:
            facts = await self._on_disk(aggregate.inspect, path, await self._table(job))
        except WireError as error:
            kind = "not_finite" if "finite" in str(error).lower() or "nan" in str(error).lower() else "model"
            return await self._refuse(job, task_id, Failure("not_finite" if kind == "not_finite" else "model", "upload", str(error)))
        checked = Update(update.blob, update.samples, update.metrics, update.seconds, update.peak_rss_bytes, facts.norm)
        return await self.ask(job.job_id, machine.UpdateArrived(task_id, checked))

    async def take_evaluation(self, task_id: str, device_id: str, evaluation: Evaluation) -> Receipt:
        return await self._take(task_id, device_id, machine.EvaluationArrived(task_id, evaluation))

    async def take_failure(self, task_id: str, device_id: str, failure: Failure) -> Receipt:
        return await self._take(task_id, device_id, machine.TaskFailed(task_id, failure))

    async def take_refusal(self, task_id: str, device_id: str, reason: str) -> Receipt:
        return await self._take(task_id, device_id, machine.TaskRefused(task_id, reason))

    async def add_log(self, task_id: str, device_id: str, device_name: str, lines: list[str]) -> None:
        job = self.job_of_task(task_id)
        parts = task_id.split("/")
        if job is None or len(parts) < 4 or parts[2] != device_id or not parts[1].isdigit():
            return
        now = self._wall()
        rows = [records.LogRow(now, job.job_id, int(parts[1]), device_name, line) for line in lines]
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
        commands = job.machine.handle(event, now)
        if isinstance(event, machine.Ticked | machine.Offered) and not commands:
            return Receipt("accepted")
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
                return Receipt("accepted") if entry is not None and entry.status == "assigned" else Receipt("late", "the round is over")
            case machine.EvaluationArrived(task_id) | machine.TaskFailed(task_id) | machine.TaskRefused(task_id):
                entry = job.machine.open_task(task_id)
                if entry is None:
                    return Receipt("late", "the round is over")
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
                candidates = self.registry.candidates(job.needs, self._busy())
                self._apply(batch, job, machine.Offered(candidates), now)

    def _busy(self) -> set[str]:
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
            records.add_updates(tx, batch.updates)
            records.add_blobs(tx, batch.blobs)
            for job_id, entry in batch.rounds:
                records.save_round(tx, job_id, entry)
            for row in batch.updates:
                if row.status == "accepted":
                    records.count_for_device(tx, row.device_id, 1, 0, "")
            for device_id, message in batch.failures:
                records.count_for_device(tx, device_id, 0, 1, message)
            for job_id, (status, text) in machines.items():
                records.save_machine(tx, job_id, status, text)

        while True:
            try:
                await self._database.write(change)
                break
            except (OperationalError, OSError) as error:
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
        for job, command in batch.commands:
            self._carry_out(job, command)
        for job in batch.jobs.values():
            job.touch()

    def _carry_out(self, job: LiveJob, command: machine.Command) -> None:
        match command:
            case machine.SendTask():
                self._send(job, command)
            case machine.WithdrawTask(task_id, device_id, reason):
                if self._dispatcher is not None:
                    self._dispatcher.withdraw(device_id, task_id, reason)
            case machine.Prepare():
                self._spawn(job, self._prepare(job), f"prepare {job.job_id}")
            case machine.Fold():
                self._spawn(job, self._fold(job, command), f"fold {job.job_id}/{command.round_number}")
            case machine.EvaluateHeldout(number, state):
                self._spawn(job, self._evaluate(job, number, state), f"evaluate {job.job_id}/{number}")
            case machine.CommitRound(entry):
                log.info("job=%s round=%d committed devices=%d metrics=%s", job.job_id, entry.number, len(entry.trained()), entry.metrics)
                job.progress.clear()
                self._spawn(job, self._publish(job, entry), f"publish {job.job_id}/{entry.number}")
            case machine.AbandonRound(entry, reason):
                log.warning("job=%s round=%d abandoned reason=%r", job.job_id, entry.number, reason)
                job.progress.clear()
                self._spawn(job, self._drop_updates(entry), f"clear {job.job_id}/{entry.number}")
            case machine.EndJob(status):
                log.info("job=%s ended status=%s message=%r", job.job_id, status, job.machine.message)
                self._spawn(job, self._wrap_up(job), f"wrap up {job.job_id}")

    def _send(self, job: LiveJob, command: machine.SendTask) -> None:
        if self._dispatcher is None or job.machine.round is None:
            return
        devices = sorted(t.device_id for t in job.machine.round.tasks.values() if t.kind == "train")
        payload = job.method.assign(job.spec, RoundFacts(command.round_number, devices or [command.device_id]))
        message = payload.get(command.device_id) or next(iter(payload.values()))
        deadline_s = max(0.1, command.deadline_unix_s - self._wall()) if command.deadline_unix_s > 0 else 0.0
        job.progress[command.task_id] = Progress(moved_monotonic_s=self._monotonic())
        self._dispatcher.send_task(Order(command, job, message, deadline_s))

    async def _prepare(self, job: LiveJob) -> None:
        try:
            event: machine.Event = machine.PreparedEvent(await self._prepared(job))
        except HostError as error:
            event = machine.HostFailed("preparing", error.failure)
        except (FleetuneError, OSError) as error:
            event = machine.HostFailed("preparing", Failure("internal", "prepare", str(error)))
        self.post(job.job_id, event)

    async def _prepared(self, job: LiveJob) -> Prepared:
        spec = job.spec
        folder = self._scratch / f"prepare-{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            if not job.method.needs_model:
                path = folder / adapter.STATE_FILE
                initial = await self._on_disk(job.method.initial, spec, path)
                await self._on_disk(self.blobs.put_file, path, link=True, digest=initial.state.digest)
                return Prepared(initial.state, initial.trainables_digest)
            init = spec.lora.init_adapter
            if init in self.jobs:
                init = str(adapter.folder(self.jobs_folder, init, self.jobs[init].machine.committed))
            request = {
                "base": spec.model.base,
                "revision": spec.model.revision,
                "allow_hub": spec.model.allow_hub,
                "recipe": encode(job.recipe),
                "seed": spec.seed,
                "init_adapter": init or None,
                "out_folder": str(folder),
            }

            def on_event(event: Mapping[str, object]) -> None:
                if event.get("event") == "progress":
                    job.host_stage = str(event.get("stage", ""))
                    job.touch()

            prepared, out = await self._host.prepare(request, on_event)
            await self._on_disk(self.blobs.put_file, out / adapter.STATE_FILE, link=True, digest=prepared.state.digest)
            for name, digest, _ in prepared.files:
                source = Path(prepared.base_folder) / name
                await self._on_disk(self.blobs.put_file, source, link=False, digest=digest)
            if spec.evaluation.source != "heldout":
                return prepared
            job.host_stage = "evaluating the base"
            job.touch()
            heldout = Path(spec.evaluation.heldout)
            initial_figures = await self._host.evaluate(prepared.base_folder, job.recipe, self.blobs.path(prepared.state.digest), heldout)
            return replace(prepared, initial=initial_figures)
        finally:
            job.host_stage = ""
            await self._on_disk(shutil.rmtree, folder, ignore_errors=True)
            if spec.evaluation.source != "heldout":
                await self._host.rest()

    async def _fold(self, job: LiveJob, command: machine.Fold) -> None:
        try:
            outcome = await asyncio.get_running_loop().run_in_executor(self._folder, self._fold_now, job, command)
        except (FleetuneError, OSError) as error:
            kind: Literal["disk_full", "internal"] = "disk_full" if isinstance(error, DiskFullError) else "internal"
            self.post(job.job_id, machine.HostFailed("folding", Failure(kind, "fold", str(error))))
            return
        free = self.registry.candidates(job.needs, self._busy() - job.machine.busy_devices())
        self.post(job.job_id, machine.Folded(command.round_number, outcome, free))

    def _fold_now(self, job: LiveJob, command: machine.Fold) -> FoldOutcome:
        """On the fold thread."""
        server = job.method.fold(job.spec)
        stem = f"{job.job_id}-{command.round_number}-{uuid.uuid4().hex[:8]}"
        out, out_optimizer = self._scratch / f"{stem}.state", self._scratch / f"{stem}.optimizer"
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
        try:
            result = aggregate.fold(plan)
            self.blobs.put_file(out, link=True, digest=result.digest)
            optimizer = None
            if result.optimizer_digest is not None:
                self.blobs.put_file(out_optimizer, link=True, digest=result.optimizer_digest)
                optimizer = Blob(result.optimizer_digest, result.optimizer_size_bytes)
        finally:
            out.unlink(missing_ok=True)
            out_optimizer.unlink(missing_ok=True)
        coverage = min(result.coverage.values(), default=0)
        return FoldOutcome(Blob(result.digest, result.size_bytes), optimizer, coverage, result.update_norm)

    async def _evaluate(self, job: LiveJob, number: int, state: Blob) -> None:
        assert job.machine.prepared is not None
        try:
            evaluation = await self._host.evaluate(
                job.machine.prepared.base_folder, job.recipe, self.blobs.path(state.digest), Path(job.spec.evaluation.heldout)
            )
        except HostError as error:
            self.post(job.job_id, machine.HostFailed("evaluating", error.failure))
            return
        self.post(job.job_id, machine.HeldoutEvaluated(number, evaluation))

    async def _publish(self, job: LiveJob, entry: RoundEntry) -> None:
        """Write the round's folder and let go of what it replaces."""
        prepared = job.machine.prepared
        assert prepared is not None
        await self._on_disk(self._publish_now, job, entry, prepared)
        await self._drop_updates(entry)
        await self._drop_old_states(job)
        job.touch()

    def _publish_now(self, job: LiveJob, entry: RoundEntry, prepared: Prepared) -> None:
        try:
            adapter.write(self.jobs_folder, self.blobs, adapter.Adapter(job.job_id, job.spec, prepared, entry))
        except OSError as error:
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
            if entry.number in self._kept(job) and entry.state is not None and self.blobs.has(entry.state.digest):
                self._publish_now(job, entry, job.machine.prepared)

    async def _drop_updates(self, entry: RoundEntry) -> None:
        await self._forget({task.update.blob.digest for task in entry.trained() if task.update})

    async def _drop_old_states(self, job: LiveJob) -> None:
        kept = self._kept(job)
        old = [entry for entry in job.history if entry.number not in kept and entry.state is not None]
        digests: set[str] = set()
        for entry in old:
            if await self._on_disk(adapter.folder(self.jobs_folder, job.job_id, entry.number).exists):
                await self._on_disk(adapter.drop, self.jobs_folder, job.job_id, entry.number)
                assert entry.state is not None
                digests.add(entry.state.digest)
                if entry.optimizer is not None:
                    digests.add(entry.optimizer.digest)
        await self._forget(digests)

    def _kept(self, job: LiveJob) -> set[int]:
        last = range(max(1, job.machine.committed - self._settings.keep_rounds + 1), job.machine.committed + 1)
        return {*last, job.machine.best_round}

    def _needed(self) -> set[str]:
        """Digests that some job still stands on."""
        needed: set[str] = set()
        for job in self.jobs.values():
            kept = self._kept(job)
            for entry in job.history:
                if entry.number in kept and entry.state is not None:
                    needed.add(entry.state.digest)
            if job.ended:
                continue
            for blob in (job.machine.state, job.machine.optimizer):
                if blob is not None:
                    needed.add(blob.digest)
            if job.machine.prepared is not None:
                needed.update(digest for _, digest, _ in job.machine.prepared.files)
            if (entry_ := job.machine.round) is not None:
                needed.update(b.digest for b in (entry_.start_state, entry_.state, entry_.optimizer) if b is not None)
                needed.update(t.update.blob.digest for t in entry_.trained() if t.update)
        return needed

    async def _forget(self, digests: set[str]) -> None:
        """Delete blobs that nothing needs: the row first, so that no row ever names a missing blob."""
        doomed = digests - self._needed()
        if not doomed:
            return
        await self._database.write(lambda tx: records.drop_blobs(tx, doomed))
        for digest in doomed:
            await self._on_disk(self.blobs.delete, digest)

    async def _wrap_up(self, job: LiveJob) -> None:
        if job.machine.committed:
            with contextlib.suppress(FileNotFoundError):
                await self._on_disk(adapter.point, self.jobs_folder, job.job_id, "final", job.machine.committed)
        if job.machine.optimizer is not None:
            await self._forget({job.machine.optimizer.digest})
        if not any(other.spec.evaluation.source == "heldout" for other in self._open_jobs()):
            await self._host.rest()
        self._wake()

    # -- small parts

    async def _take(self, task_id: str, device_id: str, event: machine.Event) -> Receipt:
        job = self.job_of_task(task_id)
        parts = task_id.split("/")
        if job is None or len(parts) < 4 or parts[2] != device_id:
            return Receipt("refused", f"no task {task_id!r} of this device is known")
        if job.ended:
            return Receipt("late", "the job has ended")
        return await self.ask(job.job_id, event)

    async def _refuse(self, job: LiveJob, task_id: str, failure: Failure) -> Receipt:
        await self.ask(job.job_id, machine.TaskFailed(task_id, failure))
        return Receipt("refused", failure.message)

    async def _table(self, job: LiveJob) -> codec.TensorTable:
        if job.table is None:
            assert job.machine.state is not None
            job.table = await self._on_disk(codec.read_table, self.blobs.path(job.machine.state.digest))
        return job.table

    async def _on_disk(self, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """The one way from the event loop to blocking work that is neither database nor fold."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, functools.partial(call, *arguments, **named))

    def _spawn(self, job: LiveJob, coroutine: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        for keeper in (self._work, job.work):
            keeper.add(task)
            task.add_done_callback(keeper.discard)
        task.add_done_callback(_log_failure)

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
        for job in self._open_jobs():
            for task_id in self._watched_tasks(job):
                still_s = self._monotonic() - job.progress[task_id].moved_monotonic_s
                if still_s >= self._settings.stall_s:
                    stage = f"no step for {still_s:.0f} s"
                    entry = job.machine.open_task(task_id)
                    self.post(
                        job.job_id,
                        machine.TaskFailed(
                            task_id, Failure("stalled", "train", f"the device is connected but its task has not moved: {stage}.")
                        ),
                    )
                    if entry is not None and self._dispatcher is not None:
                        self._dispatcher.withdraw(entry.device_id, task_id, stage)
            self.post(job.job_id, machine.Ticked())

    def _live(self, job_id: str, spec: jobspec.JobSpec, toml: str, submit_id: str, submitted: float, state: JobMachine) -> LiveJob:
        return LiveJob(job_id, spec, toml, submit_id, submitted, METHODS[spec.method.name], recipes.recipe(spec), state)

    def _new_id(self, name: str) -> str:
        while True:
            job_id = f"{name}-{uuid.uuid4().hex[:4]}"
            if job_id not in self.jobs:
                return job_id


def _is_full(error: OperationalError | OSError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "database or disk is full" in str(error.orig)


def _same_or_other(known: str, digest: str) -> Receipt:
    if known == digest:
        return Receipt("duplicate")
    return Receipt("refused", f"this task's result was received before, with digest {known[:12]}; this one has {digest[:12]}.")


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s failed", task.get_name(), exc_info=error)

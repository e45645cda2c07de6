"""The engine: the one writer of all jobs. Events in, one transaction, then the commands go out.

The simple version, a transaction per event, makes a round of N devices wait for N fsyncs of the database one after the other.
Here the loop takes every event that has arrived while the last transaction was written, lets the machines decide on all of them,
commits the lot at once and only then acts and answers. Under load the groups grow by themselves; alone, an event waits for nothing.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import shutil
import time
import traceback
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from google.protobuf.message import Message
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from fleetune.coordinator import jobfolders, jobspec, recipes
from fleetune.coordinator.domain import Candidate, Failure, RoundEntry, TaskEntry, TaskKind
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.table import METHODS
from fleetune.coordinator.registry import Registry, Session
from fleetune.coordinator.rounds import adapter, admission, damage, machine, needs, planning
from fleetune.coordinator.rounds.admission import Admission
from fleetune.coordinator.rounds.batch import Batch
from fleetune.coordinator.rounds.folding import Folding
from fleetune.coordinator.rounds.history import History
from fleetune.coordinator.rounds.host import ModelHost
from fleetune.coordinator.rounds.inspection import Inspection
from fleetune.coordinator.rounds.job import LiveJob, Progress, plan_of
from fleetune.coordinator.rounds.machine import JobMachine
from fleetune.coordinator.rounds.means import Means
from fleetune.coordinator.rounds.needs import JobFacts, Trim
from fleetune.coordinator.rounds.orders import Dispatcher, Order, Receipt
from fleetune.coordinator.rounds.preparation import Preparation
from fleetune.coordinator.rounds.publication import Publication
from fleetune.coordinator.rounds.retention import Garbage, Retention, rounds_kept
from fleetune.coordinator.rounds.uplinks import Uplinks
from fleetune.coordinator.store import records
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.coordinator.store.db import Database
from fleetune.errors import DiskFullError, DurabilityError
from fleetune.workers import Workers

log = logging.getLogger("fleetune.engine")

P = ParamSpec("P")
T = TypeVar("T")

EVENTS_QUEUED_MAX = 100_000
"""Events waiting for the writer; a fleet that outruns it is slowed by its unanswered uploads long before."""

STALL_S = 900.0
"""A task whose stage and count have not moved for so long is taken for stuck. A step may take minutes on a small board."""

COMMIT_RETRY_S = 1.0


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


_Deed = (
    machine.Prepare
    | machine.PlanRound
    | machine.SeekSpares
    | machine.WithdrawTask
    | machine.Fold
    | machine.EvaluateHeldout
    | machine.CommitRound
    | machine.AbandonRound
    | machine.EndJob
)
"""Every command but SendTask, which needs to know what else is sent."""

_Assigned = dict[tuple[str, TaskKind], Mapping[str, Message]]
"""(job id, kind of task) -> what its method assigned to the devices of the open round."""


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
        self._planner = Workers("plan")
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._submitting = asyncio.Lock()
        self._scratch = settings.state_dir / "scratch"
        self.jobs_folder = settings.state_dir / "jobs"
        self.retention = Retention(blobs, database, self.jobs_folder, self._disk, self._all_facts, self._start_unless_closing, monotonic)
        self._fatal: DurabilityError | None = None
        self.on_committed: Callable[[Batch], None] = _ignore
        """Hears of each group of events once it is committed, before anything is sent; raises nothing."""
        database.on_broken = self.give_up
        means = Means(
            jobs=self.jobs,
            blobs=blobs,
            database=database,
            retention=self.retention,
            host=host,
            disk=self._disk,
            fold_thread=self._folder,
            scratch=self._scratch,
            jobs_folder=self.jobs_folder,
            wall=wall,
            post=self.post,
            ask=self.ask,
            give_up=self.give_up,
            note_room=self.note_room,
        )
        self._inspection = Inspection(means)
        self._preparation = Preparation(means)
        self._folding = Folding(means, self._inspection)
        self._publication = Publication(means)
        self.admission = Admission(means, registry, self._inspection, self._spawn)
        """What devices send in goes there."""
        self.uplinks = Uplinks(self.jobs, registry, monotonic, self._set_uplink)
        """Hears of each upload's beginning and end."""

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
            job.keep_rounds = await self._database.read(
                functools.partial(rounds_kept, job_id=row.job_id, default=self._settings.keep_rounds)
            )
            job.history = await self._database.read(functools.partial(_remembered, job=job))
            self.jobs[row.job_id] = job
        for job in self.jobs.values():
            if ailment := await self._on_disk(damage.ailment, self.blobs, self.jobs_folder, damage.standing(job.facts)):
                self.post(job.job_id, machine.HostFailed("the check at start", Failure("internal", "storage", ailment)))
            if not job.ended:
                self.post(job.job_id, machine.Restarted(state_damaged=await self._inspection.fresh_state_withdrawn(job)))
                self._spawn(job, self._inspection.after_restart(job), f"check {job.job_id}")
            await self._on_disk(self._publication.mend_folders, job)
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
            self.retention.guard(self.jobs[job_id].facts for job_id in {item.job_id for item in items} if job_id in self.jobs)
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
        self.uplinks.close()
        self._folder.close()
        self._disk.close()
        self._planner.close()

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

    async def round_of(self, job: LiveJob, number: int) -> RoundEntry | None:
        """The record of a committed round; None where there is none of that number."""
        return await self._publication.round_of(job, number)

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

    # -- deciding

    def _decide(self, items: list[_Item]) -> Batch:
        batch = Batch()
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

    def _apply(self, batch: Batch, job: LiveJob, event: machine.Event, now: float) -> Receipt:
        """Let the machine decide on one event; the answer is the event's receipt."""
        before = admission.status_of(job, event)
        if before is not None and before.status != "accepted":
            return before
        if isinstance(event, machine.Folded):
            # As of now: since the fold ended, another job may have taken a device, or it has left.
            event = replace(event, candidates=self._candidates(job), absent=self._absent(job))
        elif isinstance(event, machine.SparesOffered):
            event = replace(event, candidates=tuple(c for c in self._candidates(job) if c.device_id in job.machine.figures))
        elif isinstance(event, machine.Planned):
            event = replace(event, gone=self._gone(job))
        elif isinstance(event, machine.UpdateDamaged):
            entry = job.machine.open_task(event.task_id)
            event = replace(event, online=entry is not None and entry.device_id in self.registry.sessions)
        elif isinstance(event, machine.ResumeRequested):
            event = replace(event, turn=self._running() < self._settings.parallel_jobs)
        message = job.machine.message
        commands = job.machine.handle(event, now)
        if isinstance(event, machine.Ticked | machine.Offered) and not commands:
            if job.machine.message != message:
                job.touch()
            return Receipt("accepted")
        if isinstance(event, machine.UpdateDamaged | machine.StateDamaged | machine.Planned) and not commands:
            return Receipt("accepted")  # it was about a lease or a phase that is over
        batch.events.append(records.EventRow(now, job.job_id, event))
        batch.jobs[job.job_id] = job
        batch.commands += [(job, command) for command in commands]
        batch.note(job, event, now)
        open_round = job.machine.round
        if isinstance(event, machine.Planned) and event.plan is not None and open_round is not None and open_round.plan is event.plan:
            job.expect(event.plan, now)
        for command in commands:
            if isinstance(command, machine.CommitRound):
                batch.rounds.append((job.job_id, command.entry))
                job.history.add(command.entry, needs.kept_rounds(job.facts))
        return Receipt("accepted")

    def _start_and_offer(self, batch: Batch, now: float) -> None:
        """Give queued jobs their turn and free devices to the jobs that wait for them, oldest job first."""
        open_jobs, running = self._open_jobs(), self._running()
        for job in open_jobs:
            if job.machine.status == "queued" and running < self._settings.parallel_jobs and not job.machine.paused:
                running += 1
                self._apply(batch, job, machine.Started(), now)
        for job in open_jobs:
            if job.machine.wants_devices():
                self._apply(batch, job, machine.Offered(self._candidates(job)), now)
        # Last: whoever can train somewhere now is not kept from it by being measured.
        for job in open_jobs:
            if job.machine.wants_newcomers() and not self.registry.sessions.keys() <= job.machine.figures.keys():
                self._apply(batch, job, machine.Offered(self._candidates(job)), now)

    def _running(self) -> int:
        """Jobs that have their turn."""
        return sum(job.machine.status not in ("queued", "paused") for job in self._open_jobs())

    def _candidates(self, job: LiveJob) -> tuple[Candidate, ...]:
        return self.registry.candidates(job.needs, self.busy_devices(), self._monotonic())

    def _absent(self, job: LiveJob) -> frozenset[str]:
        """Devices of the open round that are not connected."""
        tasks = job.machine.round.tasks.values() if job.machine.round is not None else ()
        return frozenset(task.device_id for task in tasks if task.device_id not in self.registry.sessions)

    def _gone(self, job: LiveJob) -> frozenset[str]:
        """Those of the devices that a round is planned over that may not take a task of it any more."""
        sessions, quarantined = self.registry.sessions, self.registry.quarantined
        held = (candidate.device_id for candidate in job.machine.held)
        return frozenset(d for d in held if d not in sessions or not sessions[d].accepts_tasks or d in quarantined)

    def busy_devices(self) -> set[str]:
        """Devices that hold an open task of any job."""
        return {device for job in self._open_jobs() for device in job.machine.busy_devices()}

    def _open_jobs(self) -> list[LiveJob]:
        return sorted((job for job in self.jobs.values() if not job.ended), key=lambda job: job.submitted_unix_s)

    # -- committing

    async def _commit(self, batch: Batch) -> None:
        """One transaction for the whole group. A full disk holds everything up until there is space; nothing is sent before."""
        if not batch.events:
            return
        machines = batch.machines()

        def change(tx: Connection) -> None:
            # The blobs' folders first: a row must never name a blob that a power cut takes away.
            self.blobs.sync()
            batch.write(tx, machines)

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

    def _act(self, batch: Batch) -> None:
        self.on_committed(batch)
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
                self._spawn(job, self._preparation.prepare(job), f"prepare {job.job_id}", stage="preparing")
            case machine.PlanRound():
                number = job.machine.round.number if job.machine.round is not None else 0
                self._spawn(job, self._plan_round(job, command), f"plan {job.job_id}/{number}", stage="planning")
            case machine.SeekSpares(number):
                self.post(job.job_id, machine.SparesOffered(number, ()))
            case machine.Fold():
                self._spawn(job, self._folding.fold(job, command), f"fold {job.job_id}/{command.round_number}", stage="folding")
            case machine.EvaluateHeldout(number, state):
                self._spawn(job, self._folding.evaluate(job, number, state), f"evaluate {job.job_id}/{number}", stage="evaluating")
            case machine.CommitRound(entry):
                log.info("job=%s round=%d committed devices=%d metrics=%s", job.job_id, entry.number, len(entry.trained()), entry.metrics)
                job.progress.clear()
                job.suspect = False
                self._spawn(job, self._publication.publish(job, entry), f"publish {job.job_id}/{entry.number}")
            case machine.AbandonRound(entry, reason):
                log.warning("job=%s round=%d abandoned reason=%r", job.job_id, entry.number, reason)
                job.progress.clear()
                self._spawn(job, self._publication.drop_round(entry), f"clear {job.job_id}/{entry.number}")
            case machine.EndJob(status):
                log.info("job=%s ended status=%s message=%r", job.job_id, status, job.machine.message)
                for task in job.on_host:
                    task.cancel()
                self._spawn(job, self._wrap_up(job), f"wrap up {job.job_id}")

    def _send(self, job: LiveJob, command: machine.SendTask, assigned: _Assigned) -> None:
        round_ = job.machine.round
        # Without a round only newcomers are measured.
        if self._dispatcher is None or (round_ is None and command.kind != "measure"):
            return
        payload = assigned.get((job.job_id, command.kind))
        if payload is None:
            # Once for all tasks of a batch: the method assigns the whole round.
            kind, prepared = "measure" if command.kind == "measure" else "train", job.machine.prepared
            tasks = list(round_.tasks.values()) if round_ is not None else []
            facts = RoundFacts(
                number=command.round_number,
                devices=sorted(task.device_id for task in tasks if task.kind == kind) or [command.device_id],
                plan=round_.plan if round_ is not None and kind == "train" else None,
                depth_count=len(prepared.blocks) if prepared is not None else 0,
                prunings=job.machine.prunings(command.kind),
                importance=job.machine.importance,
                names={task.device_id: task.device_name for task in tasks},
                ranks=job.machine.ranks_of(command.kind),
            )
            payload = assigned[job.job_id, command.kind] = job.method.assign(job.spec, facts)
        message = payload.get(command.device_id) or next(iter(payload.values()))
        if command.kind == "train" and round_ is not None and (told := round_.pruning_of(command.device_id)) is not None and told.note:
            device = round_.tasks[command.task_id].device_name
            log.warning("job=%s round=%d device=%s %s", job.job_id, round_.number, device, told.note)
        deadline_s = max(0.1, command.deadline_unix_s - self._wall()) if command.deadline_unix_s > 0 else 0.0
        job.progress[command.task_id] = Progress(moved_monotonic_s=self._monotonic())
        self.uplinks.handed_out(command.task_id)
        uplink_bits_per_s = command.part.uplink_bits_per_s if command.part is not None else 0.0
        self._dispatcher.send_task(Order(command, job, message, deadline_s, uplink_bits_per_s))

    async def _plan_round(self, job: LiveJob, command: machine.PlanRound) -> None:
        """Beside the loop: a thousand devices take a good part of a second."""
        began_s = self._monotonic()
        made = await self._planner.run(planning.plan_round, command.request)
        log.debug("job=%s planned devices=%d seconds=%.3f", job.job_id, len(command.request.candidates), self._monotonic() - began_s)
        if isinstance(made, str):
            self.post(job.job_id, machine.Planned(command.asked, None, made))
        else:
            self.post(job.job_id, machine.Planned(command.asked, made))

    def _set_uplink(self, device_id: str, task_id: str, bits_per_s: float) -> None:
        if self._dispatcher is not None:
            self._dispatcher.set_uplink(device_id, task_id, bits_per_s)

    def _all_facts(self) -> list[JobFacts]:
        return [job.facts for job in self.jobs.values()]

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


def _remembered(connection: Connection, job: LiveJob) -> History:
    """What the job's stored rounds leave in memory."""
    return History.of(records.load_rounds(connection, job.job_id), needs.kept_numbers(job.machine, job.keep_rounds))


def _ignore(batch: Batch) -> None:
    return


def _is_full(error: OperationalError) -> bool:
    return "database or disk is full" in str(error.orig)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s failed", task.get_name(), exc_info=error)

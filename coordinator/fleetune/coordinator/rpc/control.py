"""ControlService: what operators ask. Reads the engine's jobs and hands their wishes in as events."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn, Protocol

import grpc

from fleetune.coordinator import jobspec
from fleetune.coordinator.certificates import Roster
from fleetune.coordinator.domain import DeviceFigures
from fleetune.coordinator.registry import Registry
from fleetune.coordinator.rounds import adapter, machine
from fleetune.coordinator.rounds.engine import Engine
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rpc import convert, gate, jobpages, pastrounds
from fleetune.coordinator.rpc.fleet import FleetService
from fleetune.coordinator.store import records
from fleetune.coordinator.store.db import Database
from fleetune.errors import DiskFullError
from fleetune.v1 import control_pb2, control_pb2_grpc, fleet_pb2, messages_pb2
from fleetune.wire import channel

log = logging.getLogger("fleetune.control")

AUDIT_ENTRIES_MAX = 10_000

WATCH_INTERVAL_S = 0.25
"""A watcher hears of a job at most so often."""


class Aborting(Protocol):
    """The part of a servicer context that tells who calls, and ends a call."""

    async def abort(self, code: grpc.StatusCode, details: str = ..., trailing_metadata: tuple[()] = ...) -> NoReturn: ...

    def peer(self) -> str: ...


class ControlService(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, engine: Engine, fleet: FleetService, registry: Registry, database: Database, version: str, roster: Roster) -> None:
        self._engine = engine
        self._fleet = fleet
        self._registry = registry
        self._database = database
        self._version = version
        self._roster = roster

    async def ServerInfo(self, request: control_pb2.ServerInfoRequest, context: Aborting) -> control_pb2.ServerInfoResponse:  # type: ignore[override]
        return control_pb2.ServerInfoResponse(
            version=self._version,
            protocol_major=channel.PROTOCOL_MAJOR,
            protocol_minor=channel.PROTOCOL_MINOR,
            devices_online=len(self._registry.sessions),
            jobs_running=sum(not job.ended for job in self._engine.jobs.values()),
        )

    async def ValidateJob(self, request: control_pb2.ValidateJobRequest, context: Aborting) -> control_pb2.ValidateJobResponse:  # type: ignore[override]
        try:
            await self._engine.checked(request.job_toml)
        except jobspec.JobFileError as error:
            return control_pb2.ValidateJobResponse(complaints=convert.complaints(error.complaints))
        return control_pb2.ValidateJobResponse()

    async def SubmitJob(self, request: control_pb2.SubmitJobRequest, context: Aborting) -> control_pb2.SubmitJobResponse:  # type: ignore[override]
        if not 8 <= len(request.submit_id) <= 64:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "submit_id must have 8 to 64 characters")
        try:
            job = await self._engine.submit(request.job_toml, request.submit_id)
        except jobspec.JobFileError as error:
            mistakes = ", ".join(complaint.path or "the file" for complaint in error.complaints)
            await self._note(context, "submit", "", "refused", f"mistakes in the job file: {mistakes}")
            return control_pb2.SubmitJobResponse(complaints=convert.complaints(error.complaints))
        except DiskFullError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        await self._note(context, "submit", job.job_id, "done", f"name={job.spec.name} method={job.method.name}")
        return control_pb2.SubmitJobResponse(job_id=job.job_id)

    async def ListJobs(self, request: control_pb2.ListJobsRequest, context: Aborting) -> control_pb2.ListJobsResponse:  # type: ignore[override]
        jobs = self._engine.jobs.values()
        try:
            views, more = jobpages.page(jobs, request.page_size, request.page_token, self._view, bytes_max=convert.ANSWER_BYTES_MAX)
        except jobpages.TokenError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return control_pb2.ListJobsResponse(jobs=views, next_page_token=more)

    async def GetJob(self, request: control_pb2.GetJobRequest, context: Aborting) -> control_pb2.GetJobResponse:  # type: ignore[override]
        job = await self._find(request.job_id, context)
        return control_pb2.GetJobResponse(job=await self._whole_view(job))

    async def WatchJob(  # type: ignore[override]
        self, request: control_pb2.WatchJobRequest, context: Aborting
    ) -> AsyncIterator[control_pb2.WatchJobResponse]:
        job = await self._find(request.job_id, context)
        told: int | None = None
        while True:
            changed = job.changed
            # The last folder is written after the commit: the last answer must name it.
            if job.ended:
                await self._engine.settled(job)
                yield control_pb2.WatchJobResponse(job=await self._whole_view(job))
                return
            view = self._view(job)
            if told is not None and told < view.rounds_committed:
                await pastrounds.add_since(view, told, job, self._database, frozenset(self._registry.sessions))
            told = view.rounds_committed
            yield control_pb2.WatchJobResponse(job=view)
            await asyncio.sleep(WATCH_INTERVAL_S)
            await changed.wait()

    async def CancelJob(self, request: control_pb2.CancelJobRequest, context: Aborting) -> control_pb2.CancelJobResponse:  # type: ignore[override]
        reason = convert.clean(request.reason, 200) or "cancelled by an operator"
        job = await self._tell(request.job_id, machine.CancelRequested(reason), "cancel", "cancelled", context, reason)
        return control_pb2.CancelJobResponse(job=self._view(job))

    async def PauseJob(self, request: control_pb2.PauseJobRequest, context: Aborting) -> control_pb2.PauseJobResponse:  # type: ignore[override]
        job = await self._tell(request.job_id, machine.PauseRequested(), "pause", "paused", context)
        return control_pb2.PauseJobResponse(job=self._view(job))

    async def ResumeJob(self, request: control_pb2.ResumeJobRequest, context: Aborting) -> control_pb2.ResumeJobResponse:  # type: ignore[override]
        job = await self._tell(request.job_id, machine.ResumeRequested(), "resume", "resumed", context)
        return control_pb2.ResumeJobResponse(job=self._view(job))

    async def ListDevices(self, request: control_pb2.ListDevicesRequest, context: Aborting) -> control_pb2.ListDevicesResponse:  # type: ignore[override]
        rows = await self._database.read(records.load_devices)
        told = self._figures()
        return control_pb2.ListDevicesResponse(devices=convert.fitting(self._device(row, told.get(row.device_id)) for row in rows))

    async def DescribeAdapter(  # type: ignore[override]
        self, request: control_pb2.DescribeAdapterRequest, context: Aborting
    ) -> control_pb2.DescribeAdapterResponse:
        job = await self._find(request.job_id, context)
        number = job.machine.best_round if request.best else request.round or job.machine.committed
        entry = await self._engine.round_of(job, number)
        tensors = entry.published if entry is not None else None
        if entry is None or tensors is None:
            known = f"rounds 1 to {job.machine.committed} are committed" if job.machine.committed else "no round is committed yet"
            what = "a best round" if request.best and not number else f"round {number}"
            await context.abort(grpc.StatusCode.NOT_FOUND, f"job {job.job_id} has no {what}: {known}")
        if not self._engine.blobs.has(tensors.digest):
            kept = ", ".join(str(e.number) for e in job.history if e.published and self._engine.blobs.has(e.published.digest))
            await context.abort(grpc.StatusCode.NOT_FOUND, f"round {number} of job {job.job_id} is no longer kept; kept are {kept}")
        assert job.machine.prepared is not None
        texts = adapter.texts(adapter.Adapter(job.job_id, job.spec, job.machine.prepared, entry))
        self._engine.retention.hold(tensors.digest)
        state = messages_pb2.BlobRef(digest=tensors.digest, size_bytes=tensors.size_bytes)
        files = [control_pb2.AdapterFile(name=adapter.STATE_FILE, blob=state)]
        files += [control_pb2.AdapterFile(name=name, inline=text.encode()) for name, text in sorted(texts.items())]
        return control_pb2.DescribeAdapterResponse(job_id=job.job_id, round=number, files=files)

    async def GetLogs(self, request: control_pb2.GetLogsRequest, context: Aborting) -> control_pb2.GetLogsResponse:  # type: ignore[override]
        job = await self._find(request.job_id, context)
        if request.device_name and request.device_name not in self._registry.names:
            known = ", ".join(sorted(self._registry.names)) or "none"
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no device is called {convert.clean(request.device_name, 63)!r}; known are {known}"
            )
        rows = await self._database.read(lambda c: records.load_logs(c, job.job_id, request.device_name))
        lines: list[control_pb2.LogLine] = []
        room = convert.ANSWER_BYTES_MAX
        for row in reversed(rows):
            line = control_pb2.LogLine(unix_s=row.unix_s, device_name=row.device_name, round=row.round_number, text=row.text)
            room -= line.ByteSize() + 8
            if room < 0:
                break
            lines.append(line)
        return control_pb2.GetLogsResponse(lines=lines[::-1])

    async def CollectGarbage(  # type: ignore[override]
        self, request: control_pb2.CollectGarbageRequest, context: Aborting
    ) -> control_pb2.CollectGarbageResponse:
        older_than_s = request.jobs_older_than_s
        if not 0.0 <= older_than_s < math.inf:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "jobs_older_than_s must be 0 or a number of seconds above it")
        try:
            found = await self._engine.collect_garbage(request.keep_rounds, older_than_s, dry_run=request.dry_run)
        except DiskFullError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        if not request.dry_run:
            await self._note(context, "gc", "", "done", f"blobs={found.blobs} folders={found.folders} spools={found.spools}")
        return control_pb2.CollectGarbageResponse(**asdict(found))

    async def ListAudit(self, request: control_pb2.ListAuditRequest, context: Aborting) -> control_pb2.ListAuditResponse:  # type: ignore[override]
        limit = min(request.limit or AUDIT_ENTRIES_MAX, AUDIT_ENTRIES_MAX)
        rows = await self._database.read(lambda c: records.load_audit(c, limit))
        entries: list[control_pb2.AuditEntry] = []
        room = convert.ANSWER_BYTES_MAX
        for row in reversed(rows):
            entry = control_pb2.AuditEntry(**row.__dict__)
            room -= entry.ByteSize() + 8
            if room < 0:
                break
            entries.append(entry)
        return control_pb2.ListAuditResponse(entries=entries[::-1])

    # -- small parts

    async def _find(self, name: str, context: Aborting) -> LiveJob:
        job = self._engine.find(name)
        if job is None:
            matches = [job_id for job_id in self._engine.jobs if name and job_id.startswith(name)]
            hint = f"it could be {', '.join(sorted(matches))}" if matches else "`fleetune jobs` shows all"
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no job is called {convert.clean(name, 80)!r}; {hint}")
        return job

    async def _tell(self, name: str, event: machine.Event, action: str, done: str, context: Aborting, detail: str = "") -> LiveJob:
        if self._engine.find(name) is None:
            await self._note(context, action, name, "refused", "no such job")
        job = await self._find(name, context)
        if job.ended:
            why = f"job {job.job_id} is {job.machine.status} and cannot be {done} any more"
            await self._note(context, action, job.job_id, "refused", why)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        await self._engine.ask(job.job_id, event)
        await self._note(context, action, job.job_id, "done", detail)
        return job

    async def _note(self, context: Aborting, action: str, subject: str, outcome: str, detail: str) -> None:
        """Write down what was asked, before it is answered. A full disk must not undo the answer: the log has the line then."""
        row = records.AuditRow(time.time(), _line(_actor(context), 100), action, _line(subject, 100), outcome, _line(detail, 1000))
        if not await self._database.try_write(lambda tx: records.add_audit(tx, row)):
            log.error("audit not written actor=%s action=%s subject=%s outcome=%s detail=%r", *_told(row))

    async def _whole_view(self, job: LiveJob) -> control_pb2.JobView:
        view = self._view(job, history=True)
        await pastrounds.add_all(view, job, self._database, frozenset(self._registry.sessions))
        return view

    def _view(self, job: LiveJob, history: bool = False) -> control_pb2.JobView:
        folder = ""
        if job.machine.committed:
            folder = str(Path(adapter.folder(self._engine.jobs_folder, job.job_id, job.machine.committed)).absolute())
        waiting = ""
        if job.machine.status == "waiting":
            reasons = self._registry.explain(job.needs, self._engine.busy_devices(), time.monotonic())
            waiting = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items())[:3])
        online = frozenset(self._registry.sessions)
        view = convert.job_view(job, folder, online=online, waiting=waiting, history=history)
        if self._engine.trouble and not job.ended:
            view.message = f"{self._engine.trouble}; goes on when there is room"
        return view

    def _figures(self) -> dict[str, tuple[str, DeviceFigures]]:
        """Device id -> the newest job that knows how fast it trains, and its figures."""
        jobs = sorted(self._engine.jobs.values(), key=lambda job: job.submitted_unix_s)
        return {device_id: (job.job_id, figures) for job in jobs for device_id, figures in job.machine.figures.items()}

    def _device(self, row: records.DeviceRow, told: tuple[str, DeviceFigures] | None) -> control_pb2.DeviceView:
        line = self._fleet.lines.get(row.device_id)
        hello = line.hello if line else fleet_pb2.Hello.FromString(row.hello)
        session = line.session if line else None
        train_names, validation_names = convert.rows_of(hello)
        view = control_pb2.DeviceView(
            device_id=row.device_id,
            name=row.name,
            online=line is not None,
            tags=hello.tags,
            profile=hello.profile,
            last_seen_unix_s=time.time() - (time.monotonic() - session.last_heard_s) if session else row.last_seen_unix_s,
            agent_version=convert.clean(hello.agent_version, 40),
            data_names=hello.data_names,
            train_data_names=train_names,
            validation_data_names=validation_names,
            updates_accepted=row.updates_accepted,
            failures=row.failures,
            last_failure=row.last_failure,
            address=session.greeting.address if session else "",
            quarantine=row.quarantine,
            revoked=self._roster.is_revoked(row.device_id, row.name),
        )
        if hello.HasField("link"):
            view.link.CopyFrom(hello.link)
        if told is not None:
            view.figures_job_id = told[0]
            view.figures.CopyFrom(convert.figures_message(told[1]))
        newest = self._roster.newest_of_device(row.device_id)
        if newest is not None:
            view.certificate_until_unix_s = newest.not_after_unix_s
        if session is not None:
            view.availability.CopyFrom(fleet_pb2.Availability(accepts_tasks=session.accepts_tasks, reason=session.reason))
        if line is not None and line.telemetry is not None:
            view.telemetry.CopyFrom(line.telemetry)
            view.task_id = line.telemetry.task_id
            job = self._engine.job_of_task(view.task_id)
            entry = job.machine.open_task(view.task_id) if job is not None else None
            if job is not None and entry is not None and entry.device_id == row.device_id:
                view.task.CopyFrom(convert.work_view(entry, job, frozenset((row.device_id,))))
        return view


def _actor(context: Aborting) -> str:
    """Who asked, and from where; without TLS only the latter is known."""
    caller = gate.caller()
    return context.peer() if caller.kind == "local" else f"{caller} {context.peer()}"


def _line(text: str, characters_max: int) -> str:
    return " ".join(convert.clean(text, characters_max).split())


def _told(row: records.AuditRow) -> tuple[str, str, str, str, str]:
    return row.actor, row.action, row.subject, row.outcome, row.detail

"""A small coordinator for operators' tools: ControlService and BlobService over real gRPC, its jobs set by the test."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from blake3 import blake3
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fleetune.v1 import blob_pb2, blob_pb2_grpc, control_pb2, control_pb2_grpc, messages_pb2
from fleetune.wire import channel

# A servicer context is generic in a way that says nothing here.
Context = Any

CHUNK_BYTES = 1000


@dataclass
class Fleet:
    """What the small coordinator knows; written by the test."""

    jobs: dict[str, control_pb2.JobView] = field(default_factory=dict[str, control_pb2.JobView])
    watched: list[control_pb2.JobView] = field(default_factory=list[control_pb2.JobView])
    """What a watch sends; then it goes on with the job in `jobs`, without its history as long as it runs."""
    devices: list[control_pb2.DeviceView] = field(default_factory=list[control_pb2.DeviceView])
    logs: list[control_pb2.LogLine] = field(default_factory=list[control_pb2.LogLine])
    garbage: control_pb2.CollectGarbageResponse = field(default_factory=control_pb2.CollectGarbageResponse)
    collected: list[control_pb2.CollectGarbageRequest] = field(default_factory=list[control_pb2.CollectGarbageRequest])
    audit: list[control_pb2.AuditEntry] = field(default_factory=list[control_pb2.AuditEntry])
    complaints: list[control_pb2.Complaint] = field(default_factory=list[control_pb2.Complaint])
    blobs: dict[str, bytes] = field(default_factory=dict[str, bytes])
    adapter: dict[str, bytes] = field(default_factory=dict[str, bytes])
    submitted: list[control_pb2.SubmitJobRequest] = field(default_factory=list[control_pb2.SubmitJobRequest])
    described: list[control_pb2.DescribeAdapterRequest] = field(default_factory=list[control_pb2.DescribeAdapterRequest])
    break_downloads_at: list[int] = field(default_factory=list[int])
    """Offsets at which a download breaks, once each."""
    damage: Callable[[blob_pb2.Chunk], None] | None = None
    watches_open: int = 0
    watch_ended: asyncio.Event = field(default_factory=asyncio.Event)
    hold_watch: asyncio.Event = field(default_factory=asyncio.Event)
    """A watch of a running job waits for it after `watched`."""

    def blob(self, data: bytes) -> messages_pb2.BlobRef:
        """Stores bytes and returns their address."""
        digest = blake3(data).hexdigest()
        self.blobs[digest] = data
        return messages_pb2.BlobRef(digest=digest, size_bytes=len(data))


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """The contract's words over a Fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    async def _find(self, name: str, context: Context) -> control_pb2.JobView:
        jobs = list(self.fleet.jobs.values())
        if name == "last" and jobs:
            return jobs[-1]
        found = [job for job in jobs if name and job.job_id.startswith(name)]
        if len(found) != 1:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no job is called {name!r}")
        return found[0]

    async def ServerInfo(self, request: control_pb2.ServerInfoRequest, context: Context) -> control_pb2.ServerInfoResponse:
        return control_pb2.ServerInfoResponse(version="0.0.test", protocol_major=1, devices_online=2, jobs_running=1)

    async def ValidateJob(self, request: control_pb2.ValidateJobRequest, context: Context) -> control_pb2.ValidateJobResponse:
        return control_pb2.ValidateJobResponse(complaints=self.fleet.complaints)

    async def SubmitJob(self, request: control_pb2.SubmitJobRequest, context: Context) -> control_pb2.SubmitJobResponse:
        self.fleet.submitted.append(request)
        if self.fleet.complaints:
            return control_pb2.SubmitJobResponse(complaints=self.fleet.complaints)
        return control_pb2.SubmitJobResponse(job_id=next(iter(self.fleet.jobs)))

    async def ListJobs(self, request: control_pb2.ListJobsRequest, context: Context) -> control_pb2.ListJobsResponse:
        return control_pb2.ListJobsResponse(jobs=[_bare(job) for job in self.fleet.jobs.values()])

    async def GetJob(self, request: control_pb2.GetJobRequest, context: Context) -> control_pb2.GetJobResponse:
        return control_pb2.GetJobResponse(job=await self._find(request.job_id, context))

    async def WatchJob(self, request: control_pb2.WatchJobRequest, context: Context) -> AsyncIterator[control_pb2.WatchJobResponse]:
        self.fleet.watches_open += 1
        try:
            await self._find(request.job_id, context)
            while self.fleet.watched:
                view = self.fleet.watched.pop(0)
                self.fleet.jobs[view.job_id] = view
                yield control_pb2.WatchJobResponse(job=_bare(view) if _runs(view) else view)
            if _runs(await self._find(request.job_id, context)):
                await self.fleet.hold_watch.wait()
            yield control_pb2.WatchJobResponse(job=await self._find(request.job_id, context))
        finally:
            self.fleet.watches_open -= 1
            self.fleet.watch_ended.set()

    async def CancelJob(self, request: control_pb2.CancelJobRequest, context: Context) -> control_pb2.CancelJobResponse:
        job = await self._change(request.job_id, control_pb2.JOB_STATE_CANCELLED, context)
        job.message = request.reason
        return control_pb2.CancelJobResponse(job=job)

    async def PauseJob(self, request: control_pb2.PauseJobRequest, context: Context) -> control_pb2.PauseJobResponse:
        return control_pb2.PauseJobResponse(job=await self._change(request.job_id, control_pb2.JOB_STATE_PAUSED, context))

    async def ResumeJob(self, request: control_pb2.ResumeJobRequest, context: Context) -> control_pb2.ResumeJobResponse:
        return control_pb2.ResumeJobResponse(job=await self._change(request.job_id, control_pb2.JOB_STATE_RUNNING, context))

    async def _change(self, name: str, state: control_pb2.JobState.ValueType, context: Context) -> control_pb2.JobView:
        job = await self._find(name, context)
        if not _runs(job):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"job {job.job_id} has ended")
        job.state = state
        return job

    async def ListDevices(self, request: control_pb2.ListDevicesRequest, context: Context) -> control_pb2.ListDevicesResponse:
        return control_pb2.ListDevicesResponse(devices=self.fleet.devices)

    async def DescribeAdapter(self, request: control_pb2.DescribeAdapterRequest, context: Context) -> control_pb2.DescribeAdapterResponse:
        self.fleet.described.append(request)
        job = await self._find(request.job_id, context)
        files = [
            control_pb2.AdapterFile(name=name, blob=self.fleet.blob(data))
            if name.endswith(".safetensors")
            else control_pb2.AdapterFile(name=name, inline=data)
            for name, data in self.fleet.adapter.items()
        ]
        return control_pb2.DescribeAdapterResponse(job_id=job.job_id, round=request.round or job.rounds_committed, files=files)

    async def GetLogs(self, request: control_pb2.GetLogsRequest, context: Context) -> control_pb2.GetLogsResponse:
        await self._find(request.job_id, context)
        if request.device_name and all(line.device_name != request.device_name for line in self.fleet.logs):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no device is called {request.device_name!r}")
        lines = [line for line in self.fleet.logs if request.device_name in ("", line.device_name)]
        return control_pb2.GetLogsResponse(lines=lines)

    async def CollectGarbage(self, request: control_pb2.CollectGarbageRequest, context: Context) -> control_pb2.CollectGarbageResponse:
        self.fleet.collected.append(request)
        return self.fleet.garbage

    async def ListAudit(self, request: control_pb2.ListAuditRequest, context: Context) -> control_pb2.ListAuditResponse:
        return control_pb2.ListAuditResponse(entries=self.fleet.audit[-request.limit :])


class BlobService(blob_pb2_grpc.BlobServiceServicer):
    """Downloads of a Fleet's blobs, in small chunks."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    async def Download(self, request: blob_pb2.DownloadRequest, context: Context) -> AsyncIterator[blob_pb2.DownloadResponse]:
        data = self.fleet.blobs.get(request.digest)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no blob {request.digest[:12]}")
        assert data is not None
        for offset in range(request.offset, len(data), CHUNK_BYTES):
            if offset in self.fleet.break_downloads_at:
                self.fleet.break_downloads_at.remove(offset)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")
            part = data[offset : offset + CHUNK_BYTES]
            chunk = blob_pb2.Chunk(offset=offset, data=part, crc32=zlib.crc32(part))
            if self.fleet.damage is not None:
                self.fleet.damage(chunk)
            yield blob_pb2.DownloadResponse(chunk=chunk, size_bytes=len(data))

    async def UploadStatus(self, request: blob_pb2.UploadStatusRequest, context: Context) -> blob_pb2.UploadStatusResponse:
        raise NotImplementedError

    async def Upload(self, request_iterator: AsyncIterator[blob_pb2.UploadRequest], context: Context) -> blob_pb2.UploadResponse:
        raise NotImplementedError

    async def Probe(self, request_iterator: AsyncIterator[blob_pb2.ProbeRequest], context: Context) -> blob_pb2.ProbeResponse:
        raise NotImplementedError


def _runs(job: control_pb2.JobView) -> bool:
    return job.state < control_pb2.JOB_STATE_COMPLETED


def _bare(job: control_pb2.JobView) -> control_pb2.JobView:
    """Without its history, as lists and watches send it."""
    bare = control_pb2.JobView()
    bare.CopyFrom(job)
    del bare.history[:]
    return bare


@asynccontextmanager
async def serving(fleet: Fleet, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[str]:
    """Serves `fleet` on loopback, in plaintext without credentials; yields HOST:PORT."""
    server = grpc.aio.server(options=channel.server_options())
    control_pb2_grpc.add_ControlServiceServicer_to_server(ControlService(fleet), server)
    blob_pb2_grpc.add_BlobServiceServicer_to_server(BlobService(fleet), server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def adapter_files() -> dict[str, bytes]:
    """Files of a PEFT folder in shape, not in sense."""
    return {
        "adapter_model.safetensors": bytes(range(256)) * 20,
        "adapter_config.json": json.dumps({"peft_type": "LORA"}).encode(),
        "README.md": b"# an adapter\n",
    }


def dead_address() -> str:
    """An address on which nobody listens, and which the system gives to nobody who asks for any."""
    return "127.0.0.1:1"

"""The operator's side of the coordinator's API: ask, watch, fetch an adapter."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc
import grpc.aio

from fleetune.complaints import Complaint, ComplaintsError
from fleetune.coordinator.faults import CoordinatorFaultError, FolderInUseError, MachineError, NotFoundError, RefusedError
from fleetune.errors import DiskFullError, FleetuneError, UnreachableError, WireError
from fleetune.v1 import blob_pb2, control_pb2, control_pb2_grpc
from fleetune.wire import channel as wire_channel
from fleetune.wire import checksums, digests, frames
from fleetune.wire.identity import Identity

UNARY_DEADLINE_S = 10.0
"""Every unary call of the API is answered from memory or SQLite: longer means that nobody answers."""

COLLECT_DEADLINE_S = 600.0
"""Clearing away is the exception: thousands of files on a slow disk take their time."""

RECONNECT_S = 60.0
"""How long a watch waits for a coordinator that restarts."""

RECONNECT_PAUSE_S = 0.5

DOWNLOAD_ATTEMPTS = 5

ADAPTER_BYTES_MAX = 1 << 40
"""Nobody's adapter is a terabyte: a declared size above it is a mistake or an attack."""

_ENDED = frozenset({control_pb2.JOB_STATE_COMPLETED, control_pb2.JOB_STATE_FAILED, control_pb2.JOB_STATE_CANCELLED})

Reply = TypeVar("Reply")
Self = TypeVar("Self", bound="Client")


def has_ended(job: control_pb2.JobView) -> bool:
    """True where the job will not change any more."""
    return job.state in _ENDED


@dataclass(frozen=True)
class Exported:
    """An adapter folder as it lies on disk now."""

    folder: Path
    job_id: str
    round: int
    files: int
    size_bytes: int


class Client:
    """One connection to a coordinator; used with `async with`."""

    def __init__(self, address: str, identity: Identity | None = None) -> None:
        """ValueError for what is no address; ConfigError without an identity for any host but loopback."""
        wire_channel.split_address(address)
        self.address = address
        self._identity = identity
        self._channel = wire_channel.open_channel(address, identity)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)
        # Bulk on a connection of its own, opened by the first download.
        self._blob_channel: grpc.aio.Channel | None = None

    async def __aenter__(self: Self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._channel.close()
        if self._blob_channel is not None:
            await self._blob_channel.close()

    async def server_info(self) -> control_pb2.ServerInfoResponse:
        """Version and counts of the coordinator."""
        return await self._unary(self._control.ServerInfo(control_pb2.ServerInfoRequest(), timeout=UNARY_DEADLINE_S))

    async def serving(self) -> bool:
        """The standard gRPC health answer; False while the coordinator starts or drains."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        # The stubs of grpc_health give the class no methods of its own.
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        reply = await self._unary(stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=UNARY_DEADLINE_S))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def submit(self, job_toml: str) -> str:
        """The new job's id; ComplaintsError with every complaint where the file is wrong."""
        request = control_pb2.SubmitJobRequest(job_toml=job_toml, submit_id=uuid.uuid4().hex)
        reply = await self._unary(self._control.SubmitJob(request, timeout=UNARY_DEADLINE_S))
        if reply.complaints:
            raise ComplaintsError(
                "the job file", [Complaint(item.path, item.value, item.allowed, item.remedy) for item in reply.complaints]
            )
        return reply.job_id

    async def jobs(self, newest: int | None = None) -> list[control_pb2.JobView]:
        """The jobs that the coordinator knows, without their history, the oldest first; all, or only so many of the newest."""
        found: list[control_pb2.JobView] = []
        token = ""
        while True:
            left = 0 if newest is None else newest - len(found)
            request = control_pb2.ListJobsRequest(page_size=left, page_token=token)
            reply = await self._unary(self._control.ListJobs(request, timeout=UNARY_DEADLINE_S))
            found = [*reply.jobs, *found]
            token = reply.next_page_token
            # An older coordinator knows no pages and tells all.
            if not token or not reply.jobs or (newest is not None and len(found) >= newest):
                return found if newest is None else found[-newest:]

    async def job(self, job: str) -> control_pb2.JobView:
        """A job with its history; `job` is an id, an unambiguous beginning of one, or "last"."""
        reply = await self._unary(self._control.GetJob(control_pb2.GetJobRequest(job_id=job), timeout=UNARY_DEADLINE_S))
        return reply.job

    async def cancel(self, job: str, reason: str) -> control_pb2.JobView:
        """End a job; its last committed adapter stays."""
        request = control_pb2.CancelJobRequest(job_id=job, reason=reason)
        return (await self._unary(self._control.CancelJob(request, timeout=UNARY_DEADLINE_S))).job

    async def pause(self, job: str) -> control_pb2.JobView:
        """Start no further round until resumed."""
        return (await self._unary(self._control.PauseJob(control_pb2.PauseJobRequest(job_id=job), timeout=UNARY_DEADLINE_S))).job

    async def resume(self, job: str) -> control_pb2.JobView:
        """Let a paused job go on."""
        return (await self._unary(self._control.ResumeJob(control_pb2.ResumeJobRequest(job_id=job), timeout=UNARY_DEADLINE_S))).job

    async def devices(self) -> list[control_pb2.DeviceView]:
        """Every device that ever joined."""
        reply = await self._unary(self._control.ListDevices(control_pb2.ListDevicesRequest(), timeout=UNARY_DEADLINE_S))
        return list(reply.devices)

    async def logs(self, job: str, device_name: str = "") -> list[control_pb2.LogLine]:
        """What the training children of a job wrote."""
        request = control_pb2.GetLogsRequest(job_id=job, device_name=device_name)
        return list((await self._unary(self._control.GetLogs(request, timeout=UNARY_DEADLINE_S))).lines)

    async def collect_garbage(self, *, keep_rounds: int, jobs_older_than_s: float, dry_run: bool) -> control_pb2.CollectGarbageResponse:
        """Remove, or with `dry_run` only count, what no running job and no kept adapter needs."""
        request = control_pb2.CollectGarbageRequest(dry_run=dry_run, keep_rounds=keep_rounds, jobs_older_than_s=jobs_older_than_s)
        return await self._unary(self._control.CollectGarbage(request, timeout=COLLECT_DEADLINE_S))

    async def audit(self, limit: int = 0) -> list[control_pb2.AuditEntry]:
        """What operators asked for, the newest last; `limit` 0 takes all that an answer holds."""
        request = control_pb2.ListAuditRequest(limit=limit)
        return list((await self._unary(self._control.ListAudit(request, timeout=UNARY_DEADLINE_S))).entries)

    async def watch(self, job: str, on_trouble: Callable[[str], None] | None = None) -> AsyncIterator[control_pb2.JobView]:
        """The job with its history now and after each change, until it has ended.

        A coordinator that answered once may be away for RECONNECT_S; `on_trouble` then gets a line for a person, and an
        empty one when it is back. UnreachableError after that, NotFoundError where there is no such job.
        """
        seen = await self.job(job)
        yield seen
        history = {item.round: item for item in seen.history}
        lost_at: float | None = None
        while not has_ended(seen):
            try:
                call = self._control.WatchJob(control_pb2.WatchJobRequest(job_id=seen.job_id))
                try:
                    async for reply in call:
                        if lost_at is not None:
                            lost_at = None
                            _tell(on_trouble, "")
                        seen = await self._with_history(reply.job, history)
                        yield seen
                finally:
                    call.cancel()
                if has_ended(seen):
                    return
                trouble: FleetuneError = UnreachableError(f"the coordinator at {self.address} ended the watch.")
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise self._meaning(error) from error
                trouble = self._meaning(error)
            except UnreachableError as error:
                trouble = error
            now = time.monotonic()
            lost_at = now if lost_at is None else lost_at
            if now - lost_at > RECONNECT_S:
                raise trouble
            _tell(on_trouble, f"lost the coordinator at {self.address}; trying again for {RECONNECT_S - (now - lost_at):.0f} s")
            await asyncio.sleep(RECONNECT_PAUSE_S)

    async def _with_history(self, view: control_pb2.JobView, history: dict[int, control_pb2.RoundView]) -> control_pb2.JobView:
        # Only the last response carries the history: ask for it when a round was committed that we have not seen.
        history.update({item.round: item for item in view.history})
        if view.rounds_committed and view.rounds_committed not in history:
            fresh = await self.job(view.job_id)
            history.update({item.round: item for item in fresh.history})
        if len(view.history) < len(history):
            del view.history[:]
            view.history.extend(history[number] for number in sorted(history))
        return view

    async def export(
        self,
        job: str,
        folder: Path,
        *,
        round_number: int = 0,
        best: bool = False,
        force: bool = False,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Exported:
        """The adapter of a round as a folder: complete and verified, or not there at all.

        Round 0 is the final one (the latest while the job runs). FolderInUseError where `folder` holds something, unless
        `force`: then files of the same names are replaced and others stay.
        """
        folder = _target(folder, force)
        request = control_pb2.DescribeAdapterRequest(job_id=job, round=round_number, best=best)
        described = await self._unary(self._control.DescribeAdapter(request, timeout=UNARY_DEADLINE_S))
        _check_names(described)
        try:
            return await self._fetch_folder(described, folder, on_bytes)
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT):
                raise DiskFullError(f"no space left for the adapter at {folder}.", "Free some space or name another folder.") from error
            raise MachineError(f"cannot write the adapter to {folder}: {error.strerror or error}.", "Name another folder.") from error

    async def _fetch_folder(
        self, described: control_pb2.DescribeAdapterResponse, folder: Path, on_bytes: Callable[[int], None] | None
    ) -> Exported:
        aside = _make_aside(folder)
        try:
            size_bytes = 0
            for item in described.files:
                path = aside / item.name
                if item.inline or not item.blob.digest:
                    path.write_bytes(item.inline)
                    size_bytes += len(item.inline)
                else:
                    await self._download(item, path, on_bytes)
                    size_bytes += item.blob.size_bytes
            _put_in_place(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return Exported(folder, described.job_id, described.round, len(described.files), size_bytes)

    async def _download(self, item: control_pb2.AdapterFile, path: Path, on_bytes: Callable[[int], None] | None) -> None:
        """One blob into `path`, going on where a cut left off."""
        digest = digests.running()
        offset = 0
        with path.open("wb") as file:
            for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
                try:
                    async for data in self._chunks(item, offset):
                        await asyncio.to_thread(file.write, data)
                        digest.update(data)
                        offset += len(data)
                        if on_bytes is not None:
                            on_bytes(len(data))
                except UnreachableError:
                    if attempt == DOWNLOAD_ATTEMPTS:
                        raise
                    await asyncio.sleep(RECONNECT_PAUSE_S * attempt)
                    continue
                break
            await asyncio.to_thread(_sync, file.fileno(), file.flush)
        if offset != item.blob.size_bytes or digest.hexdigest() != item.blob.digest:
            raise WireError(
                f"{item.name} arrived with {offset} bytes and digest {digest.hexdigest()[:12]}, "
                f"declared were {item.blob.size_bytes} bytes and {item.blob.digest[:12]}.",
                "Try again; if it stays, the coordinator's blob is damaged.",
            )

    async def _chunks(self, item: control_pb2.AdapterFile, offset: int) -> AsyncIterator[bytes | memoryview]:
        if self._blob_channel is None:
            self._blob_channel = wire_channel.open_channel(self.address, self._identity)
        call = frames.download(self._blob_channel)(blob_pb2.DownloadRequest(digest=item.blob.digest, offset=offset))
        try:
            async for reply in call:
                chunk = reply.chunk or frames.chunk_of(offset, b"")
                if chunk.offset != offset or offset + len(chunk.data) > item.blob.size_bytes:
                    raise WireError(f"{item.name}: a chunk at offset {chunk.offset} came where {offset} of {item.blob.size_bytes} was due.")
                if checksums.crc32(chunk.data) != chunk.crc32:
                    raise WireError(f"{item.name}: the chunk at offset {offset} has a wrong checksum.", "Try again.")
                offset += len(chunk.data)
                yield chunk.data
        except grpc.aio.AioRpcError as error:
            raise self._meaning(error) from error
        finally:
            call.cancel()

    async def _unary(self, call: Awaitable[Reply]) -> Reply:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._meaning(error) from error

    def _untrusted(self, why: str) -> UnreachableError:
        if self._identity is None:
            return UnreachableError(
                f"what answers at {self.address} does not speak plaintext: a coordinator with TLS, or another program.",
                "Leave out --plaintext, or check the port.",
            )
        if why == "certificate":
            return UnreachableError(
                f"what answers at {self.address} has no certificate from the authority of your identity.",
                "Check the address; if the fleet's authority was made anew, join again with `fleetune join`.",
            )
        if why == "plaintext":
            return UnreachableError(
                f"what answers at {self.address} does not speak TLS: a coordinator with --plaintext, or another program.",
                "Check the port, or give --plaintext for a coordinator on this machine.",
            )
        return UnreachableError(
            f"the coordinator at {self.address} closed the connection when it saw the certificate of {self._identity.facts.name!r}: it is "
            "from another authority, or over by the coordinator's clock.",
            "Compare the clocks of both machines; another identity is named with --identity DIR.",
        )

    def _meaning(self, error: grpc.aio.AioRpcError) -> FleetuneError:
        code, details = error.code(), (error.details() or "").strip()
        if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details and (why := _handshake_trouble(details)):
            return self._untrusted(why)
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return UnreachableError(
                f"no coordinator answers at {self.address}.",
                "Start one with `fleetune serve`, or give its address with --coordinator HOST:PORT.",
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnreachableError(
                f"the coordinator at {self.address} did not answer within {UNARY_DEADLINE_S:.0f} s.",
                "Look whether it is overloaded or stopped, and whether something else listens there.",
            )
        if code is grpc.StatusCode.NOT_FOUND:
            return NotFoundError(_sentence(details or "the coordinator knows nothing of that name"))
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return RefusedError(f"what answers at {self.address} is no Fleetune coordinator, or one of another version.")
        if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS):
            return CoordinatorFaultError(
                f"the coordinator at {self.address} failed to answer: {_sentence(details or code.name)}", "Its log says more."
            )
        return RefusedError(_sentence(details or f"refused with {code.name}"))


def _handshake_trouble(details: str) -> str:
    """What gRPC tells of a connection that was made and then came to nothing; empty for one that was not made."""
    if "WRONG_VERSION_NUMBER" in details:
        return "plaintext"
    if "CERTIFICATE_VERIFY_FAILED" in details or "erification" in details:
        return "certificate"
    # A coordinator that hangs up while our first words are on their way resets the connection by that.
    closed = ("Socket closed", "Connection reset", "Broken pipe", "handshake", "Handshake", "Endpoint closing")
    return "closed" if any(word in details for word in closed) else ""


def _tell(listener: Callable[[str], None] | None, text: str) -> None:
    if listener is not None:
        listener(text)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _sync(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)


def _target(folder: Path, force: bool) -> Path:
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise FolderInUseError(f"{folder} is a file.", "Name a folder.")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise FolderInUseError(f"{folder} is not empty.", "Name another folder, or give --force to replace files of the same names.")
    return folder


def _check_names(described: control_pb2.DescribeAdapterResponse) -> None:
    if not described.files:
        raise NotFoundError(f"round {described.round} of job {described.job_id} has no adapter files.")
    names: set[str] = set()
    for item in described.files:
        bare = item.name not in {"", ".", ".."} and not any(letter in item.name for letter in "/\\\0")
        if not bare or item.name in names:
            raise WireError(f"the coordinator names a file {item.name!r}; allowed are bare names, each once.")
        if item.blob.size_bytes > ADAPTER_BYTES_MAX:
            raise WireError(f"the coordinator declares {item.blob.size_bytes} bytes for {item.name}; allowed are {ADAPTER_BYTES_MAX}.")
        names.add(item.name)


def _make_aside(folder: Path) -> Path:
    """A new empty folder beside `folder`: on the same file system, so that a rename is enough."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    # mkdtemp makes it private; the adapter is to be as readable as any folder of this person.
    mask = os.umask(0o022)
    os.umask(mask)
    aside.chmod(0o777 & ~mask)
    return aside


def _put_in_place(aside: Path, folder: Path) -> None:
    """Renames the whole folder where the target is absent or empty, else file by file."""
    if not folder.exists() or not any(folder.iterdir()):
        # POSIX renames a folder onto an empty one.
        aside.replace(folder)
        return
    for path in sorted(aside.iterdir()):
        path.replace(folder / path.name)

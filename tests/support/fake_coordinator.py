"""A small honest coordinator for tests of the agent: hands out tasks and blobs, takes updates, and cuts streams where it is told to."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import grpc
import grpc.aio
from blake3 import blake3

from fleetune.methods.v1 import echo_pb2
from fleetune.v1 import blob_pb2, blob_pb2_grpc, fleet_pb2, fleet_pb2_grpc, messages_pb2
from fleetune.wire import channel, codec

CHUNK_BYTES = 64 << 10
T = TypeVar("T")
R = TypeVar("R")

_SessionContext = grpc.aio.ServicerContext[fleet_pb2.SessionRequest, fleet_pb2.SessionResponse]
_DownloadContext = grpc.aio.ServicerContext[blob_pb2.DownloadRequest, blob_pb2.DownloadResponse]
_StatusContext = grpc.aio.ServicerContext[blob_pb2.UploadStatusRequest, blob_pb2.UploadStatusResponse]
_ProbeContext = grpc.aio.ServicerContext[blob_pb2.ProbeRequest, blob_pb2.ProbeResponse]
_UploadContext = grpc.aio.ServicerContext[blob_pb2.UploadRequest, blob_pb2.UploadResponse]


@dataclass
class Received:
    """One update as it arrived, in one or more streams."""

    header: blob_pb2.UploadHeader
    data: bytearray = field(default_factory=bytearray)
    streams: int = 0
    committed: bool = False


class FakeCoordinator(fleet_pb2_grpc.FleetServiceServicer, blob_pb2_grpc.BlobServiceServicer):
    """Everything that the agent said is kept in lists; `changed` is set at each message, `until` waits for a condition on them."""

    def __init__(self, *, heartbeat_s: float = 0.2, lease_s: float = 30.0, epoch: int = 1) -> None:
        self.welcome = fleet_pb2.Welcome(heartbeat_s=heartbeat_s, lease_s=lease_s, epoch=epoch, chunk_bytes=CHUNK_BYTES)
        self.blobs: dict[str, bytes] = {}
        self.hellos: list[fleet_pb2.Hello] = []
        self.heartbeats: list[fleet_pb2.Heartbeat] = []
        self.progress: list[fleet_pb2.TaskProgress] = []
        self.outcomes: list[fleet_pb2.TaskOutcome] = []
        self.logs: list[fleet_pb2.TaskLog] = []
        self.availability: list[fleet_pb2.Availability] = []
        self.leaving: list[str] = []
        self.updates: dict[str, Received] = {}
        self.status_asked: list[str] = []
        self.downloads: list[blob_pb2.DownloadRequest] = []
        self.streams = 0
        """Control streams that arrived here, before their first word."""
        self.sessions = 0
        # Answers to the next sessions instead of a welcome.
        self.refusals: list[fleet_pb2.Refusal] = []
        # Bytes after which the next streams are cut with UNAVAILABLE.
        self.cut_uploads: list[int] = []
        self.cut_downloads: list[int] = []
        # Bytes of each probe of the link; what it is answered with instead.
        self.probed_bytes: list[int] = []
        self.probe_abort: tuple[grpc.StatusCode, str] | None = None
        self.upload_abort: tuple[grpc.StatusCode, str] | None = None
        self.answers_heartbeats = True
        self.sends_receipts = True
        self.receipt_status = messages_pb2.RECEIPT_STATUS_ACCEPTED
        self.damage_downloads = 0
        self.port = 0
        # None: plaintext.
        self.credentials: grpc.ServerCredentials | None = None
        self.registers: Callable[[grpc.aio.Server], None] | None = None
        """Adds further services."""
        self.session_abort: tuple[grpc.StatusCode, str] | None = None
        # While set to an event that is not, uploads wait before they go on.
        self.upload_gate: asyncio.Event | None = None
        # While set to an event that is not, uploads wait for their turn.
        self.turn: asyncio.Event | None = None
        self.peers: list[str] = []
        """Of each session, the serial connection it came over."""
        self._changed = asyncio.Condition()
        self._lines: list[asyncio.Queue[fleet_pb2.SessionResponse | None]] = []
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; on the same port again after `stop`."""
        self._server = grpc.aio.server(options=channel.server_options())
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self, self._server)
        blob_pb2_grpc.add_BlobServiceServicer_to_server(self, self._server)
        if self.registers is not None:
            self.registers(self._server)
        place = f"127.0.0.1:{self.port}"
        if self.credentials is None:
            self.port = self._server.add_insecure_port(place)
        else:
            self.port = self._server.add_secure_port(place, self.credentials)
        await self._server.start()

    async def stop(self) -> None:
        """End as a coordinator that is killed: every stream is cut."""
        self.hang_up()
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def hang_up(self) -> None:
        """End every session; agents may open another."""
        for line in self._lines:
            line.put_nowait(None)

    def send(self, **body: object) -> None:
        """A message on every open session, for example task=..., cancel=..."""
        for line in self._lines:
            line.put_nowait(fleet_pb2.SessionResponse(**body))  # type: ignore[arg-type]  # one of the message's own fields

    async def until(self, condition: Callable[[], bool], within_s: float = 60.0) -> None:
        """Return once `condition` holds; it is looked at again after each message of the agent."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(condition), within_s)

    def add_blob(self, data: bytes) -> messages_pb2.BlobRef:
        digest = blake3(data).hexdigest()
        self.blobs[digest] = data
        return messages_pb2.BlobRef(digest=digest, size_bytes=len(data))

    def finished(self) -> list[str]:
        """Ids of the tasks whose update is complete."""
        return [task_id for task_id, update in self.updates.items() if update.committed]

    # --- FleetService

    async def Session(self, request_iterator: object, context: _SessionContext) -> None:  # type: ignore[override]  # aio flavour
        self.streams += 1
        await self._stir()
        first = await _read_or_end(context)
        if first is None:  # the agent has given up before it said anything
            return
        self.peers.append(context.peer())
        if self.session_abort is not None:
            await self._note(self.hellos, first.hello)
            await context.abort(*self.session_abort)
        if self.refusals:
            await self._note(self.hellos, first.hello)
            await context.write(fleet_pb2.SessionResponse(refusal=self.refusals.pop(0)))
            return
        line: asyncio.Queue[fleet_pb2.SessionResponse | None] = asyncio.Queue()
        self._lines.append(line)
        writer = asyncio.create_task(self._write(context, line))
        reader = asyncio.create_task(self._read(context, line))
        line.put_nowait(fleet_pb2.SessionResponse(welcome=self.welcome))
        self.sessions += 1
        await self._note(self.hellos, first.hello)
        try:
            await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._lines.remove(line)
            for part in (writer, reader):
                part.cancel()
            await asyncio.gather(writer, reader, return_exceptions=True)
            await self._stir()

    async def _write(self, context: _SessionContext, line: asyncio.Queue[fleet_pb2.SessionResponse | None]) -> None:
        while (response := await line.get()) is not None:
            await context.write(response)

    async def _read(self, context: _SessionContext, line: asyncio.Queue[fleet_pb2.SessionResponse | None]) -> None:
        while (request := await _read_or_end(context)) is not None:
            body = request.WhichOneof("body")
            if body == "heartbeat":
                await self._note(self.heartbeats, request.heartbeat)
                if self.answers_heartbeats:
                    line.put_nowait(
                        fleet_pb2.SessionResponse(heartbeat_reply=fleet_pb2.HeartbeatReply(sequence=request.heartbeat.sequence))
                    )
            elif body == "progress":
                await self._note(self.progress, request.progress)
            elif body == "log":
                await self._note(self.logs, request.log)
            elif body == "availability":
                await self._note(self.availability, request.availability)
            elif body == "leaving":
                await self._note(self.leaving, request.leaving.reason)
            elif body == "outcome":
                await self._note(self.outcomes, request.outcome)
                if self.sends_receipts:
                    receipt = messages_pb2.Receipt(task_id=request.outcome.task_id, lease=request.outcome.lease, status=self.receipt_status)
                    line.put_nowait(fleet_pb2.SessionResponse(receipt=receipt))

    # --- BlobService

    async def Download(self, request: blob_pb2.DownloadRequest, context: _DownloadContext) -> None:  # type: ignore[override]
        await self._note(self.downloads, request)
        data = self.blobs.get(request.digest)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no blob {request.digest[:12]}")
            raise AssertionError("abort raises")
        limit = self.cut_downloads.pop(0) if self.cut_downloads else len(data)
        for offset in range(request.offset, len(data), CHUNK_BYTES):
            part = data[offset : offset + CHUNK_BYTES]
            if offset + len(part) > limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the test")
            crc32 = zlib.crc32(part)
            if self.damage_downloads:
                self.damage_downloads -= 1
                crc32 ^= 1
            chunk = blob_pb2.Chunk(offset=offset, data=part, crc32=crc32)
            await context.write(blob_pb2.DownloadResponse(chunk=chunk, size_bytes=len(data) if offset == request.offset else 0))

    async def UploadStatus(self, request: blob_pb2.UploadStatusRequest, context: _StatusContext) -> blob_pb2.UploadStatusResponse:
        await self._note(self.status_asked, request.task_id)
        update = self.updates.get(request.task_id)
        if update is None:
            return blob_pb2.UploadStatusResponse(offset=0)
        if update.committed:
            # As the real one: it does not know the lease of who asks.
            return blob_pb2.UploadStatusResponse(
                receipt=messages_pb2.Receipt(task_id=request.task_id, status=messages_pb2.RECEIPT_STATUS_DUPLICATE)
            )
        return blob_pb2.UploadStatusResponse(offset=len(update.data))

    async def Upload(self, request_iterator: AsyncIterator[blob_pb2.UploadRequest], context: _UploadContext) -> blob_pb2.UploadResponse:
        request = await _read_or_end(context)
        if request is None:  # the agent has given up before it said anything
            return blob_pb2.UploadResponse()
        header = request.header
        if self.upload_abort is not None:
            await context.abort(*self.upload_abort)
        update = self.updates.setdefault(header.task_id, Received(header))
        update.streams += 1
        if update.committed:
            return blob_pb2.UploadResponse(receipt=self._receipt(header, messages_pb2.RECEIPT_STATUS_DUPLICATE))
        assert header.offset <= len(update.data)
        if self.turn is not None:
            await self._stir()
            await self.turn.wait()
            await context.send_initial_metadata(())
        limit = self.cut_uploads.pop(0) if self.cut_uploads else header.blob.size_bytes
        while request is not None:
            if request.HasField("chunk"):
                assert request.chunk.offset == len(update.data)
                assert zlib.crc32(request.chunk.data) == request.chunk.crc32
                if request.chunk.offset + len(request.chunk.data) > limit:
                    await self._stir()
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the test")
                update.data += request.chunk.data
                if self.upload_gate is not None:
                    await self._stir()
                    await self.upload_gate.wait()
            request = await _read_or_end(context)
        if blake3(update.data).hexdigest() != header.blob.digest:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "another digest than declared")
        update.committed = True
        await self._stir()
        return blob_pb2.UploadResponse(receipt=self._receipt(header, self.receipt_status))

    async def Probe(self, request_iterator: AsyncIterator[blob_pb2.ProbeRequest], context: _ProbeContext) -> blob_pb2.ProbeResponse:
        if self.probe_abort is not None:
            await context.abort(*self.probe_abort)
        received = 0
        while (request := await _read_or_end(context)) is not None:
            received += len(request.data)
        await self._note(self.probed_bytes, received)
        return blob_pb2.ProbeResponse(received_bytes=received, seconds=0.5)

    def _receipt(self, header: blob_pb2.UploadHeader, status: messages_pb2.ReceiptStatus.ValueType) -> messages_pb2.Receipt:
        return messages_pb2.Receipt(task_id=header.task_id, lease=header.lease, status=status)

    async def _note(self, kept: list[T], message: T) -> None:
        kept.append(message)
        await self._stir()

    async def _stir(self) -> None:
        async with self._changed:
            self._changed.notify_all()


async def _read_or_end(context: grpc.aio.ServicerContext[T, R]) -> T | None:
    message = await context.read()
    # The stubs leave out that read() also gives the end of the stream.
    return None if cast("object", message) is grpc.aio.EOF else message


def state_bytes(size_bytes: int) -> bytes:
    """A safetensors file of zeros, as a global state of the echo method."""
    specs = codec.pack([("w", "F32", (size_bytes // 4,))])
    return codec.build_header(specs, {"format": "pt"}) + bytes(size_bytes // 4 * 4)


def echo_task(task_id: str, state: messages_pb2.BlobRef, *, lease: int = 1, constant: int = 1) -> messages_pb2.Task:
    """A train task of the echo method."""
    task = messages_pb2.Task(
        task_id=task_id,
        job_id="job",
        round=1,
        lease=lease,
        kind=messages_pb2.TASK_KIND_TRAIN,
        method="echo",
        state=state,
        keep_warm_s=60.0,
    )
    task.payload.Pack(echo_pb2.EchoTask(constant=constant))
    return task

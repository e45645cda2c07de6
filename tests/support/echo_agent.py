"""A small honest agent inside the test's process: a plain gRPC client that does the echo arithmetic with numpy."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import grpc
import grpc.aio
import numpy as np
from blake3 import blake3

from fleetune.methods.v1 import echo_pb2
from fleetune.v1 import blob_pb2, blob_pb2_grpc, fleet_pb2, fleet_pb2_grpc, messages_pb2
from fleetune.wire import channel, codec
from fleetune.wire.answers import Answer, let_go

ANSWER_S = 60.0
"""Longest wait for anything a test expects; only a bug takes longer."""

CHUNK_BYTES = 4096

A = TypeVar("A", bound="EchoAgent")


class EchoAgent:
    """Connect it, then either take tasks from `tasks` by hand or let `serve` answer them.

    `gate`, where set, is awaited with each train task before its update is sent.
    """

    def __init__(
        self,
        address: str,
        name: str,
        *,
        tags: Sequence[str] = (),
        data_names: Sequence[str] = (),
        methods: Sequence[str] = ("echo",),
        accepts_tasks: bool = True,
        device_id: str = "",
        instance_id: str = "run-1",
        samples: int = 1,
    ) -> None:
        self.address = address
        self.hello = fleet_pb2.Hello(
            protocol_major=channel.PROTOCOL_MAJOR,
            protocol_minor=channel.PROTOCOL_MINOR,
            agent_version="test",
            device_id=device_id or f"device-{name}",
            device_name=name,
            instance_id=instance_id,
            tags=tags,
            data_names=data_names,
            methods=methods,
            availability=fleet_pb2.Availability(accepts_tasks=accepts_tasks),
        )
        self.samples = samples
        self.gate: Callable[[messages_pb2.Task], Awaitable[object]] | None = None
        self.welcome: fleet_pb2.Welcome | None = None
        self.refusal: fleet_pb2.Refusal | None = None
        self.draining = asyncio.Event()
        self.ended = asyncio.Event()
        """The stream is over, whoever ended it."""
        self.tasks: asyncio.Queue[messages_pb2.Task] = asyncio.Queue()
        self.cancels: asyncio.Queue[fleet_pb2.CancelTask] = asyncio.Queue()
        self.receipts: asyncio.Queue[messages_pb2.Receipt] = asyncio.Queue()
        self.done: list[tuple[str, int]] = []
        """(task id, receipt status) of every task that `serve` answered."""
        self._more_done = asyncio.Event()
        self._channel: grpc.aio.Channel | None = None
        self._jobs: list[asyncio.Task[None]] = []

    @property
    def device_id(self) -> str:
        return self.hello.device_id

    async def __aenter__(self: A) -> A:
        await self.connect()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        await self.cut()

    # -- the session

    def open(self) -> grpc.aio.Channel:
        return channel.open_channel(self.address)

    async def connect(self, held: Mapping[str, int] | None = None, epoch: int = 0) -> EchoAgent:
        """Dial and say Hello; returns with `welcome` or `refusal` set. `held` maps task ids to stages; all are of `epoch`."""
        self._channel = self.open()
        self._blobs = blob_pb2_grpc.BlobServiceStub(self._channel)
        del self.hello.held[:]
        for task_id, stage in (held or {}).items():
            self.hello.held.add(task_id=task_id, lease=1, stage=fleet_pb2.HeldStage.ValueType(stage), epoch=epoch)
        self.welcome = self.refusal = None
        self.ended.clear()
        self._call = fleet_pb2_grpc.FleetServiceStub(self._channel).Session()
        answer = Answer(self._call)
        # The coordinator may refuse the call before it has read anything.
        await answer.heard(self._call.write(fleet_pb2.SessionRequest(hello=self.hello)))
        first = await asyncio.wait_for(answer.heard(self._call.read()), ANSWER_S)
        assert isinstance(first, fleet_pb2.SessionResponse)
        if first.HasField("refusal"):
            self.refusal = first.refusal
        else:
            self.welcome = first.welcome
            self._jobs.append(asyncio.create_task(self._listen(), name=f"listener of {self.hello.device_name}"))
        return self

    async def say(self, **body: object) -> None:
        await self._call.write(fleet_pb2.SessionRequest(**body))  # type: ignore[arg-type]  # one of the oneof's fields

    async def cut(self) -> None:
        """Vanish as a killed process does: the connection closes, nothing is said."""
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        self._jobs.clear()
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
        if (call := vars(self).pop("_call", None)) is not None:
            let_go(call)
        vars(self).pop("_blobs", None)

    async def next_task(self) -> messages_pb2.Task:
        return await asyncio.wait_for(self.tasks.get(), ANSWER_S)

    async def next_receipt(self) -> messages_pb2.Receipt:
        return await asyncio.wait_for(self.receipts.get(), ANSWER_S)

    async def next_cancel(self) -> fleet_pb2.CancelTask:
        return await asyncio.wait_for(self.cancels.get(), ANSWER_S)

    def serve(self) -> EchoAgent:
        """Answer every task from now on."""
        self._jobs.append(asyncio.create_task(self._serve(), name=f"work of {self.hello.device_name}"))
        return self

    async def answered(self, tasks: int) -> None:
        """Wait until `serve` has the receipts of so many; a job may have ended a moment before."""
        while len(self.done) < tasks:
            self._more_done.clear()
            await asyncio.wait_for(self._more_done.wait(), ANSWER_S)

    def _heard(self, body: str | None, response: fleet_pb2.SessionResponse) -> None:
        if body == "task":
            self.tasks.put_nowait(response.task)
        elif body == "cancel":
            self.cancels.put_nowait(response.cancel)
        elif body == "receipt":
            self.receipts.put_nowait(response.receipt)
        elif body == "draining":
            self.draining.set()

    async def _listen(self) -> None:
        try:
            while isinstance(response := await self._call.read(), fleet_pb2.SessionResponse):
                self._heard(response.WhichOneof("body"), response)
        except grpc.aio.AioRpcError:
            pass
        finally:
            self.ended.set()

    async def _serve(self) -> None:
        while True:
            task = await self.tasks.get()
            with contextlib.suppress(grpc.aio.AioRpcError):
                receipt = await self.answer(task)
                self.done.append((task.task_id, receipt.status))
                self._more_done.set()

    # -- work

    async def answer(self, task: messages_pb2.Task) -> messages_pb2.Receipt:
        """Do a task as it should be done."""
        if task.kind == messages_pb2.TASK_KIND_EVALUATE:
            state = await self.download(task.state.digest)
            value = float(_values(state)[0])
            evaluation = messages_pb2.Evaluation(metrics=[messages_pb2.Metric(name="loss", value=value)], rows=self.samples)
            await self.say(outcome=fleet_pb2.TaskOutcome(task_id=task.task_id, lease=task.lease, evaluation=evaluation))
            return await self.next_receipt()
        data = await self.trained(task)
        if self.gate is not None:
            await self.gate(task)
        return await self.upload(task, data)

    async def trained(self, task: messages_pb2.Task) -> bytes:
        """The update of an honest device."""
        payload = echo_pb2.EchoTask()
        assert task.payload.Unpack(payload)
        return echoed(await self.download(task.state.digest), payload.constant)

    async def download(self, digest: str, offset: int = 0) -> bytes:
        data = b""
        async for response in self._blobs.Download(blob_pb2.DownloadRequest(digest=digest, offset=offset)):
            if not response.HasField("chunk"):  # asked from its end on
                continue
            assert zlib.crc32(response.chunk.data) == response.chunk.crc32
            assert response.chunk.offset == offset + len(data)
            data += response.chunk.data
        if not offset:
            assert blake3(data).hexdigest() == digest
        return data

    def header(self, task: messages_pb2.Task, data: bytes, **changes: object) -> blob_pb2.UploadHeader:
        made = blob_pb2.UploadHeader(
            device_id=self.device_id,
            task_id=task.task_id,
            lease=task.lease,
            blob=messages_pb2.BlobRef(digest=blake3(data).hexdigest(), size_bytes=len(data)),
            report=messages_pb2.UpdateReport(samples=self.samples),
            epoch=self.welcome.epoch if self.welcome else 1,
        )
        made.MergeFrom(blob_pb2.UploadHeader(**changes))  # type: ignore[arg-type]  # the header's own fields
        return made

    async def status(self, task: messages_pb2.Task, data: bytes, epoch: int = 0) -> blob_pb2.UploadStatusResponse:
        header = self.header(task, data)
        request = blob_pb2.UploadStatusRequest(device_id=header.device_id, task_id=header.task_id, blob=header.blob, epoch=epoch)
        return await self._blobs.UploadStatus(request, timeout=ANSWER_S)

    async def upload(
        self, task: messages_pb2.Task, data: bytes, *, offset: int = 0, end: int | None = None, header: blob_pb2.UploadHeader | None = None
    ) -> messages_pb2.Receipt:
        """Send an update from `offset` to `end`; the receipt, or AioRpcError."""
        first = header if header is not None else self.header(task, data, offset=offset)

        async def requests() -> AsyncIterator[blob_pb2.UploadRequest]:
            yield blob_pb2.UploadRequest(header=first)
            for chunk in chunks(data, offset, len(data) if end is None else end):
                yield blob_pb2.UploadRequest(chunk=chunk)

        return await self.stream(requests())

    async def stream(self, requests: AsyncIterator[blob_pb2.UploadRequest]) -> messages_pb2.Receipt:
        call = self._blobs.Upload(timeout=ANSWER_S)
        answer = Answer(call)
        try:
            async for request in requests:
                try:
                    await call.write(request)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    break  # answered before it had all
            else:
                await call.done_writing()
            return (await call).receipt
        except grpc.aio.AioRpcError as error:
            raise answer.of(error) from None
        finally:
            call.cancel()


def chunks(data: bytes, begin: int, end: int) -> list[blob_pb2.Chunk]:
    pieces = [(at, data[at : min(at + CHUNK_BYTES, end)]) for at in range(begin, end, CHUNK_BYTES)]
    return [blob_pb2.Chunk(offset=at, data=piece, crc32=zlib.crc32(piece)) for at, piece in pieces]


def echoed(state: bytes, constant: int, **changes: str) -> bytes:
    """The state plus a constant, as an update of whole values."""
    table = _table(state)
    header = codec.build_header(codec.pack((s.name, s.dtype, s.shape) for s in table.specs), {"fleetune.update": "state", **changes})
    changed: np.ndarray[tuple[int], np.dtype[np.float32]] = (_values(state) + np.float32(constant)).astype("<f4")
    return header + changed.tobytes()


def _table(state: bytes) -> codec.TensorTable:
    return codec.parse_header(state[: 8 + int.from_bytes(state[:8], "little")], len(state))


def _values(state: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.frombuffer(state[_table(state).data_start :], "<f4")


values = _values

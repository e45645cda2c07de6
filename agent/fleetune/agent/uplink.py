"""Updates from the outbox to the coordinator: one stream each, resumed where it was cut, until a receipt comes."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from fleetune.agent import convert
from fleetune.agent.bulk import CALL_DEADLINE_S, Retry, TransferError
from fleetune.agent.domain import FailureKind, Receipt, Update
from fleetune.agent.links import Line
from fleetune.agent.pacing import Pace
from fleetune.errors import WireError
from fleetune.v1 import blob_pb2, blob_pb2_grpc, messages_pb2
from fleetune.wire import chunks, frames
from fleetune.wire.answers import Answer
from fleetune.workers import Workers

if TYPE_CHECKING:
    from fleetune.v1.blob_pb2_grpc import BlobServiceAsyncStub

LOG = logging.getLogger(__name__)

OnReceipt = Callable[[Receipt], None]
OnFailure = Callable[[Update, FailureKind, str], None]
OnBytes = Callable[[Update, int, int], None]
"""Hears the update, the bytes sent and the bytes in all."""
OnSample = Callable[[int, float, float, bool], None]
"""Hears of an upload that has ended: bytes, their seconds, the rate it was held to (bytes a second), and whether the seconds hold more."""


PACES_MAX = 64

CLEAR_BYTES = 4 << 20
"""Of a larger upload, the coordinator's commit at the end is a small part."""

PROBE_PIECE_BYTES = 64 << 10
PROBE_PIECES = 5
PROBE_DEADLINE_S = 30.0
PROBE_S_MIN = 0.001
"""Below this the coordinator's clock says nothing; it is two gigabits a second, more than any plan asks for."""

UNASKED_BYTES = 256 << 10
"""So much goes along with its header: a round trip for the upload's turn is not worth it, and thousands of devices at once may do so."""

SLOW_AFTER_S = 0.25
SLOW_BYTES_PER_S = 32 << 20
SLOW_PIECE_BYTES = 128 << 10
"""An upload that is slower after so long goes on in pieces of this size. The coordinator then lets others go on beside it, dozens where all
are slow, and holds several pieces of each in memory."""

REQUESTS_AHEAD = 2
"""Chunks read in one turn of the thread while as many are being sent: a turn costs more than the reading."""


class Uplink:
    """Sends updates over the line for bulk, one stream at a time. Owner of its tasks, one for each update under way."""

    def __init__(
        self,
        line: Line,
        device_id: str,
        on_receipt: OnReceipt,
        on_failure: OnFailure,
        on_bytes: OnBytes,
        on_sample: OnSample = lambda size_bytes, seconds, limit_bytes_per_s, at_least: None,
    ) -> None:
        self._line = line
        self._device_id = device_id
        self._on_receipt = on_receipt
        self._on_failure = on_failure
        self._on_bytes = on_bytes
        self._on_sample = on_sample
        # Of tasks whose update is not delivered yet, those with a rate.
        self._paces: dict[str, Pace] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Two streams of one device would only halve each other's rate. Not held while one waits for another try.
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        # Reads the next chunk while one is on its way.
        self._files = Workers("uplink")
        self.chunk_bytes = chunks.CHUNK_BYTES
        self.hears_turns = False

    def send(self, update: Update, path: Path, *, fresh: bool) -> None:
        """Begin to send; nothing happens where this update is under way. A fresh one was never sent, which spares a question."""
        if update.uplink_bits_per_s > 0 and update.task_id not in self._paces:  # it was made before this agent's start
            self.set_rate(update.task_id, update.uplink_bits_per_s)
        under_way = self._tasks.get(update.task_id)
        if under_way is not None and not under_way.done():
            self.wake()
            return
        task = asyncio.create_task(self._deliver(update, path, fresh), name=f"upload {update.task_id}")
        self._tasks[update.task_id] = task
        task.add_done_callback(lambda ended: self._ended(update.task_id, ended))

    def set_rate(self, task_id: str, bits_per_s: float) -> None:
        """The rate of this task's update from now on, also while it is being sent; 0 is no bound."""
        pace = self._paces.get(task_id)
        if pace is not None:
            pace.set_rate(bits_per_s)
        elif bits_per_s > 0:
            while len(self._paces) >= PACES_MAX:  # tasks that were cancelled have left theirs
                del self._paces[next(iter(self._paces))]
            self._paces[task_id] = Pace(bits_per_s)

    async def probe(self) -> tuple[int, float]:
        """Sends a few bytes that are thrown away; the bytes, and the seconds that they took by the coordinator's clock.

        grpc.aio.AioRpcError where it does not take them.
        """
        piece = blob_pb2.ProbeRequest(data=os.urandom(PROBE_PIECE_BYTES))
        async with self._turn, self._line.use() as channel:
            stub: BlobServiceAsyncStub = blob_pb2_grpc.BlobServiceStub(channel)
            call = stub.Probe(timeout=PROBE_DEADLINE_S)
            response = Answer(call)
            try:
                try:
                    for _ in range(PROBE_PIECES):
                        await call.write(piece)
                    await call.done_writing()
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    pass  # it has answered before it had all; the answer says why
                answer = await call
            except grpc.aio.AioRpcError as error:
                raise response.of(error) from None
            finally:
                call.cancel()
        # The first piece starts the clock: its own time is not in it.
        return answer.received_bytes - PROBE_PIECE_BYTES, max(answer.seconds, PROBE_S_MIN)

    def withdraw(self, task_id: str) -> None:
        """Stop sending. Safe where nothing is under way."""
        self._paces.pop(task_id, None)
        task = self._tasks.pop(task_id, None)
        if task is not None:
            task.cancel()

    def wake(self) -> None:
        """The coordinator is back: try now what waits for another try."""
        self._wake.set()

    async def close(self) -> None:
        """Stop all streams; what is unsent stays in the outbox."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._files.close()

    def _ended(self, task_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(task_id) is task:
            del self._tasks[task_id]

    async def _deliver(self, update: Update, path: Path, fresh: bool) -> None:
        retry = Retry(f"Upload of task {update.task_id}", self._wake)

        async def attempt(number: int) -> Receipt:
            async with self._turn, self._line.use() as channel:
                offset = 0
                if number > 0 or not fresh:
                    status = await self._status(channel, update)
                    if status.HasField("receipt"):
                        return convert.receipt(status.receipt)
                    offset = min(status.offset, update.blob.size_bytes)
                    retry.progressed(offset)
                return await self._stream(channel, update, path, offset)

        try:
            receipt = await retry.run(attempt)
        except TransferError as error:
            LOG.error("upload failed task=%s cause=%r", update.task_id, str(error))
            self._on_failure(update, FailureKind.TRANSFER, str(error))
        except OSError as error:
            LOG.error("update cannot be read task=%s path=%s cause=%r", update.task_id, path, str(error))
            self._on_failure(update, FailureKind.TRANSFER, f"The finished update cannot be read from the outbox: {error}.")
        except Exception as error:
            # A bug must not leave the coordinator waiting for a result that never comes.
            LOG.exception("upload ended by a bug task=%s", update.task_id)
            self._on_failure(update, FailureKind.INTERNAL, f"The upload ended by an unexpected error: {type(error).__name__}: {error}.")
        else:
            # Whatever it says of lease: it came in answer to this very update.
            self._on_receipt(replace(receipt, task_id=update.task_id, lease=update.lease))

    async def _status(self, channel: grpc.aio.Channel, update: Update) -> blob_pb2.UploadStatusResponse:
        blob = messages_pb2.BlobRef(digest=update.blob.digest, size_bytes=update.blob.size_bytes)
        request = blob_pb2.UploadStatusRequest(device_id=self._device_id, task_id=update.task_id, blob=blob, epoch=update.epoch)
        stub: BlobServiceAsyncStub = blob_pb2_grpc.BlobServiceStub(channel)
        call = stub.UploadStatus(request, timeout=CALL_DEADLINE_S)
        try:
            return await call
        finally:
            call.cancel()

    async def _stream(self, channel: grpc.aio.Channel, update: Update, path: Path, offset: int) -> Receipt:
        size_bytes = update.blob.size_bytes
        header = convert.upload_header(update, self._device_id, offset)
        # By the header alone the coordinator knows that the update is on its way; what came with it would stay in its memory meanwhile.
        requests = [frames.encode_upload(frames.Upload(header))]
        reader = _Reader(path, size_bytes, self.chunk_bytes, offset)
        pace = self._paces.get(update.task_id)
        if pace is not None:
            pace.bucket.empty()
        reading: asyncio.Future[tuple[list[bytes], int]] | None = None
        call = frames.upload(channel)()
        answer = Answer(call)
        timing = _Timing(offset)
        waits = self.hears_turns and size_bytes - offset > UNASKED_BYTES
        try:
            while requests:
                pace = self._paces.get(update.task_id)
                reading = self._files.run(reader.following, _piece_bytes(pace, timing)) if offset < size_bytes else None
                try:
                    for request in requests:
                        if pace is not None and not timing.opening:
                            timing.held_to(pace.bucket.bytes_per_s)
                            await pace.admit(len(request))
                        await call.write(request)
                        timing.opening = False
                    timing.sent(offset)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    # The coordinator answered before it had all: it has the result already, or its status says what is wrong.
                    break
                self._on_bytes(update, offset, size_bytes)
                if waits:
                    # For its turn, or the answer. Until then the coordinator would hold in memory what the stream's window lets through.
                    waits = False
                    await call.initial_metadata()
                    timing.begin()
                    if pace is not None:
                        pace.bucket.empty()
                requests = []
                if reading is not None:
                    requests, offset = await reading
            else:
                await call.done_writing()
            response = await call
        except grpc.aio.AioRpcError as error:
            raise answer.of(error) from None
        finally:
            call.cancel()
            if reading is not None:
                # Its error, if any, is second to the one that ends this stream.
                reading.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            if not reader.closed:
                # In the one thread of the reads, hence after the last of them; without a wait, in which a cancellation could skip it.
                self._files.tell(reader.close)
        if timing.complete(size_bytes):
            self._on_sample(*timing.sample())
        if not response.HasField("receipt"):
            raise WireError(f"The coordinator ended the upload of task {update.task_id} without a receipt.")
        return convert.receipt(response.receipt)


def _piece_bytes(pace: Pace | None, timing: _Timing) -> int:
    """Bytes of the next requests; 0 is as many as go into a chunk."""
    if pace is not None and pace.bucket.bytes_per_s:
        return pace.bucket.piece_bytes
    return SLOW_PIECE_BYTES if timing.is_slow() else 0


class _Timing:
    """How fast one stream went. Where nobody says when its turn has come, the first requests are the ones that wait, and do not count."""

    def __init__(self, offset: int) -> None:
        self._begun_s = time.monotonic()
        self._offset = self._sent = offset
        self._batches = 0
        self._limit = math.inf
        # The header is on its way, which is not held to a rate.
        self.opening = True
        self._has_turn = False

    def begin(self) -> None:
        """The turn has come: what was before is waiting."""
        self._begun_s, self._has_turn = time.monotonic(), True

    def held_to(self, bytes_per_s: float) -> None:
        if bytes_per_s > 0:
            self._limit = min(self._limit, bytes_per_s)

    def is_slow(self) -> bool:
        """Whether the bytes take long, by what is known so far."""
        taken_s = time.monotonic() - self._begun_s
        return self._has_turn and taken_s > SLOW_AFTER_S and self._sent - self._offset < SLOW_BYTES_PER_S * taken_s

    def sent(self, offset: int) -> None:
        if offset > self._sent and self._batches == 0:
            self._batches = 1
            self._after_first = (offset, time.monotonic())
        elif offset > self._sent:
            self._batches += 1
        self._sent = offset

    def complete(self, size_bytes: int) -> bool:
        return self._sent == size_bytes and self._batches > 0

    def sample(self) -> tuple[int, float, float, bool]:
        """Bytes, seconds, limit, and whether the seconds hold more than sending: at least the commit of the coordinator."""
        now_s = time.monotonic()
        offset, begun_s = self._after_first
        if self._has_turn or self._batches == 1 or math.isfinite(self._limit):
            offset, begun_s = self._offset, self._begun_s
        size_bytes = self._sent - offset
        waited = self._batches == 1 and not self._has_turn
        return size_bytes, now_s - begun_s, self._limit, waited or size_bytes < CLEAR_BYTES


class _Reader:
    """An update file as encoded upload requests. Lives in the one thread that reads; `position` is where the next request starts."""

    def __init__(self, path: Path, size_bytes: int, chunk_bytes: int, offset: int) -> None:
        """OSError where the file cannot be opened. That is done at once, which costs less than a turn of the thread."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size_bytes = size_bytes
        self._chunk_bytes = chunk_bytes
        self.position = offset

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def following(self, piece_bytes: int) -> tuple[list[bytes], int]:
        """The next requests, at most REQUESTS_AHEAD, and the position after them. `piece_bytes` 0 is whole chunks.

        The file is closed with the last.
        """
        chunk_bytes = min(piece_bytes or self._chunk_bytes, self._chunk_bytes)
        requests: list[bytes] = []
        while self.position < self._size_bytes and len(requests) < REQUESTS_AHEAD:
            requests.append(frames.encode_upload(frames.Upload(None, self._chunk(chunk_bytes))))
        if self.position >= self._size_bytes:
            self.close()
        return requests, self.position

    def _chunk(self, chunk_bytes: int) -> frames.Chunk:
        chunk = chunks.read_chunk(self._fd, self.position, self._size_bytes, chunk_bytes)
        self.position += len(chunk.data)
        return chunk

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

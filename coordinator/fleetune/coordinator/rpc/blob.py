"""BlobService: chunk streams in and out. Knows bytes and receipts; no method, no tensor."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import grpc
import grpc.aio

from fleetune.coordinator.rounds.engine import Engine
from fleetune.coordinator.rounds.orders import Receipt
from fleetune.coordinator.rpc import convert, gate, ownership
from fleetune.coordinator.rpc.hotchunks import HotChunks, Response
from fleetune.coordinator.rpc.limits import Probes
from fleetune.coordinator.rpc.streams import Abortable, Patience, Readable, begin, hang_up, next_message
from fleetune.coordinator.rpc.turns import Turns
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.errors import DiskFullError, DurabilityError, WireError
from fleetune.v1 import blob_pb2, messages_pb2
from fleetune.waiting import happened
from fleetune.wire import digests, frames
from fleetune.wire.chunks import CHUNK_BYTES, TAIL_BYTES, Spool, SpoolBusyError, check_declared, read_chunk
from fleetune.workers import Workers

log = logging.getLogger("fleetune.blob")

IDLE_S = 60.0
"""A stream that moves nothing for so long is ended; the agent resumes where it was."""

SLOWEST_BYTES_PER_S = 1024
"""An upload that is slower in the long run holds a place for nothing, on purpose or not; the agent resumes it."""

TRANSFERS_AT_MOST = 64
"""With those that are slow."""

QUICK_S = 0.5
"""A transfer that takes longer goes on without a place among the quick ones."""

SLOW_CHUNK_BYTES = 128 * 1024
"""Chunks of a download that has lost its place, one at a time: a fleet of slow devices must not take a few MiB for each."""

RESPONSES_AHEAD = 2
"""Chunks read in one turn of a disk thread while as many are being sent: a turn costs more than the reading."""

CHUNKS_WAITING = 1
"""Chunks of one upload that wait for its disk thread; then the device waits, by flow control. More gained nothing in speed."""

SUMS_KEPT = 4096
"""Checksums of chunks that are served again and again: those of 4 GiB."""

HOT_BYTES = (16 << 20) + TAIL_BYTES
"""The largest blob whose responses are kept in memory while devices fetch it, and all that is kept."""

DISK_THREADS = 4

SYNC_THREADS = 8
"""Updates made durable at once: file systems write one journal entry for all that wait for it."""


PROBE_S = 30.0
"""Of one probe, whatever has come until then: 256 KiB take so long at 70 kbit/s."""

PROBE_BYTES_MAX = 4 << 20
PROBE_MESSAGE_BYTES_MAX = 64 << 10

_UploadContext = grpc.aio.ServicerContext[frames.Upload, blob_pb2.UploadResponse]


@dataclass
class Traffic:
    """What has moved since the start."""

    received_bytes: int = 0
    sent_bytes: int = 0
    resumed: int = 0
    """Uploads that went on where an earlier one had ended."""


class BlobService:
    def __init__(self, engine: Engine, blobs: BlobStore, *, transfers_at_once: int, max_update_bytes: int, epoch: int) -> None:
        self._engine = engine
        self._blobs = blobs
        # Of both directions: each holds a few chunks in memory, and a device that has its state early computes while others fetch theirs.
        self.transfers = Turns(transfers_at_once, max(transfers_at_once, TRANSFERS_AT_MOST), QUICK_S)
        self._max_update_bytes = max_update_bytes
        self._epoch = epoch
        self._disk = Workers("blob-disk", DISK_THREADS)
        self._sync = Workers("blob-sync", SYNC_THREADS)
        self._probes = Probes()
        self.receiving = 0
        self.traffic = Traffic()
        # By digest, offset and length; used by the disk threads. Two of them may compute one sum twice, which does no harm.
        self._sums: dict[tuple[str, int, int], int] = {}
        self._hot = HotChunks(HOT_BYTES)
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self, within_s: float) -> None:
        """Return when no upload is under way, or after `within_s`."""
        await happened(self._idle, within_s)

    def close(self) -> None:
        self._hot.close()
        self._disk.close()
        self._sync.close()

    async def Download(self, request: blob_pb2.DownloadRequest, context: grpc.aio.ServicerContext[blob_pb2.DownloadRequest, bytes]) -> None:
        if why := self._download_objection(request.digest):
            gate.refuse(why)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"no blob for this caller: {why}")
        async with self.transfers.one() as turn:
            try:
                fd = os.open(self._blobs.path(request.digest), os.O_RDONLY | os.O_CLOEXEC)
            except WireError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except FileNotFoundError:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"no blob {request.digest[:12]}")
            ahead: asyncio.Future[list[Response]] | None = None
            try:
                size = os.fstat(fd).st_size
                if request.offset > size:
                    await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"offset {request.offset} in a blob of {size} bytes")
                position, begun = request.offset, False
                # Of a stream that begins further on, the first response is another: it tells the blob's size, too.
                hot = self._hot.of(request.digest) if size <= HOT_BYTES and not position else None
                with Patience(IDLE_S) as patience:
                    while position < size or not begun:
                        known = hot.get(position) if hot is not None and ahead is None and not turn.aside else None
                        if known is not None:
                            responses = [known]
                        else:
                            if ahead is None:
                                ahead = self._disk.run(self._responses, request.digest, fd, position, size, turn.aside, not begun)
                            responses = await asyncio.shield(ahead)
                            ahead = None
                        if hot is not None and not turn.aside:
                            begins = position
                            for response in responses:
                                self._hot.put(request.digest, begins, response)
                                begins = response.end
                        position, begun = responses[-1].end, True
                        if position < size and (hot is None or position not in hot or turn.aside):
                            ahead = self._disk.run(self._responses, request.digest, fd, position, size, turn.aside)
                        for response in responses:
                            await patience.on(context.write(response.encoded))
                            self.traffic.sent_bytes += len(response.encoded)
            except asyncio.TimeoutError:
                await hang_up(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing was taken for {IDLE_S:g} s; resume where it ended")
            finally:
                if ahead is not None:  # the descriptor must outlive the read
                    await asyncio.wait({ahead})
                    ahead.exception()  # seen; the stream has ended for another reason
                os.close(fd)

    async def UploadStatus(
        self,
        request: blob_pb2.UploadStatusRequest,
        context: grpc.aio.ServicerContext[blob_pb2.UploadStatusRequest, blob_pb2.UploadStatusResponse],
    ) -> blob_pb2.UploadStatusResponse:
        await self._check_owner(request.device_id, request.task_id, context)
        if (wrong := _unusable(request.blob)) is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, wrong)
        if request.epoch not in (0, self._epoch):  # before anything is written down about a task that is another's now
            refused = convert.foreign_epoch(request.epoch, self._epoch)
            return blob_pb2.UploadStatusResponse(receipt=convert.receipt(request.task_id, 0, refused))
        settled = await self._engine.admission.judge(request.task_id, request.device_id, request.blob.digest)
        if settled is not None:
            self._blobs.discard(request.task_id, request.blob)
            return blob_pb2.UploadStatusResponse(receipt=convert.receipt(request.task_id, 0, settled))
        return blob_pb2.UploadStatusResponse(offset=self._blobs.spooled(request.task_id, request.blob))

    async def Probe(
        self,
        request_iterator: AsyncIterator[blob_pb2.ProbeRequest],
        context: grpc.aio.ServicerContext[blob_pb2.ProbeRequest, blob_pb2.ProbeResponse],
    ) -> blob_pb2.ProbeResponse:
        if why := self._probes.objection(gate.caller(), asyncio.get_running_loop().time()):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        self._probes.open += 1
        try:
            return await self._counted(context)
        finally:
            self._probes.open -= 1

    async def _counted(self, context: grpc.aio.ServicerContext[blob_pb2.ProbeRequest, blob_pb2.ProbeResponse]) -> blob_pb2.ProbeResponse:
        """What came and how long it took; of a link that is too slow for all of it, what came in time."""
        loop, received = asyncio.get_running_loop(), 0
        first_s = last_s = 0.0
        until_s = loop.time() + PROBE_S
        while True:
            try:
                message = await next_message(context, until_s - loop.time(), blob_pb2.ProbeRequest)
            except asyncio.TimeoutError:
                break
            if message is None:
                break
            # Not the loop's clock, which ticks in milliseconds: a fast link carries a whole probe in a few of them.
            last_s = time.perf_counter()
            first_s = first_s or last_s
            if len(message.data) > PROBE_MESSAGE_BYTES_MAX:
                most = PROBE_MESSAGE_BYTES_MAX
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a message of a probe has {len(message.data)} bytes; at most {most}")
            received += len(message.data)
            if received > PROBE_BYTES_MAX:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"a probe may send {PROBE_BYTES_MAX} bytes")
        self.traffic.received_bytes += received
        return blob_pb2.ProbeResponse(received_bytes=received, seconds=last_s - first_s)

    def _download_objection(self, digest: str) -> str:
        """Why the caller may not have this blob; the same for one that is not there, which is nobody's business either."""
        caller = gate.caller()
        if caller.kind == "agent":
            own = ownership.own_id(caller, self._engine.registry.names)
            # The newest first: those that have ended gather at the other end.
            fetched = ownership.may_fetch(reversed(self._engine.jobs.values()), own, digest)
            return "" if fetched else "no open task of this device needs the blob"
        if caller.kind == "local" or ownership.is_adapter(self._engine.jobs.values(), digest) or self._engine.retention.is_held(digest):
            return ""
        return "the blob is no adapter"

    async def _check_owner(self, device_id: str, task_id: str, context: Abortable) -> None:
        if why := ownership.task_objection(gate.caller(), device_id, task_id, self._engine.registry.names):
            gate.refuse(why)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)

    async def Upload(self, request_iterator: AsyncIterator[frames.Upload], context: _UploadContext) -> blob_pb2.UploadResponse:
        try:
            with Patience(IDLE_S) as patience:
                return await self._upload(context, patience)
        except asyncio.TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing came for {IDLE_S:g} s; resume where it ended")

    async def _upload(self, context: _UploadContext, patience: Patience) -> blob_pb2.UploadResponse:
        first = await _next(context, patience)
        if first is None or first.header is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of an upload must carry its header")
        header = first.header
        await self._check_owner(header.device_id, header.task_id, context)
        if (wrong := _unusable(header.blob)) is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, wrong)
        if header.epoch != self._epoch:
            who, task_id = convert.clean(header.device_id, 64), convert.clean(header.task_id, 200)
            log.warning("device=%r task=%r update of epoch %d refused, this is epoch %d", who, task_id, header.epoch, self._epoch)
            return self._answer(header, convert.foreign_epoch(header.epoch, self._epoch))
        if why := ownership.lease_objection(self._engine.job_of_task(header.task_id), header.task_id, header.lease):
            gate.refuse("a lease that was never given out")
            return self._answer(header, Receipt("refused", why))
        settled = await self._engine.admission.judge(header.task_id, header.device_id, header.blob.digest)
        if settled is not None:
            self._blobs.discard(header.task_id, header.blob)
            return self._answer(header, settled)
        self._engine.uplinks.announced(header.task_id)
        self.receiving += 1
        self._idle.clear()
        try:
            arrived = [] if first.chunk is None else [first.chunk]
            self.traffic.received_bytes += sum(len(chunk.data) for chunk in arrived)
            self.traffic.resumed += any(chunk.offset > 0 for chunk in arrived)
            del first  # or its chunk would stay in memory until the commit
            return await self._receive(header, arrived, context, patience)
        except SpoolBusyError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except WireError as error:
            gate.refuse(f"device {convert.line(header.device_id, 64)}: {error}")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except DurabilityError as error:
            self._engine.give_up(error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except DiskFullError as error:
            log.error("device=%s task=%s %s", convert.line(header.device_id, 64), convert.line(header.task_id, 200), error)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        finally:
            self.receiving -= 1
            if not self.receiving:
                self._idle.set()

    async def _receive(
        self, header: blob_pb2.UploadHeader, arrived: list[frames.Chunk], context: _UploadContext, patience: Patience
    ) -> blob_pb2.UploadResponse:
        busy: asyncio.Future[None] | asyncio.Future[str] | None = None
        arriving = self._arriving(header)
        sending = False
        try:
            # A slot is for the bytes on their way; waiting for the disk and the commit takes no memory, and many can wait for one.
            async with self.transfers.one():
                # The device keeps its chunks until it sees this: an upload that waits holds no memory here.
                await begin(context)
                if arrived or header.offset:
                    busy, arrived = self._disk.run(arriving.add, arrived), []
                    await asyncio.shield(busy)
                    busy = None
                if not arriving.complete:  # else it came with its header, and nothing is left to be shared
                    self._engine.uplinks.began(header.task_id)
                    sending = True
                # Chunks are written and hashed while the next ones are on their way; what arrives meanwhile goes in one turn.
                begun_s, size = asyncio.get_running_loop().time(), 0
                while (message := await _next(context, patience)) is not None:
                    if message.chunk is None or not len(message.chunk.data):
                        raise WireError("A message of an upload holds no bytes.")
                    arrived.append(message.chunk)
                    size += len(message.chunk.data)
                    self.traffic.received_bytes += len(message.chunk.data)
                    if asyncio.get_running_loop().time() - begun_s > IDLE_S + size / SLOWEST_BYTES_PER_S:
                        raise asyncio.TimeoutError
                    if busy is not None and (busy.done() or len(arrived) >= CHUNKS_WAITING):
                        await asyncio.shield(busy)
                        busy = None
                    if arrived and busy is None:
                        busy, arrived = self._disk.run(arriving.add, arrived), []
                if busy is not None:
                    await asyncio.shield(busy)
                    busy = None
                if arrived or arriving.spool is None:
                    # None of it may stay in memory until the commit.
                    busy, arrived = self._disk.run(arriving.add, arrived), []
                    await asyncio.shield(busy)
                    busy = None
            spool = arriving.spool
            assert spool is not None
            if not spool.complete:
                await context.abort(
                    grpc.StatusCode.ABORTED, f"the stream ended at byte {spool.position} of {header.blob.size_bytes}; resume there"
                )
            sending, times = False, self._engine.uplinks.ended(header.task_id)
            update = replace(convert.update(header), ready_s=times.ready_s, sent_s=times.sent_s)
            async with self._engine.retention.keeping(spool.digest):
                busy = self._sync.run(self._blobs.adopt, spool)
                storing = asyncio.shield(busy)
                admission = self._engine.admission
                receipt = await admission.take_update(header.task_id, header.device_id, update, spool.path, storing)
            return self._answer(header, receipt)
        finally:
            if sending:
                self._engine.uplinks.ended(header.task_id)
            if busy is not None:  # the thread has the spool in hand, also where this stream was cut
                if not busy.done():
                    await asyncio.wait({busy})
                busy.exception()
            if arriving.spool is not None:
                arriving.spool.close()

    def _arriving(self, header: blob_pb2.UploadHeader) -> _Arriving:
        """WireError where it declares more than is allowed."""
        most = ownership.update_bytes_max(self._engine.job_of_task(header.task_id))
        limit_bytes = self._max_update_bytes if most is None else min(most, self._max_update_bytes)
        check_declared(header.blob.digest, header.blob.size_bytes, limit_bytes)
        return _Arriving(self._blobs, header, limit_bytes)

    def _responses(self, digest: str, fd: int, position: int, size: int, slow: bool, first: bool = False) -> list[Response]:
        """The next responses, at least one. Reads the disk."""
        found: list[Response] = []
        most, ahead = (SLOW_CHUNK_BYTES, 1) if slow else (CHUNK_BYTES, RESPONSES_AHEAD)
        while position < size and len(found) < ahead:
            # The devices of a round fetch the same state: its checksums are computed for the first of them.
            known = self._sums.get((digest, position, most))
            chunk = read_chunk(fd, position, size, most, crc32=known)
            if known is None:
                if len(self._sums) >= SUMS_KEPT:
                    self._sums.clear()
                self._sums[digest, position, most] = chunk.crc32
            position += len(chunk.data)
            found.append(Response(frames.encode_download(frames.Download(chunk, size if first and not found else 0)), position))
        return found or [Response(frames.encode_download(frames.Download(None, size)), position)]

    @staticmethod
    def _answer(header: blob_pb2.UploadHeader, receipt: Receipt) -> blob_pb2.UploadResponse:
        return blob_pb2.UploadResponse(receipt=convert.receipt(header.task_id, header.lease, receipt))


class _Arriving:
    """An update on its way into its spool, which is opened with the first bytes: one turn of a thread for both.

    `add` blocks on disk, and is called by one thread at a time.
    """

    def __init__(self, blobs: BlobStore, header: blob_pb2.UploadHeader, limit_bytes: int) -> None:
        self._blobs = blobs
        self._header = header
        self._limit_bytes = limit_bytes
        self.spool: Spool | None = None

    @property
    def complete(self) -> bool:
        return self.spool is not None and self.spool.complete

    def add(self, arrived: Sequence[frames.Chunk]) -> None:
        """Errors as of a Spool."""
        if self.spool is None:
            # One spool for a task: a device must not fill the disk with the beginnings of ever other updates.
            self._blobs.clean_spool_of(self._header.task_id, self._header.blob)
            self.spool = self._blobs.spool(self._header.task_id, self._header.blob, self._limit_bytes)
        self.spool.add_all(arrived)


async def _next(context: Readable, patience: Patience) -> frames.Upload | None:
    """The next message; None at the end of the stream."""
    message = await patience.on(context.read())
    return message if isinstance(message, frames.Upload) else None


def _unusable(blob: messages_pb2.BlobRef) -> str | None:
    """What is wrong with an address from the network, before it names anything."""
    try:
        digests.check(blob.digest)
    except WireError as error:
        return str(error)
    return None

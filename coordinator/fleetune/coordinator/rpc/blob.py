"""BlobService: chunk streams in and out. Knows bytes and receipts; no method, no tensor."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import grpc
import grpc.aio

from fleetune.coordinator.rounds.engine import Engine, Receipt
from fleetune.coordinator.rpc import convert
from fleetune.coordinator.rpc.streams import next_message
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.errors import DiskFullError, WireError
from fleetune.v1 import blob_pb2, blob_pb2_grpc, messages_pb2
from fleetune.waiting import happened, within
from fleetune.wire import digests
from fleetune.wire.chunks import CHUNK_BYTES, SpoolBusyError, read_chunk

log = logging.getLogger("fleetune.blob")

P = ParamSpec("P")
T = TypeVar("T")

IDLE_S = 60.0
"""A stream that moves nothing for so long is ended; the agent resumes where it was."""

DOWNLOADS_AT_ONCE = 8
"""Each holds a few chunks in memory; the others wait their turn, which costs no bandwidth."""

DISK_THREADS = 4


class BlobService(blob_pb2_grpc.BlobServiceServicer):
    def __init__(self, engine: Engine, blobs: BlobStore, *, uploads_at_once: int, max_update_bytes: int, epoch: int) -> None:
        self._engine = engine
        self._blobs = blobs
        self._uploads = asyncio.Semaphore(uploads_at_once)
        self._downloads = asyncio.Semaphore(DOWNLOADS_AT_ONCE)
        self._max_update_bytes = max_update_bytes
        self._epoch = epoch
        self._disk = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="blob-disk")
        self.receiving = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self, within_s: float) -> None:
        """Return when no upload is under way, or after `within_s`."""
        await happened(self._idle, within_s)

    def close(self) -> None:
        self._disk.shutdown(wait=True)

    async def Download(  # type: ignore[override]  # the stub allows both gRPC flavours; this is the aio one
        self, request: blob_pb2.DownloadRequest, context: grpc.aio.ServicerContext[blob_pb2.DownloadRequest, blob_pb2.DownloadResponse]
    ) -> None:
        loop = asyncio.get_running_loop()
        async with self._downloads:
            try:
                fd = os.open(self._blobs.path(request.digest), os.O_RDONLY | os.O_CLOEXEC)
            except WireError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except FileNotFoundError:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"no blob {request.digest[:12]}")
            ahead: asyncio.Future[blob_pb2.Chunk] | None = None
            try:
                size = os.fstat(fd).st_size
                if request.offset > size:
                    await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"offset {request.offset} in a blob of {size} bytes")
                position, first = request.offset, True
                ahead = loop.run_in_executor(self._disk, read_chunk, fd, position, size) if position < size else None
                if ahead is None:
                    await context.write(blob_pb2.DownloadResponse(size_bytes=size))
                while ahead is not None:
                    chunk = await asyncio.shield(ahead)
                    position = min(position + CHUNK_BYTES, size)  # not len(chunk.data), which copies it
                    ahead = loop.run_in_executor(self._disk, read_chunk, fd, position, size) if position < size else None
                    response = blob_pb2.DownloadResponse(chunk=chunk, size_bytes=size if first else 0)
                    await within(IDLE_S, context.write(response))
                    first = False
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
        if (wrong := _unusable(request.blob)) is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, wrong)
        settled = await self._engine.judge(request.task_id, request.device_id, request.blob.digest)
        if settled is not None:
            self._blobs.discard(request.task_id, request.blob)
            return blob_pb2.UploadStatusResponse(receipt=convert.receipt(request.task_id, 0, settled))
        return blob_pb2.UploadStatusResponse(offset=self._blobs.spooled(request.task_id, request.blob))

    async def Upload(
        self,
        request_iterator: AsyncIterator[blob_pb2.UploadRequest],
        context: grpc.aio.ServicerContext[blob_pb2.UploadRequest, blob_pb2.UploadResponse],
    ) -> blob_pb2.UploadResponse:
        first = await self._next(context)
        if first is None or not first.HasField("header"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of an upload must carry its header")
        header = first.header
        if (wrong := _unusable(header.blob)) is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, wrong)
        if header.epoch != self._epoch:
            reason = f"the update is of epoch {header.epoch}, this coordinator is in epoch {self._epoch}: an older state was restored"
            return self._answer(header, Receipt("refused", reason))
        settled = await self._engine.judge(header.task_id, header.device_id, header.blob.digest)
        if settled is not None:
            self._blobs.discard(header.task_id, header.blob)
            return self._answer(header, settled)
        async with self._uploads:
            self.receiving += 1
            self._idle.clear()
            try:
                return await self._receive(header, first, context)
            except SpoolBusyError as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            except WireError as error:
                log.warning("device=%s task=%s upload refused: %s", header.device_id, header.task_id, error)
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except DiskFullError as error:
                log.error("device=%s task=%s %s", header.device_id, header.task_id, error)
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            finally:
                self.receiving -= 1
                if not self.receiving:
                    self._idle.set()

    async def _receive(
        self,
        header: blob_pb2.UploadHeader,
        first: blob_pb2.UploadRequest,
        context: grpc.aio.ServicerContext[blob_pb2.UploadRequest, blob_pb2.UploadResponse],
    ) -> blob_pb2.UploadResponse:
        opening = self._on_disk(self._blobs.spool, header.task_id, header.blob, self._max_update_bytes)
        try:
            spool = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the stream was cut: what the thread is about to open must not stay open
            await asyncio.wait({opening})
            if opening.exception() is None:
                opening.result().close()
            raise
        busy: asyncio.Future[None] | asyncio.Future[str] | None = None
        try:
            message: blob_pb2.UploadRequest | None = first
            # One chunk is written and hashed while the next one is on its way.
            while message is not None:
                if busy is not None:
                    await asyncio.shield(busy)
                    busy = None
                if message.HasField("chunk"):
                    busy = self._on_disk(spool.add, message.chunk)
                message = await self._next(context)
            if busy is not None:
                await asyncio.shield(busy)
            if not spool.complete:
                await context.abort(
                    grpc.StatusCode.ABORTED, f"the stream ended at byte {spool.position} of {header.blob.size_bytes}; resume there"
                )
            async with self._engine.keeping(spool.digest):
                busy = self._on_disk(self._blobs.adopt, spool)
                digest = await asyncio.shield(busy)
                receipt = await self._engine.take_update(
                    header.task_id, header.device_id, convert.update(header), self._blobs.path(digest)
                )
            return self._answer(header, receipt)
        finally:
            if busy is not None:  # the thread has the spool in hand, also where this stream was cut
                await asyncio.wait({busy})
                busy.exception()
            spool.close()

    def _on_disk(self, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._disk, functools.partial(call, *arguments, **named))

    async def _next(
        self, context: grpc.aio.ServicerContext[blob_pb2.UploadRequest, blob_pb2.UploadResponse]
    ) -> blob_pb2.UploadRequest | None:
        try:
            return await next_message(context, IDLE_S, blob_pb2.UploadRequest)
        except asyncio.TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing came for {IDLE_S:g} s; resume where it ended")

    @staticmethod
    def _answer(header: blob_pb2.UploadHeader, receipt: Receipt) -> blob_pb2.UploadResponse:
        return blob_pb2.UploadResponse(receipt=convert.receipt(header.task_id, header.lease, receipt))


def _unusable(blob: messages_pb2.BlobRef) -> str | None:
    """What is wrong with an address from the network, before it names anything."""
    try:
        digests.check(blob.digest)
    except WireError as error:
        return str(error)
    return None

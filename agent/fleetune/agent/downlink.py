"""Blobs from the coordinator to files: resumable by offset, checked by digest, written off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio

from fleetune.agent.bulk import Retry
from fleetune.agent.domain import Blob
from fleetune.errors import WireError
from fleetune.v1 import blob_pb2
from fleetune.wire import chunks, frames

OnBytes = Callable[[int, int], None]
"""Hears (bytes held, bytes in all) after each chunk."""

CHUNKS_WAITING = 2
"""Chunks that wait for the thread that writes; then the coordinator waits, by flow control."""

RESERVE_BYTES = 64 << 20
"""Must stay free on the disk beside a download: the update, the outbox and the system need room as well."""


class Downlink:
    """Fetches blobs over the bulk channel. One thread writes, so that chunks and the closing of a file keep their order."""

    def __init__(self, channel: grpc.aio.Channel, reserve_bytes: int = RESERVE_BYTES) -> None:
        self._download = frames.download(channel)
        self._reserve_bytes = reserve_bytes
        self._files = ThreadPoolExecutor(1, thread_name_prefix="downlink")
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """The coordinator is back: try now what waits for another try."""
        self._wake.set()

    def close(self) -> None:
        self._files.shutdown(wait=True)

    async def fetch(self, blob: Blob, partial: Path, final: Path, *, durable: bool, on_bytes: OnBytes | None = None) -> None:
        """Fetch `blob` into `partial`, verify it, and rename it to `final`. Goes on where an earlier try of any process ended.

        TransferError where the coordinator has no such blob, DiskFullError, WireError for bytes that break the protocol.
        """
        loop = asyncio.get_running_loop()
        retry = Retry(f"Fetching blob {blob.digest[:12]}", self._wake)

        async def attempt(_: int) -> None:
            opened: list[chunks.Spool] = []

            def open_spool() -> chunks.Spool:
                opened.append(chunks.Spool(partial, blob.digest, blob.size_bytes, reserve_bytes=self._reserve_bytes, writeback=durable))
                return opened[0]

            def close_spool() -> None:
                for spool in opened:
                    spool.close()

            try:
                spool = await loop.run_in_executor(self._files, open_spool)
                await self._stream(blob, spool, retry, on_bytes)
                await loop.run_in_executor(self._files, _finish, spool, final, durable)
            finally:
                # In the one thread of the writes, hence after the last of them; keeps what is there for the next try.
                self._files.submit(close_spool)

        await retry.run(attempt)

    async def _stream(self, blob: Blob, spool: chunks.Spool, retry: Retry, on_bytes: OnBytes | None) -> None:
        if spool.complete:
            return
        loop = asyncio.get_running_loop()
        call = self._download(blob_pb2.DownloadRequest(digest=blob.digest, offset=spool.position))
        writing: asyncio.Future[None] | None = None
        arrived: list[frames.Chunk] = []
        try:
            response = await call.read()
            while isinstance(response, frames.Download):
                if response.size_bytes and response.size_bytes != blob.size_bytes:
                    raise WireError(
                        f"Blob {blob.digest[:12]} was declared with {blob.size_bytes} bytes, the coordinator has {response.size_bytes}."
                    )
                if response.chunk is not None:
                    arrived.append(response.chunk)
                if writing is not None and (writing.done() or len(arrived) >= CHUNKS_WAITING):
                    await writing
                    writing = None
                    retry.progressed(spool.position)
                    if on_bytes is not None:
                        on_bytes(spool.position, blob.size_bytes)
                if arrived and writing is None:
                    # The next chunks are read while these are written.
                    writing, arrived = loop.run_in_executor(self._files, spool.add_all, arrived), []
                response = await call.read()
            if writing is not None:
                await writing
                writing = None
            if arrived:
                await loop.run_in_executor(self._files, spool.add_all, arrived)
            if spool.position < blob.size_bytes:
                raise WireError(f"The stream of blob {blob.digest[:12]} ended at byte {spool.position} of {blob.size_bytes}.")
            if on_bytes is not None:
                on_bytes(spool.position, blob.size_bytes)
        finally:
            call.cancel()
            if writing is not None:
                # Its error, if any, is second to the one that ends this stream.
                with contextlib.suppress(Exception):
                    await writing


def _finish(spool: chunks.Spool, final: Path, durable: bool) -> None:
    spool.finish(fsync=durable)
    os.replace(spool.path, final)
    if durable:
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

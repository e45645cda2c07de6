"""Blobs from the coordinator to files: resumable by offset, checked by digest, written off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc.aio

from fleetune.agent.bulk import Retry
from fleetune.agent.domain import Blob
from fleetune.agent.links import Line
from fleetune.errors import WireError
from fleetune.v1 import blob_pb2
from fleetune.wire import chunks, frames
from fleetune.workers import Workers

OnBytes = Callable[[int, int], None]
"""Hears (bytes held, bytes in all) after each chunk."""

OnSample = Callable[[int, float, float, bool], None]
"""Hears of a download that has ended: bytes, their seconds, the rate it was held to (none: infinite), and whether the seconds hold more."""

CHUNKS_WAITING = 2
"""Chunks that wait for the thread that writes; then the coordinator waits, by flow control."""

RESERVE_BYTES = 64 << 20
"""Must stay free on the disk beside a download: the update, the outbox and the system need room as well."""


class Downlink:
    """Fetches blobs over the line for bulk. One thread writes, so that chunks and the closing of a file keep their order."""

    def __init__(
        self,
        line: Line,
        reserve_bytes: int = RESERVE_BYTES,
        on_sample: OnSample = lambda size_bytes, seconds, limit_bytes_per_s, at_least: None,
    ) -> None:
        self._line = line
        self._reserve_bytes = reserve_bytes
        self._on_sample = on_sample
        self._files = Workers("downlink")
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """The coordinator is back: try now what waits for another try."""
        self._wake.set()

    def close(self) -> None:
        self._files.close()

    async def fetch(self, blob: Blob, partial: Path, final: Path, *, durable: bool, on_bytes: OnBytes | None = None) -> None:
        """Fetch `blob` into `partial`, verify it, and rename it to `final`. Goes on where an earlier try of any process ended.

        TransferError where the coordinator has no such blob, DiskFullError, WireError for bytes that break the protocol.
        """
        retry = Retry(f"Fetching blob {blob.digest[:12]}", self._wake)

        async def attempt(_: int) -> None:
            arriving = _Arriving(blob, partial, final, durable, self._reserve_bytes)
            try:
                begun = partial.exists()  # noqa: ASYNC240  # one stat in the own folder costs less than a turn of a thread
                if begun:
                    position = await self._files.run(arriving.resume)
                else:
                    position = 0
                    chunks.check_space(partial.parent, blob.digest, blob.size_bytes, self._reserve_bytes)
                if not arriving.finished:
                    async with self._line.use() as channel:
                        await self._stream(channel, arriving, position, retry, on_bytes)
            finally:
                if not arriving.finished:
                    # In the one thread of the writes, hence after the last of them; keeps what is there for the next try.
                    self._files.tell(arriving.close)

        await retry.run(attempt)

    async def _stream(self, channel: grpc.aio.Channel, arriving: _Arriving, position: int, retry: Retry, on_bytes: OnBytes | None) -> None:
        blob = arriving.blob
        call = frames.download(channel)(blob_pb2.DownloadRequest(digest=blob.digest, offset=position))
        writing: asyncio.Future[int] | None = None
        arrived: list[frames.Chunk] = []
        ended = False
        begun_s = time.monotonic()
        first_s, ended_s, first_bytes, came_bytes = begun_s, begun_s, 0, 0
        try:
            while not ended:
                response = await call.read()
                if isinstance(response, frames.Download):
                    if response.size_bytes and response.size_bytes != blob.size_bytes:
                        raise WireError(
                            f"Blob {blob.digest[:12]} was declared with {blob.size_bytes} bytes, the coordinator has {response.size_bytes}."
                        )
                    if response.chunk is not None:
                        arrived.append(response.chunk)
                        came_bytes += len(response.chunk.data)
                        if not first_bytes:
                            first_s, first_bytes = time.monotonic(), came_bytes
                else:
                    ended = True
                    ended_s = time.monotonic()
                if writing is not None and (ended or writing.done() or len(arrived) >= CHUNKS_WAITING):
                    position = await writing
                    writing = None
                    retry.progressed(position)
                    if on_bytes is not None:
                        on_bytes(position, blob.size_bytes)
                if arrived and writing is None:
                    # The next chunks are read while these are written.
                    writing, arrived = self._files.run(arriving.add, arrived), []
            if writing is not None:
                position = await writing
                writing = None
            if not arriving.finished:
                raise WireError(f"The stream of blob {blob.digest[:12]} ended at byte {position} of {blob.size_bytes}.")
            if came_bytes > first_bytes:
                # Before the first chunk the stream may have waited for its turn.
                self._on_sample(came_bytes - first_bytes, ended_s - first_s, math.inf, False)
            else:
                self._on_sample(came_bytes, ended_s - begun_s, math.inf, True)
            if on_bytes is not None:
                on_bytes(blob.size_bytes, blob.size_bytes)
        finally:
            call.cancel()
            if writing is not None:
                # Its error, if any, is second to the one that ends this stream.
                with contextlib.suppress(Exception):
                    await writing


class _Arriving:
    """A blob on its way into a file. All but `finished` is for the one thread that writes."""

    def __init__(self, blob: Blob, partial: Path, final: Path, durable: bool, reserve_bytes: int) -> None:
        self.blob = blob
        self.finished = False
        self._partial = partial
        self._final = final
        self._durable = durable
        self._reserve_bytes = reserve_bytes
        self._spool: chunks.Spool | None = None

    def resume(self) -> int:
        """Bytes that an earlier try left behind; finishes where that is all."""
        return self.add([])

    def add(self, arrived: Sequence[frames.Chunk]) -> int:
        """Write chunks, and finish with the last one: verified and under its final name. Returns the bytes held."""
        if self.finished:
            raise WireError(f"More than the {self.blob.size_bytes} bytes of blob {self.blob.digest[:12]} came.")
        if self._spool is None:
            self._spool = chunks.Spool(
                self._partial, self.blob.digest, self.blob.size_bytes, reserve_bytes=self._reserve_bytes, writeback=self._durable
            )
        self._spool.add_all(arrived)
        if self._spool.complete:
            self._spool.finish(fsync=self._durable, move_to=self._final)
            if self._durable:
                _fsync(self._final.parent)
            self.finished = True
        return self._spool.position

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()


def _fsync(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

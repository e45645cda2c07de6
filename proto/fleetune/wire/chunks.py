"""Chunks: the slices in which a blob travels, and the spool that assembles them on disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from fleetune.errors import DiskFullError, WireError
from fleetune.wire import checksums, digests, frames

CHUNK_BYTES = 1 << 20
# A blob's last chunk may be longer by this, so that a few bytes beyond a whole number of chunks, such as a tensor file's header, are no
# message of their own.
TAIL_BYTES = 64 << 10
MIN_CHUNK_BYTES = 16 << 10
# A chunk should be on its way no longer than this at the assigned rate, so that pacing and cancelling stay prompt.
CHUNK_S = 0.5
# Written bytes are given to the disk in portions of this size while more arrive, so that the fsync at the end finds little to do.
WRITEBACK_BYTES = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class SpoolBusyError(WireError):
    """Another stream is writing the same spool."""


def chunk_bytes_at(rate_bytes_per_s: float) -> int:
    """Chunk size for a link: CHUNK_S at its rate, within MIN_CHUNK_BYTES and CHUNK_BYTES; a rate of 0 is an unpaced link."""
    if rate_bytes_per_s <= 0:
        return CHUNK_BYTES
    return int(min(CHUNK_BYTES, max(MIN_CHUNK_BYTES, rate_bytes_per_s * CHUNK_S)))


class ReceivedChunk(Protocol):
    """A chunk as it arrived: a blob_pb2.Chunk, or the cheaper one of `frames`."""

    @property
    def offset(self) -> int: ...

    @property
    def data(self) -> bytes | memoryview: ...

    @property
    def crc32(self) -> int: ...


def read_chunk(fd: int, offset: int, end: int, chunk_bytes: int = CHUNK_BYTES, crc32: int | None = None) -> frames.Chunk:
    """The chunk at `offset` of an open file: `chunk_bytes` long, or what is left before `end` if that is hardly more.

    `crc32` spares computing the checksum of bytes that were read before. WireError where the file is shorter.
    """
    left = end - offset
    wanted = left if left <= chunk_bytes + min(TAIL_BYTES, chunk_bytes // 16) else chunk_bytes
    if offset < 0 or wanted <= 0:
        raise WireError(f"No chunk lies between byte {offset} and byte {end}.")
    data = os.pread(fd, wanted, offset)
    while len(data) < wanted:  # rare: a signal, or a file system that reads less
        more = os.pread(fd, wanted - len(data), offset + len(data))
        if not more:
            raise WireError(f"A blob ends at byte {offset + len(data)}; byte {end} was promised.", "It was cut on disk: fetch it again.")
        data += more
    return frames.chunk_of(offset, data, crc32)


def start_writeback(fd: int, begin: int, end: int) -> None:
    """Let the kernel start writing these bytes to disk, without waiting; does nothing where it cannot be asked to."""
    if sys.platform == "linux":
        # Queues the dirty pages and drops the clean ones; these are not clean yet, so they stay cached for whoever reads them next.
        os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_DONTNEED)


def check_space(folder: Path, digest: str, missing_bytes: int, reserve_bytes: int) -> None:
    """DiskFullError where `missing_bytes` of a blob do not fit into `folder` beside what must stay free."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if missing_bytes and free < missing_bytes + reserve_bytes:
        raise DiskFullError(
            f"Blob {digest[:12]} needs {missing_bytes} more bytes and {reserve_bytes} in reserve; {folder} has {free} free.",
            "Make room on that disk.",
        )


def check_declared(digest: str, size_bytes: int, limit_bytes: int | None) -> None:
    """WireError where a blob declares no bytes, or more than `limit_bytes`, the largest that is allowed here."""
    if size_bytes <= 0 or (limit_bytes is not None and size_bytes > limit_bytes):
        allowed = f"1 to {limit_bytes}" if limit_bytes is not None else "1 or more"
        raise WireError(f"Blob {digest[:12]} declares {size_bytes} bytes; {allowed} are allowed here.")


class Spool:
    """Assembles one blob at `path` from contiguous chunks; the file outlives a cut and is taken up again where it ended.

    Synchronous; for one caller at a time, from any thread. Owner of its file until `finish`, `close` or `discard`; as a
    context manager it closes.
    """

    def __init__(
        self,
        path: Path,
        digest: str,
        size_bytes: int,
        *,
        limit_bytes: int | None = None,
        reserve_bytes: int = 0,
        writeback: bool = True,
    ) -> None:
        """Open or resume; reads what is there once. Without `writeback` the kernel may leave the bytes in memory as long as it likes.

        `limit_bytes` is the largest blob allowed here, `reserve_bytes` what must stay free on the disk beside it.
        WireError for an absurd size or digest, DiskFullError where the rest of the blob cannot fit, SpoolBusyError for a second writer.
        """
        self.path = path
        self.digest = digests.check(digest)
        self.size_bytes = size_bytes
        check_declared(digest, size_bytes, limit_bytes)
        self._hash = digests.running()
        self._position = 0
        self._queued = 0
        self._writeback = writeback
        self._fd = _open_alone(path, digest)
        try:
            self._resume()
            check_space(path.parent, digest, size_bytes - self._position, reserve_bytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def position(self) -> int:
        """Bytes held from the start on."""
        return self._position

    @property
    def complete(self) -> bool:
        return self._position == self.size_bytes

    def add(self, chunk: ReceivedChunk) -> None:
        """Take the next chunk. What was received before is compared and dropped; nothing changes when this raises.

        WireError for a bad checksum, a gap, other bytes than before, or bytes past the end; DiskFullError.
        """
        offset, data = chunk.offset, chunk.data  # protobuf copies `data` at each access
        end = offset + len(data)
        if not 0 < len(data) <= CHUNK_BYTES + TAIL_BYTES:
            allowed = CHUNK_BYTES + TAIL_BYTES
            raise WireError(f"A chunk of {len(data)} bytes came for blob {self.digest[:12]}; 1 to {allowed} are allowed.")
        if checksums.crc32(data) != chunk.crc32:
            raise WireError(f"The chunk at byte {offset} of blob {self.digest[:12]} has a wrong checksum.", "Send it again.")
        if end > self.size_bytes:
            raise WireError(f"A chunk of blob {self.digest[:12]} reaches byte {end}; the blob was declared with {self.size_bytes}.")
        if offset > self._position:
            raise WireError(f"A chunk of blob {self.digest[:12]} starts at byte {offset}; byte {self._position} is next.")
        known = min(end, self._position) - offset
        if known and os.pread(self._fd, known, offset) != data[:known]:
            raise WireError(f"The chunk at byte {offset} of blob {self.digest[:12]} differs from what was received before.")
        if end > self._position:
            self._append(memoryview(data)[known:])

    def add_all(self, arrived: Iterable[ReceivedChunk]) -> None:
        """Take several chunks in one turn of a thread; what came before one that is refused stays."""
        for chunk in arrived:
            self.add(chunk)

    def finish(self, fsync: bool = True, move_to: Path | None = None) -> None:
        """Verify size and digest, make the bytes durable if asked, rename to `move_to` if given, and close.

        A mismatch removes the file and raises WireError. The folders are not fsynced here, so that several blobs can share that.
        """
        found = self._hash.hexdigest()
        if not self.complete or found != self.digest:
            held = self._position
            self.discard()
            if held != self.size_bytes:
                raise WireError(f"Blob {self.digest[:12]} ended at byte {held} of {self.size_bytes}.", "Send it again.")
            raise WireError(f"Blob {self.digest[:12]} has the digest {found[:12]}.", "Send it again from the start.")
        try:
            if fsync:
                os.fsync(self._fd)
            if move_to is not None:  # still under the lock: a second stream must not resume a file that is moving away
                os.replace(self.path, move_to)
        finally:
            self.close()

    def close(self) -> None:
        """Close and keep what is there for a later stream. May be called again."""
        self._release(keep=self._position > 0)

    def discard(self) -> None:
        """Close and remove the file. May be called again; does nothing after `finish` or `close`."""
        self._release(keep=False)

    def _resume(self) -> None:
        held = os.fstat(self._fd).st_size
        if held > self.size_bytes:  # not what was declared: nothing in it can be trusted
            os.ftruncate(self._fd, 0)
            held = 0
        if held:
            self._position = self._queued = digests.feed(self._hash.update, self._fd, held)

    def _append(self, fresh: memoryview) -> None:
        written = 0
        try:
            while written < len(fresh):
                written += os.pwrite(self._fd, fresh[written:], self._position + written)
        except OSError as error:
            os.ftruncate(self._fd, self._position)
            if error.errno in _FULL:
                raise DiskFullError(
                    f"No space left in {self.path.parent} at byte {self._position + written} of blob {self.digest[:12]}.",
                    "Make room on that disk.",
                ) from error
            raise
        self._hash.update(fresh)
        self._position += written
        if self._writeback and self._position - self._queued >= WRITEBACK_BYTES:
            start_writeback(self._fd, self._queued, self._position)
            self._queued = self._position

    def _release(self, keep: bool) -> None:
        if self._fd < 0:
            return
        if not keep:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)  # ends the lock
        self._fd = -1


def _open_alone(path: Path, digest: str) -> int:
    """Descriptor of the file at `path` with an exclusive lock on it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last owner may have renamed or removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
        except BlockingIOError:
            os.close(fd)
            raise SpoolBusyError(f"Blob {digest[:12]} is being received by another stream.", "Resume when that one has ended.") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)

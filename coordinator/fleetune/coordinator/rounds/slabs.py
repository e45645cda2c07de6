"""Slabs of tensor files: read into a reused buffer, widened to float64, rounded back once, written front to back with a digest."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fleetune.errors import DiskFullError, DurabilityError, NotFiniteError, WireError
from fleetune.wire import codec, digests
from fleetune.wire.chunks import WRITEBACK_BYTES, start_writeback

_FULL = (errno.ENOSPC, errno.EDQUOT)

Floats = npt.NDArray[np.float64]
FLOATS: Mapping[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

BLOCK_BYTES = 1 << 20
"""Written and hashed at once."""


class Output:
    """A file that is written once, front to back, aside, with its digest on the way; gone unless published.

    Hashing takes as long as the arithmetic that makes the bytes: beyond the first BLOCK_BYTES it is done, with the writing, by
    a thread of its own, one block at a time while the next one fills.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # One name for every attempt: a fold that was killed leaves at most one file, which the next one replaces.
        self._aside = path.with_name(f"{path.name}.part")
        self._fd = -1
        self._hash = digests.running()
        self._block, self._spare = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
        self._filled = 0
        self._thread: ThreadPoolExecutor | None = None
        self._storing: Future[None] | None = None
        self.size_bytes = 0
        self._queued = 0
        self._stored = 0

    def __enter__(self) -> Output:
        self._aside.unlink(missing_ok=True)
        # Read-only from birth: the state's file gets names in the blob store and in adapter folders, and nobody should edit it in place.
        self._fd = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        os.close(self._fd)
        self._aside.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview) -> None:
        """Takes a copy of `data`. DiskFullError may be of an earlier call's bytes."""
        view = memoryview(data)
        self.size_bytes += len(view)
        while view:
            part = view[: BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._wait()
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(1, thread_name_prefix="fold-write")
                self._storing = self._thread.submit(self._store, memoryview(self._block))
                self._block, self._spare, self._filled = self._spare, self._block, 0

    def make_durable(self) -> None:
        """All that was written is on disk when this returns, and `digest` may be asked."""
        self._wait()
        self._store(memoryview(self._block)[: self._filled])
        self._filled = 0
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(f"No space left in {self._path.parent} for {self._path.name}.", "Make room on that disk.") from error
            raise DurabilityError(
                f"The disk did not take {self._path}: {error.strerror}.", "Look at the disk's health; then start again."
            ) from error

    def publish(self) -> None:
        os.replace(self._aside, self._path)

    def digest(self) -> str:
        """Of what `make_durable` has seen."""
        return self._hash.hexdigest()

    def _wait(self) -> None:
        storing, self._storing = self._storing, None
        if storing is not None:
            storing.result()

    def _full(self) -> DiskFullError:
        return DiskFullError(f"No space left in {self._path.parent} for {self._path.name}.", "Make room on that disk.")

    def _store(self, view: memoryview) -> None:
        self._hash.update(view)
        self._stored += len(view)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            if error.errno in _FULL:
                raise self._full() from error
            raise
        if self._stored - self._queued >= WRITEBACK_BYTES:
            start_writeback(self._fd, self._queued, self._stored)
            self._queued = self._stored


def read(fd: int, into: memoryview, offset: int) -> memoryview:
    """Fill `into` from `offset` on."""
    missing = into
    while missing:
        count = os.preadv(fd, [missing], offset)
        if count == 0:
            raise WireError(f"A tensor file ends at byte {offset}, {len(missing)} bytes early.", "It was cut on disk.")
        missing = missing[count:]
        offset += count
    return into


def widen(raw: memoryview, dtype: str, out: Floats) -> None:
    """Exact: every F16, BF16 and F32 is a float64."""
    np.copyto(out, np.frombuffer(raw, FLOATS[dtype]))


def narrow(values: Floats, dtype: str, buffer: memoryview) -> memoryview:
    """`values` rounded once, ties to even, into `buffer`; NotFiniteError where one is beyond the dtype's range."""
    raw = buffer[: len(values) * codec.ITEM_BYTES[dtype]]
    rounded = np.frombuffer(raw, FLOATS[dtype])
    try:
        with np.errstate(over="raise"):
            if dtype == "BF16":
                # ml_dtypes goes through float32 and so rounds twice; float32 rounded to odd keeps what the second rounding needs.
                np.copyto(rounded, _to_odd(values), casting="unsafe")
                if not np.isfinite(rounded).all():  # its cast sets no flag
                    raise FloatingPointError
            else:
                np.copyto(rounded, values, casting="same_kind")
    except FloatingPointError as error:
        raise NotFiniteError(f"The folded state goes beyond {dtype}'s range.", "Lower the learning rates, or keep it in F32.") from error
    return raw


def _to_odd(values: Floats) -> npt.NDArray[np.float32]:
    """float64 to float32; what is not exact goes to the neighbour whose last bit is odd."""
    near = values.astype(np.float32)
    bits = np.frombuffer(near.data, np.int32)
    error = np.abs(near.astype(np.float64)) - np.abs(values)
    move = (error != 0) & (bits & 1 == 0)
    bits[move] -= np.sign(error[move]).astype(np.int32)
    return near

"""Content addresses: lower-case hex BLAKE3 (256 bits), checked before it becomes part of a path.

BLAKE3 and not sha256, since every byte of a round is hashed three times and a board may have no sha256 instructions:
docs/decisions/0004-blake3.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from fleetune.errors import WireError

SLAB_BYTES = 1 << 20
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)


def check(digest: str) -> str:
    """The digest itself; WireError unless it is 64 lower-case hex characters."""
    if not _HEX.fullmatch(digest):
        raise WireError(f"{digest[:80]!r} is not a digest: 64 lower-case hex characters are needed.")
    return digest


def running() -> blake3:
    """A digest to be fed by `update`; `hexdigest` gives the address. Releases the interpreter while it computes."""
    return blake3()


def of_bytes(data: bytes | bytearray | memoryview) -> str:
    """Digest of bytes in memory."""
    return blake3(data).hexdigest()


def of_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Digest of a file, read in slabs; `on_bytes` hears the length of each. OSError if the file cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        hasher = blake3()
        feed(hasher.update, fd, os.fstat(fd).st_size, on_bytes)
        return hasher.hexdigest()
    finally:
        os.close(fd)


def feed(update: Callable[[memoryview], object], fd: int, length_bytes: int, on_bytes: Callable[[int], None] | None = None) -> int:
    """Give the first `length_bytes` of an open file to `update` slab by slab; returns the bytes really there."""
    slab = memoryview(bytearray(min(SLAB_BYTES, max(1, length_bytes))))
    done = 0
    while done < length_bytes:
        count = os.preadv(fd, [slab[: length_bytes - done]], done)
        if count == 0:
            break
        update(slab[:count])
        done += count
        if on_bytes is not None:
            on_bytes(count)
    return done

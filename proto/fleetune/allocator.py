"""How the daemons' memory comes from the system and goes back to it, set once at their start."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def tune_for_chunks(keep_bytes: int) -> None:
    """Keep up to about `keep_bytes` of freed memory for the next chunk; does nothing where the C library is not glibc.

    Chunks of about 1 MiB come and go by the hundred. By default glibc maps each of them anew, and the page faults cost more than
    the copying; left to adapt by itself it stops that, but keeps whatever the busiest moment took. One arena, because
    a chunk that one thread frees is then there for the next thread that asks.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 16 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, keep_bytes)


def settle() -> None:
    """What is alive now, stays: modules and all that start-up made are no longer looked through for garbage.

    A full collection of the coordinator takes as long as a small round otherwise.
    """
    gc.collect()
    gc.freeze()

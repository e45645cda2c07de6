"""What a computing child is told of threads by its environment, before it loads the libraries that read it."""

from __future__ import annotations

import os
from collections.abc import Mapping


def environment(threads: int = 0, ours: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a child that computes with so many threads; 0: as many as it finds. `ours` is this process's own environment.

    An OMP_WAIT_POLICY that this process was given itself is left as it is.
    """
    ours = os.environ if ours is None else ours
    found = {"TOKENIZERS_PARALLELISM": "false"}
    if threads > 0:
        found["OMP_NUM_THREADS"] = str(threads)
    if "OMP_WAIT_POLICY" not in ours:
        # Threads wait for each other a thousand times in a training step. libgomp lets them spin meanwhile, which only pays where every
        # thread has a core for itself: within a quota, or beside other programs, one that spins takes the time of the one it waits for
        # (docs/docker.md has figures).
        found["OMP_WAIT_POLICY"] = "passive"
    return found

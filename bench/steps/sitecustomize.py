"""Loaded by Python at its start where this folder is on PYTHONPATH: ends the process before its Nth step on the disk.

KILL_AT_STEP is N, counted over all threads; KILL_LOG is the file that the step is written to first.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import TypeVar

STEPS = ("fsync", "pwrite", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "ftruncate", "truncate")

R = TypeVar("R")

_count = itertools.count(1)
"""Its next() is one step of the interpreter: two threads never get the same number."""


def _counted(name: str, call: Callable[..., R], last: int, log: str) -> Callable[..., R]:
    def step(*arguments: object, **options: object) -> R:
        if next(_count) == last:
            what = arguments[1] if name in ("rename", "replace", "link", "symlink") else arguments[0]
            place = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fsdecode(what)  # type: ignore[arg-type]  # a path
            with open(log, "w", encoding="utf-8") as file:
                file.write(f'{name}("{place}")\n')
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return step


if os.environ.get("KILL_AT_STEP", "").isdigit():
    for _name in STEPS:
        setattr(os, _name, _counted(_name, getattr(os, _name), int(os.environ["KILL_AT_STEP"]), os.environ["KILL_LOG"]))

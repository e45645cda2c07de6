"""Processes by what /proc says of them: told apart by their start, so that a number used again is never taken for the old one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
LOOK_S = 0.02
END_S = 10.0
"""What was killed is gone within this, unless the kernel holds it."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Facts:
    """Of one process, from /proc/PID/stat."""

    pid: int
    state: str
    """R, S, D, T (stopped), Z (ended, not yet waited for) and so on."""
    start_ticks: int
    """Since the machine's start."""
    cpu_s: float
    """Its own and that of ended children it has waited for."""
    memory_bytes: int
    """Resident."""


def facts(pid: int) -> Facts | None:
    """None where there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in brackets and may hold anything.
    fields = text[text.rindex(")") + 2 :].split()
    cpu = sum(int(field) for field in fields[11:15])
    return Facts(pid, fields[0], int(fields[19]), cpu / _TICKS_PER_S, int(fields[21]) * _PAGE_BYTES)


def alive(pid: int, start_ticks: int) -> bool:
    """Whether it is still that very process."""
    found = facts(pid)
    return found is not None and found.start_ticks == start_ticks and found.state != "Z"


def marked(variable: str, value: str) -> list[int]:
    """Processes that were started with this variable in their environment, and are ours to look into."""
    wanted = f"{variable}={value}".encode()
    found: list[int] = []
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def gone(pid: int, start_ticks: int, within_s: float) -> bool:
    """Waits until it has ended; False where it has not in time."""
    deadline_s = time.monotonic() + within_s
    while alive(pid, start_ticks):
        if time.monotonic() > deadline_s:
            return False
        # Ours may be waited for; another verb's child is init's.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        time.sleep(LOOK_S)
    return True

"""What processes take of this machine, read from /proc while they run."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

COORDINATOR_S = 0.02
"""Between two looks at the coordinator: short enough to see the memory of one fold."""

AGENTS_S = 0.25
"""Between two looks at the agents: there are many, and the kernel keeps their highest resident memory by itself."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Memory:
    """Bytes. `anon` is what the process itself took, `resident` counts mapped files and libraries too, `peak` is the kernel's own mark."""

    anon: int
    resident: int
    peak: int


def memory(pid: int) -> Memory | None:
    """None where the process has ended."""
    found: dict[str, int] = {}
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmRSS", "VmHWM"):
                found[name] = int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return None
    if len(found) < 3:  # a process that has ended but was not waited for
        return None
    return Memory(found["RssAnon"], found["VmRSS"], found["VmHWM"])


def forget_peak(pid: int) -> None:
    """Begin the kernel's mark of the highest resident memory anew."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def cpu_s(pid: int) -> float:
    """Seconds on a core of all threads, its children's not included; 0 where the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def loopback_bytes() -> int:
    """Bytes that have gone over the loopback device since the machine started, everybody's."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[8])
    return 0


def children(pid: int) -> list[int]:
    """Processes that the main thread of `pid` has started."""
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@dataclass(frozen=True)
class Sample:
    unix_s: float
    cpu_s: float
    loopback_bytes: int


class Meter:
    """Looks at a coordinator and its agents from a thread of its own, from `start` to `stop`; the figures are whole after `stop`."""

    def __init__(self, coordinator: int, agents: Sequence[int]) -> None:
        self._coordinator = coordinator
        self._agents = tuple(agents)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter")
        self.samples: list[Sample] = []
        self.coordinator_anon_peak = 0
        self.coordinator_peak = 0
        self.agent_peak = 0
        self.child_peak = 0

    def __enter__(self) -> Meter:
        for pid in (self._coordinator, *self._agents):
            forget_peak(pid)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._look_at_agents()

    def between(self, begin_unix_s: float, end_unix_s: float) -> tuple[float, float]:
        """CPU seconds of the coordinator and bytes on loopback from one time to another."""
        first, last = self._at(begin_unix_s), self._at(end_unix_s)
        return last[0] - first[0], last[1] - first[1]

    def _at(self, unix_s: float) -> tuple[float, float]:
        """The counters at a time, on the line between the samples around it."""
        before = self.samples[0]
        for after in self.samples:
            if after.unix_s >= unix_s:
                span = after.unix_s - before.unix_s
                part = (unix_s - before.unix_s) / span if span > 0 else 0.0
                return (
                    before.cpu_s + part * (after.cpu_s - before.cpu_s),
                    before.loopback_bytes + part * (after.loopback_bytes - before.loopback_bytes),
                )
            before = after
        return before.cpu_s, float(before.loopback_bytes)

    def _run(self) -> None:
        agents_at_s = time.monotonic()
        while not self._stop.wait(COORDINATOR_S):
            self._look_at_coordinator()
            if time.monotonic() >= agents_at_s:
                self._look_at_agents()
                agents_at_s = time.monotonic() + AGENTS_S
        self._look_at_coordinator()

    def _look_at_coordinator(self) -> None:
        found = memory(self._coordinator)
        if found is not None:
            self.coordinator_anon_peak = max(self.coordinator_anon_peak, found.anon)
            self.coordinator_peak = max(self.coordinator_peak, found.peak)
            self.samples.append(Sample(time.time(), cpu_s(self._coordinator), loopback_bytes()))

    def _look_at_agents(self) -> None:
        for pid in self._agents:
            if (found := memory(pid)) is not None:
                self.agent_peak = max(self.agent_peak, found.peak)
            for child in children(pid):
                if (found := memory(child)) is not None:
                    self.child_peak = max(self.child_peak, found.peak)

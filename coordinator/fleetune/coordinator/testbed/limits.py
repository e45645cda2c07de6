"""Processor and memory quotas of a group of processes, through control groups of version 2 or 1."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from fleetune.coordinator.faults import MachineError

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
EMPTY_S = 5.0
"""Killed processes leave their group within this."""

LOOK_S = 0.01


@dataclass(frozen=True)
class Limits:
    """What the processes of a device may take together. `memory_bytes` counts page cache, too; None is no bound."""

    cpus: float
    memory_bytes: int | None = None


class Group:
    """One device's control group. Made with `create`, gone after `remove`, which kills whoever is in it."""

    def __init__(self, name: str, limits: Limits, root: Path = ROOT) -> None:
        self._limits = limits
        self._root = root
        self._unified = (root / "cgroup.controllers").exists()
        controllers = ("",) if self._unified else ("cpu", "memory", "cpuacct")
        self._folders = tuple(root / controller / name for controller in controllers)

    def create(self) -> None:
        """MachineError where the system does not let us."""
        quota_us = max(1000, round(self._limits.cpus * PERIOD_US))
        memory = self._limits.memory_bytes
        try:
            if self._unified:
                self._hand_down()
            for folder in self._folders:
                folder.mkdir(parents=True, exist_ok=True)
            if self._unified:
                (folder,) = self._folders
                (folder / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
                if memory is not None:
                    (folder / "memory.max").write_text(str(memory))
                    (folder / "memory.swap.max").write_text("0")
            else:
                cpu, room, _ = self._folders
                (cpu / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (cpu / "cpu.cfs_quota_us").write_text(str(quota_us))
                if memory is not None:
                    (room / "memory.limit_in_bytes").write_text(str(memory))
        except OSError as error:
            raise MachineError(
                f"No control group for {self._folders[0].name}: {error.strerror} ({error.filename}).",
                "Quotas need root and the cpu and memory controllers; take the compose backend where they are not to be had.",
            ) from error

    def _hand_down(self) -> None:
        """A group has the controllers that its parent hands down, and systemd lets the root do so as far as a unit has asked for one."""
        file = self._root / "cgroup.subtree_control"
        missing = sorted({"cpu", "memory"} - set(file.read_text().split()))
        if missing:
            file.write_text(" ".join(f"+{controller}" for controller in missing))

    def joining(self, command: list[str]) -> list[str]:
        """`command`, run inside the group."""
        files = [str(folder / "cgroup.procs") for folder in self._folders]
        script = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 126; shift; done; shift; exec "$@"'
        return ["/bin/sh", "-c", script, "sh", *files, "--", *command]

    def processes(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [int(line) for line in (self._folders[0] / "cgroup.procs").read_text().split()]
        return []

    def memory_events(self) -> int:
        """Processes that the kernel has killed in this group for lack of memory."""
        file = self._folders[0] / "memory.events" if self._unified else self._folders[1] / "memory.oom_control"
        with contextlib.suppress(OSError):
            for line in file.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        return 0

    def squeeze(self, spare_bytes: int) -> None:
        """Leave no more memory than is taken now and a little, as if another program had the rest. `relax` undoes it."""
        taken, _ = self.memory_bytes()
        if taken is not None:
            limit = min(taken + spare_bytes, self._limits.memory_bytes or taken + spare_bytes)
            self._memory_limit.write_text(str(limit))

    def relax(self) -> None:
        """The limit as it was. Safe where the group is gone."""
        with contextlib.suppress(FileNotFoundError):
            unbounded = "max" if self._unified else "-1"
            self._memory_limit.write_text(unbounded if self._limits.memory_bytes is None else str(self._limits.memory_bytes))

    @property
    def _memory_limit(self) -> Path:
        return self._folders[0] / "memory.max" if self._unified else self._folders[1] / "memory.limit_in_bytes"

    @property
    def made(self) -> bool:
        """Whether it is there."""
        return self._folders[0].is_dir()

    def memory_bytes(self) -> tuple[int | None, int | None]:
        """What it takes now, page cache included, and what it has taken at the most."""
        if not self._unified:
            return _number(self._folders[1] / "memory.usage_in_bytes"), _number(self._folders[1] / "memory.max_usage_in_bytes")
        # memory.peak came with Linux 5.19.
        return _number(self._folders[0] / "memory.current"), _number(self._folders[0] / "memory.peak")

    def cpu_seconds(self) -> float:
        """Processor time of all processes that have run in it."""
        if not self._unified:
            return int((self._folders[2] / "cpuacct.usage").read_text()) / 1e9
        lines = (self._folders[0] / "cpu.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("usage_usec")) / 1e6

    def remove(self) -> None:
        """Kill what is in it, also what comes meanwhile, and remove it. Safe where it was never made."""
        deadline_s = time.monotonic() + EMPTY_S
        while not self._removed():
            if time.monotonic() > deadline_s:
                left = self.processes()
                raise MachineError(f"Processes {left} of {self._folders[0]} do not end.", "See what holds them, for example a hung disk.")
            time.sleep(LOOK_S)

    def _removed(self) -> bool:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for folder in self._folders:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                # Somebody is in it; one that has just ended is counted for a moment more.
                if error.errno != errno.EBUSY:
                    raise
                return False
        return True


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (FileNotFoundError, ValueError):
        return None

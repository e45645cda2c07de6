"""What this agent can compute with: cores, machine, board and accelerator."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from fleetune.agent.probe import cgroup

_JETSON_NODES = ("dev/nvhost-gpu", "dev/nvhost-ctrl-gpu", "dev/nvgpu/igpu0")
_BOARD_FILES = ("proc/device-tree/model", "sys/firmware/devicetree/base/model")


@dataclass(frozen=True)
class Accelerator:
    """`kind` is "cpu", "cuda" or "mps"; `name` is empty where it cannot be read without loading the accelerator's libraries."""

    kind: str
    name: str


def cores(root: Path = Path("/")) -> float:
    """Cores that this process may use: those it may run on, cut by the CPU quota of its control groups."""
    allowed = float(len(affinity()))
    quota = cgroup.cpu_quota(root)
    return allowed if quota is None else min(allowed, quota)


def threads(configured_cores: int, root: Path = Path("/")) -> int:
    """Threads for training: the configured number (0: all), never more than this agent may use, at least one."""
    usable = max(1, math.ceil(cores(root)))
    return min(configured_cores, usable) if configured_cores else usable


def affinity() -> frozenset[int]:
    """Numbers of the CPUs that this process may run on."""
    # macOS has no affinity.
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def board(root: Path = Path("/")) -> str:
    """The device tree's model, for example "Raspberry Pi 5 Model B Rev 1.0"; empty without one."""
    for name in _BOARD_FILES:
        try:
            text = (root / name).read_bytes()[:256].decode("utf-8", "replace")
        except OSError:
            continue
        # The tree's texts end with NUL.
        return text.partition("\0")[0].strip()
    return ""


def processor(root: Path = Path("/")) -> str:
    """The processor's model as the kernel names it; empty on most ARM boards, which the device tree names instead."""
    try:
        lines = (root / "proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name"), "")


def accelerator(root: Path = Path("/"), system: str | None = None, machine: str | None = None) -> Accelerator:
    """What the device files tell. Whether torch can use it is seen by the training child."""
    if (root / "dev/nvidia0").exists():
        return Accelerator("cuda", _nvidia_model(root))
    if any((root / name).exists() for name in _JETSON_NODES):
        return Accelerator("cuda", board(root))
    # Windows' Linux subsystem passes the GPU through one device of its own.
    if (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists():
        return Accelerator("cuda", "")
    if (system or platform.system()) == "Darwin" and (machine or platform.machine()) == "arm64":
        return Accelerator("mps", "Apple GPU")
    return Accelerator("cpu", "")


class CpuMeter:
    """Load of the cores that this agent may use, between two calls. Owned by one caller."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before: tuple[float, float] | None = None

    def percent(self, now_s: float) -> float:
        """0 to 100 since the call before; 0 at the first. `now_s` is a monotonic clock.

        Under a CPU quota the group's own use counts: the machine's figures would be those of its neighbours.
        """
        quota = cgroup.cpu_quota(self._root)
        used_s = cgroup.cpu_seconds(self._root) if quota is not None else None
        if quota is not None and used_s is not None:
            after = (used_s, now_s * quota)
        else:
            after = _busy_and_all_s(affinity())
        before, self._before = self._before, after
        if before is None or after[1] <= before[1]:
            return 0.0
        return min(100.0, max(0.0, 100.0 * (after[0] - before[0]) / (after[1] - before[1])))


def _busy_and_all_s(cpus: frozenset[int]) -> tuple[float, float]:
    busy_s = all_s = 0.0
    for number, times in enumerate(psutil.cpu_times(percpu=True)):
        if number in cpus:
            # guest time is part of user time already.
            total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
            all_s += total_s
            busy_s += total_s - times.idle - getattr(times, "iowait", 0.0)
    return busy_s, all_s


def _nvidia_model(root: Path) -> str:
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                return value.strip()
    return ""

"""How much memory this agent and its children may take, and how much of it is free."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fleetune.agent.probe import cgroup


@dataclass(frozen=True)
class Memory:
    """What is there for this process, not for the machine: the tightest of the machine, control groups and process limits."""

    total_bytes: int
    available_bytes: int


def memory(root: Path = Path("/")) -> Memory:
    """The figures now."""
    machine = psutil.virtual_memory()
    return tightest(machine.total, machine.available, cgroup.memory_groups(root), address_space_bytes())


def tightest(total_bytes: int, available_bytes: int, groups: Sequence[cgroup.MemoryGroup], address_space: int | None) -> Memory:
    """The smallest of the machine's figures, each group's and the limit on one process's address space."""
    totals = [total_bytes, *(group.limit_bytes for group in groups)]
    free = [available_bytes, *(max(0, group.limit_bytes - group.used_bytes) for group in groups)]
    if address_space is not None:
        # A child inherits the limit anew, so all of it is free for the child.
        totals.append(address_space)
        free.append(address_space)
    return Memory(min(totals), min(min(free), min(totals)))


@dataclass(frozen=True)
class Room:
    """What training may take, and the limit that says so: machine, control group, address space, or configured."""

    free_bytes: int
    bound_by: str


def training_room(configured_bytes: int | None = None, root: Path = Path("/")) -> Room:
    """Memory that is free for a training child now. A GPU's own memory is seen by the child alone."""
    return tightest_room(psutil.virtual_memory().available, cgroup.memory_groups(root), address_space_bytes(), configured_bytes)


def tightest_room(
    available_bytes: int, groups: Sequence[cgroup.MemoryGroup], address_space: int | None, configured_bytes: int | None
) -> Room:
    """The smallest bound with its name; among equals the machine's comes first."""
    bounds = [(available_bytes, "machine")]
    bounds += [(max(0, group.limit_bytes - group.used_bytes), "control group") for group in groups]
    if address_space is not None:
        bounds.append((address_space, "address space"))
    if configured_bytes is not None:
        bounds.append((configured_bytes, "configured"))
    free_bytes, bound_by = min(bounds, key=lambda bound: bound[0])
    return Room(free_bytes, bound_by)


def address_space_bytes() -> int | None:
    """RLIMIT_AS of this process; None without one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY or soft < 0 else soft


def resident_bytes(pid: int | None) -> int:
    """Resident memory of a process; 0 where there is none."""
    if pid is None:
        return 0
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0

"""What the control groups around this process allow it: CPU quota and memory, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED_BYTES = 1 << 60
"""Version 1 writes "no limit" as the largest page-aligned 63-bit number."""


@dataclass(frozen=True)
class MemoryGroup:
    """A group with a limit. `used_bytes` leaves out file cache that the kernel gives back when it is needed."""

    limit_bytes: int
    used_bytes: int


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of CPU time that the tightest group grants, for example 0.5; None without a quota."""
    quotas = [quota for version, folder in _folders("cpu", root) if (quota := _quota(version, folder)) is not None]
    return min(quotas, default=None)


def cpu_seconds(root: Path = Path("/")) -> float | None:
    """CPU seconds that this process's own group has used; None where no group counts them."""
    for version, folder in _folders("cpu", root):
        if version == 2:
            used = _table(folder / "cpu.stat").get("usage_usec")
            return None if used is None else used / 1e6
    for version, folder in _folders("cpuacct", root):
        if version == 1:
            used = _number(folder / "cpuacct.usage")
            return None if used is None else used / 1e9
    return None


def memory_groups(root: Path = Path("/")) -> list[MemoryGroup]:
    """Every group around this process that has a memory limit, the innermost first."""
    groups: list[MemoryGroup] = []
    for version, folder in _folders("memory", root):
        limit = _number(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        if limit is None or limit >= UNLIMITED_BYTES or used is None:
            continue
        cache = _table(folder / "memory.stat").get("inactive_file" if version == 2 else "total_inactive_file", 0)
        groups.append(MemoryGroup(limit, max(0, used - cache)))
    return groups


def _folders(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of each group that this process is in for `controller`, from the innermost up to the mount.

    Inside a container without a namespace of its own, the path is the host's and does not exist; the mount itself is then the group.
    """
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, inner = rest.partition(":")
        if number == "0" and not names:
            tops = [(2, top) for top in (mount, mount / "unified") if (top / "cgroup.controllers").exists()]
        elif controller in names.split(","):
            tops = [(1, top) for top in (mount / names, mount / controller) if top.is_dir()]
        else:
            continue
        for version, top in tops[:1]:
            parts = [part for part in inner.split("/") if part not in ("", ".", "..")]
            for depth in range(len(parts), -1, -1):
                folder = top.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield version, folder


def _quota(version: int, folder: Path) -> float | None:
    if version == 2:
        words = " ".join(_lines(folder / "cpu.max")).split()
        if len(words) != 2 or not all(word.isdigit() for word in words):
            return None
        quota_us, period_us = (int(word) for word in words)
    else:
        quota_us, period_us = (_number(folder / f"cpu.cfs_{name}_us") or 0 for name in ("quota", "period"))
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def _lines(path: Path) -> list[str]:
    """The file's lines; none where it cannot be read: a probe never stops an agent."""
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    text = " ".join(_lines(path)).strip()
    return int(text) if text.isascii() and text.lstrip("-").isdigit() else None


def _table(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _lines(path))
    return {words[0]: int(words[1]) for words in pairs if len(words) == 2 and words[1].isdigit()}

"""The kernel's count of processes that it has ended for lack of memory, as near to this process as it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

KEY = "oom_kill"


def count(root: Path = Path("/")) -> int:
    """Of this process's own control group, versions 1 and 2, whoever was short of memory; it only grows.

    Where no group counts, that of the machine, in which also others' deaths are: of two that look alike the nearer is right.
    """
    for path in _counters(root):
        found = _value(path)
        if found is not None:
            return found
    return 0


def _counters(root: Path) -> Iterator[Path]:
    """From the nearest to the farthest. In a container the path may be the host's, and the mount itself is then the group."""
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        inside = group.strip("/")
        if "memory" in controllers.split(","):
            yield mount / "memory" / inside / "memory.oom_control"
            yield mount / "memory" / "memory.oom_control"
        elif number == "0":
            yield mount / inside / "memory.events"
            yield mount / "memory.events"
    yield root / "proc/vmstat"


def _value(path: Path) -> int | None:
    for line in _lines(path):
        name, _, value = line.partition(" ")
        if name == KEY and value.strip().isdigit():
            return int(value)
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):  # no such group here, or not for this process
        return []

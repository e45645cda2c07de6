"""What every way to run a testbed can do: containers, network namespaces, plain processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fleetune.coordinator.testbed.spec import TestbedSpec

COORDINATOR = "coordinator"
"""The coordinator's name among the members; no device may have it."""

FaultKind = Literal["kill", "pause", "cut", "throttle", "fill_disk", "out_of_memory"]
Life = Literal["running", "paused", "ended", "missing"]


@dataclass(frozen=True)
class Sample:
    """Counters of one member since its start, read at one instant. None where this backend or kernel cannot tell."""

    cpu_s: float | None
    memory_bytes: int | None
    """Anonymous memory and page cache of the whole group, now."""
    memory_peak_bytes: int | None
    sent_bytes: int | None
    """On the member's own interface, headers included."""
    received_bytes: int | None
    out_of_memory_kills: int | None
    energy_j: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a testbed lives, and the same for every verb: a backend made of it again in another process finds everything."""

    spec: TestbedSpec
    folder: Path
    """Absolute, there, and its owner's alone. `backend/` in it belongs to the backend."""
    prefix: str
    """Of all names that are the whole machine's: control groups, namespaces, containers."""
    base: Path | None = None
    """Folder of the base model; None where the job needs none."""
    options: Mapping[str, str] | None = None
    """What one backend alone understands."""

    @property
    def own(self) -> Path:
        """The backend's folder."""
        return self.folder / "backend"


class Backend(Protocol):
    """Blocking calls, each bounded in time; MachineError where the machine cannot do it. Members are the devices and `COORDINATOR`."""

    name: str

    @property
    def faults(self) -> frozenset[FaultKind]:
        """The kinds of fault that it can make."""
        ...

    def up(self) -> None:
        """Start everything and wait until all devices that can are online. Undoes itself where it fails."""
        ...

    def stop(self) -> None:
        """End all members in order, agents first; their state stays. Safe to call twice."""
        ...

    def check(self) -> list[dict[str, Any]]:
        """The violations that `fleetune check --json` finds. The coordinator has stopped; MachineError where nothing is left."""
        ...

    def machine(self) -> dict[str, Any]:
        """What plays the boards: processors, memory, kernel, and what this backend cannot emulate ("missing", a list of sentences)."""
        ...

    def down(self) -> Sequence[str]:
        """Remove everything, also what a half start has left; what was removed, in words. Safe to call twice."""
        ...

    def lives(self) -> Mapping[str, Life]: ...

    def samples(self) -> Mapping[str, Sample]: ...

    def verb(self, *arguments: str) -> Sequence[str]:
        """The command that runs `fleetune ARGUMENTS...` as operator of this testbed."""
        ...

    def log(self, member: str) -> str:
        """The last part of what it wrote."""
        ...

    def kill(self, member: str) -> None:
        """SIGKILL for all its processes; it stays down until `restart`."""
        ...

    def restart(self, member: str) -> None: ...

    def pause(self, member: str) -> None:
        """Freeze all its processes: the kernel still answers for them."""
        ...

    def resume(self, member: str) -> None: ...

    def cut(self, member: str) -> None: ...

    def mend(self, member: str) -> None: ...

    def throttle(self, member: str, up_mbit: float | None, down_mbit: float | None) -> None:
        """Another rate for its link; None gives the configured one back."""
        ...

    def fill_disk(self, member: str) -> None:
        """Leave no byte free where its state lies."""
        ...

    def free_disk(self, member: str) -> None: ...

    def exhaust_memory(self, member: str) -> None:
        """Take memory inside its limits until the kernel kills something there; returns when that has happened."""
        ...

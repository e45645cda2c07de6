"""The testbed as plain processes on loopback: no quotas, no shaped links, no root. For a look, and where nothing else is to be had."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed import crew, procs
from fleetune.coordinator.testbed.backend import COORDINATOR, FaultKind, Life, Place, Sample
from fleetune.coordinator.testbed.statefile import write_json

MISSING = (
    "processor and memory quotas: every device takes what this machine has",
    "link rates and latencies: all devices are on loopback",
    "sizes of disks",
    "bytes on the link of each device",
)


class ProcessBackend(crew.Crewed):
    """Made of a place alone; touches nothing until `up`."""

    name = "process"

    def __init__(self, place: Place) -> None:
        self._place = place
        self._crew = crew.Crew(place, self)
        self._ended_cpu_s: dict[str, float] = {}
        self._seen_cpu_s: dict[str, float] = {}

    @property
    def faults(self) -> frozenset[FaultKind]:
        return frozenset(("kill", "pause"))

    def up(self) -> None:
        if not procs.PROC.joinpath("self", "environ").exists():
            raise MachineError("the process backend reads /proc, which is not there.", "Take the compose backend.")
        sys.stderr.write("plain processes: no quotas, no shaped links; the devices are alike\n")
        try:
            self._place.own.mkdir(exist_ok=True)
            ports = _free_ports(2)
            write_json(self._ports_file, {"listen": ports[0], "join": ports[1]})
            self._crew.enrol(lambda text: print(text, file=sys.stderr))
        except BaseException:
            self.down()
            raise

    def machine(self) -> dict[str, Any]:
        return {**crew.environment_facts(), "missing": list(MISSING)}

    def down(self) -> Sequence[str]:
        ended = self._crew.stop()
        left = [member for member in (COORDINATOR, *self._place.spec.names) if self.pids(member)]
        for member in left:
            self._crew.kill(member)
        members = [*ended, *(name for name in left if name not in ended)]
        removed = [f"{len(members)} running members ({', '.join(members)})"] if members else []
        if crew.remove_tree(self._place.own):
            removed.append(f"{self._place.own}")
        return removed

    def lives(self) -> Mapping[str, Life]:
        return {member: self._crew.life(member) for member in (COORDINATOR, *self._place.spec.names)}

    def samples(self) -> Mapping[str, Sample]:
        found: dict[str, Sample] = {}
        for member in (COORDINATOR, *self._place.spec.names):
            facts = [one for pid in procs.marked(crew.MARK, self._crew.mark(member)) if (one := procs.facts(pid)) is not None]
            cpu_s = sum(one.cpu_s for one in facts)
            # Who was killed takes its seconds along; the counter must not fall.
            if cpu_s < (seen := self._seen_cpu_s.get(member, 0.0)):
                self._ended_cpu_s[member] = self._ended_cpu_s.get(member, 0.0) + seen
            self._seen_cpu_s[member] = cpu_s
            total_s = cpu_s + self._ended_cpu_s.get(member, 0.0)
            found[member] = Sample(total_s, sum(one.memory_bytes for one in facts), None, None, None, None)
        return found

    def cut(self, member: str) -> None:
        raise _cannot("cut a link")

    def mend(self, member: str) -> None:
        raise _cannot("mend a link")

    def throttle(self, member: str, up_mbit: float | None, down_mbit: float | None) -> None:
        raise _cannot("throttle a link")

    def fill_disk(self, member: str) -> None:
        raise _cannot("fill a disk")

    def free_disk(self, member: str) -> None:
        raise _cannot("free a disk")

    def exhaust_memory(self, member: str) -> None:
        raise _cannot("bound memory")

    # What `crew.Ground` asks for.

    @property
    def listen(self) -> str:
        return f"127.0.0.1:{self._ports()['listen']}"

    @property
    def join_listen(self) -> str:
        return f"127.0.0.1:{self._ports()['join']}"

    def inside(self, member: str, command: Sequence[str]) -> list[str]:
        return list(command)

    def beside(self, command: Sequence[str]) -> list[str]:
        return list(command)

    def pids(self, member: str) -> list[int]:
        found = self._crew.supervisor(member)
        supervisor = found.pid if found is not None and found.alive else None
        return [pid for pid in procs.marked(crew.MARK, self._crew.mark(member)) if pid != supervisor]

    def state_dir(self, member: str) -> Path:
        return self._place.own / "state" / member

    @property
    def _ports_file(self) -> Path:
        return self._place.own / "ports.json"

    def _ports(self) -> dict[str, int]:
        return {str(name): int(port) for name, port in json.loads(self._ports_file.read_text(encoding="utf-8")).items()}


def _free_ports(count: int) -> list[int]:
    """Free now; another program may take one before the coordinator does, and `up` then says so."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _cannot(what: str) -> MachineError:
    return MachineError(f"plain processes cannot {what}.", "Take the netns or the compose backend.")

"""The testbed in network namespaces: shaped links, quotas of processor and memory, disks of their own. Root and Linux only."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed import crew
from fleetune.coordinator.testbed.backend import COORDINATOR, FaultKind, Life, Place, Sample
from fleetune.coordinator.testbed.disks import Disk
from fleetune.coordinator.testbed.hosts import Host, Hosts, Link
from fleetune.coordinator.testbed.limits import Limits
from fleetune.coordinator.testbed.spec import MBIT, MIB, DeviceSpec

PORT = 7433
EXHAUST_S = 60.0

SPARE_BYTES = 16 * MIB
"""What is left to take in an out-of-memory; on this machine the rest may be needed for something better."""

_HOG = """
import mmap, time
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
except OSError:
    pass
held = []
while True:
    held.append(mmap.mmap(-1, 1 << 20))
    held[-1].write(bytes(1 << 20))
    time.sleep(0.002)
"""
"""Takes memory and is not what the kernel kills for it: as another program on the board would that its owner holds dear."""


class NetnsBackend(crew.Crewed):
    """Made of a place alone; touches nothing until `up`."""

    name = "netns"

    def __init__(self, place: Place) -> None:
        spec = place.spec
        coordinator = Host(COORDINATOR, Limits(spec.coordinator_cpus, spec.coordinator_memory_mib * MIB))
        self._place = place
        self._hosts = Hosts([coordinator, *(_host(device) for device in spec.devices)], place.prefix)
        self._disks = {device.name: Disk(place.own / "disks", device.name, device.disk_mib) for device in spec.devices}
        self._crew = crew.Crew(place, self)

    @property
    def faults(self) -> frozenset[FaultKind]:
        return frozenset(("kill", "pause", "cut", "throttle", "fill_disk", "out_of_memory"))

    def up(self) -> None:
        try:
            self._place.own.mkdir(exist_ok=True)
            self._hosts.__enter__()
            for disk in self._disks.values():
                disk.make()
            self._crew.enrol(_say)
        except BaseException:
            self.down()
            raise

    def machine(self) -> dict[str, Any]:
        return crew.environment_facts()

    def down(self) -> Sequence[str]:
        ended = self._crew.stop()
        gone = self._hosts.close()
        disks = sum([disk.remove() for disk in self._disks.values()])
        removed = [f"{len(ended)} running members ({', '.join(ended)})"] if ended else []
        removed += [f"{gone} network namespaces with their links and control groups"] if gone else []
        removed += [f"{disks} disks"] if disks else []
        if crew.remove_tree(self._place.own):
            removed.append(f"{self._place.own}")
        return removed

    def lives(self) -> Mapping[str, Life]:
        return {member: self._crew.life(member) for member in self._members}

    def samples(self) -> Mapping[str, Sample]:
        traffic = self._hosts.traffic()
        found: dict[str, Sample] = {}
        for member in self._members:
            group = self._hosts.group(member)
            if not group.made:
                continue
            memory, peak = group.memory_bytes()
            sent, received = traffic.get(member, (None, None))
            found[member] = Sample(group.cpu_seconds(), memory, peak, sent, received, group.memory_events())
        return found

    def cut(self, member: str) -> None:
        self._hosts.cut(member)

    def mend(self, member: str) -> None:
        self._hosts.mend(member)

    def throttle(self, member: str, up_mbit: float | None, down_mbit: float | None) -> None:
        own = _link(self._place.spec.device(member))
        up = own.up_bits_per_s if up_mbit is None else up_mbit * MBIT
        down = own.down_bits_per_s if down_mbit is None else down_mbit * MBIT
        self._hosts.shape(member, Link(up, down))

    def fill_disk(self, member: str) -> None:
        self._disks[member].fill()

    def free_disk(self, member: str) -> None:
        self._disks[member].free()

    def exhaust_memory(self, member: str) -> None:
        group = self._hosts.group(member)
        before = group.memory_events()
        group.squeeze(SPARE_BYTES)
        command = self._hosts.command(member, [sys.executable, "-I", "-S", "-c", _HOG])
        hog = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + EXHAUST_S
        try:
            while group.memory_events() == before and hog.poll() is None:
                if time.monotonic() > deadline_s:
                    raise MachineError(f"{member} did not run out of memory within {EXHAUST_S:g} s.", "Give it less memory_mib.")
                time.sleep(0.005)
        finally:
            hog.kill()
            hog.wait()
            group.relax()

    # What `crew.Ground` asks for.

    @property
    def listen(self) -> str:
        return f"{self._hosts.address(COORDINATOR)}:{PORT}"

    @property
    def join_listen(self) -> str:
        return f"{self._hosts.address(COORDINATOR)}:{PORT + 1}"

    def inside(self, member: str, command: Sequence[str]) -> list[str]:
        return self._hosts.command(member, command)

    def beside(self, command: Sequence[str]) -> list[str]:
        return self._hosts.entering(COORDINATOR, command)

    def pids(self, member: str) -> list[int]:
        return self._hosts.group(member).processes()

    def state_dir(self, member: str) -> Path:
        return self._place.own / COORDINATOR if member == COORDINATOR else self._disks[member].path / "state"

    @property
    def _members(self) -> tuple[str, ...]:
        return (COORDINATOR, *self._place.spec.names)


def _host(device: DeviceSpec) -> Host:
    return Host(device.name, Limits(device.cpus, device.memory_mib * MIB), _link(device))


def _link(device: DeviceSpec) -> Link:
    return Link(device.up_mbit * MBIT, device.down_mbit * MBIT, device.latency_ms)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")

"""Hosts in network namespaces on one switch, each with a shaped link and quotas of its own: boards, as far as this machine can play them.

    host namespace: eth0 -- veth -- switch namespace: port, on a bridge

The rate up is held by a token bucket on eth0, the rate down by one on the port. Nothing of it is visible outside these namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed.limits import Group, Limits

NETWORK = "198.18"
"""Set aside for benchmarks of networks (RFC 2544), hence nobody's."""

HOSTS_MAX = 250
TOOLS = ("ip", "tc", "nsenter")
COMMAND_S = 20.0
CABLE_CPUS = 1.0
QUEUE_MS = 100
"""What waits longer in front of a link is dropped, as in a home router of some quality."""


_DELAY = Path(__file__).with_name("delay.py")


@dataclass(frozen=True)
class Link:
    """Rates in bit/s; None is as fast as it goes. The latency is added in each direction, and stays as it was when the host was made."""

    up_bits_per_s: float | None = None
    down_bits_per_s: float | None = None
    latency_ms: float = 0.0


@dataclass(frozen=True)
class Host:
    name: str
    limits: Limits
    link: Link = Link()


class Hosts:
    """Made when entered, and gone with all their processes when left. Root only."""

    def __init__(self, hosts: Sequence[Host], prefix: str | None = None, cable: Path = _DELAY) -> None:
        """`cable` is the program that carries the frames of a link with a latency."""
        if len(hosts) > HOSTS_MAX:
            raise MachineError(f"{len(hosts)} hosts do not fit one network; {HOSTS_MAX} do.", "Take fewer.")
        # Not to meet another testbed's; names of namespaces are the whole machine's.
        self._prefix = prefix if prefix is not None else f"ft{os.getpid()}"
        self._cable_program = cable
        self._hosts = {host.name: host for host in hosts}
        self._number = {host.name: index for index, host in enumerate(hosts, start=1)}
        self._cables: list[subprocess.Popen[bytes]] = []
        self._groups = {host.name: Group(f"{self._prefix}-{host.name}", host.limits) for host in hosts}

    def address(self, name: str) -> str:
        return f"{NETWORK}.0.{self._number[name]}"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """`command`, run on a host: within its namespace and its quotas."""
        # Not `ip netns exec`, which hides the control groups, so that an agent could not see its own quota.
        return self._groups[name].joining(self.entering(name, command))

    def entering(self, name: str, command: Sequence[str]) -> list[str]:
        """`command`, run in a host's network and outside of its quotas."""
        return ["nsenter", f"--net=/run/netns/{self._namespace(name)}", *command]

    def group(self, name: str) -> Group:
        return self._groups[name]

    def cut(self, name: str) -> None:
        """Pull the cable."""
        _run("ip", "-n", self._switch, "link", "set", self._port(name), "down")

    def mend(self, name: str) -> None:
        _run("ip", "-n", self._switch, "link", "set", self._port(name), "up")

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes that each host has sent and received on its link since it was plugged in, headers included."""
        done = _run("ip", "-n", self._switch, "-s", "-j", "link", "show")
        ports: dict[str, Any] = {link["ifname"]: link["stats64"] for link in json.loads(done)}  # Any: iproute2's JSON
        return {
            name: (int(ports[port]["rx"]["bytes"]), int(ports[port]["tx"]["bytes"]))
            for name in self._hosts
            if (port := self._port(name)) in ports
        }

    def shape(self, name: str, link: Link) -> None:
        """Give a host another link; what is under way goes on at the new rate."""
        self._hosts[name] = Host(name, self._hosts[name].limits, link)
        self._shape(self._namespace(name), "eth0", link.up_bits_per_s)
        self._shape(self._switch, self._port(name), link.down_bits_per_s)

    def __enter__(self) -> Hosts:
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise MachineError(f"{' and '.join(missing)} not found.", "Install iproute2 and util-linux.")
        if os.geteuid() != 0:
            raise MachineError("Network namespaces need root.", "Run it with sudo, or take the compose backend.")
        try:
            _run("ip", "netns", "add", self._switch)
            _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "br0", "up")
            for name in self._hosts:
                self._plug(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> int:
        """Everything that was made; how many namespaces there were. Safe to call twice, and after half a start."""
        for group in (*self._groups.values(), *(self._cable(name) for name in self._hosts)):
            group.remove()
        for cable in self._cables:
            cable.wait()
        self._cables.clear()
        there = [name for name in (*map(self._namespace, self._hosts), self._switch) if os.path.exists(f"/run/netns/{name}")]
        for namespace in there:  # its interfaces go with it
            _run("ip", "netns", "del", namespace)
        return len(there)

    def _plug(self, name: str) -> None:
        namespace, port = self._namespace(name), self._port(name)
        _run("ip", "netns", "add", namespace)
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        latency_ms = self._hosts[name].link.latency_ms
        if latency_ms > 0:
            self._delay(name, latency_ms)
        else:
            _run("ip", "link", "add", "name", "eth0", "netns", namespace, "type", "veth", "peer", "name", port, "netns", self._switch)
        _run("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", namespace, "addr", "add", f"{self.address(name)}/16", "dev", "eth0")
        _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        self._groups[name].create()
        self.shape(name, self._hosts[name].link)

    def _delay(self, name: str, latency_ms: float) -> None:
        """The link as two devices with a process between them, which lives until `close`."""
        command = [sys.executable, "-I", "-S", str(self._cable_program), self._namespace(name), "eth0", self._switch, self._port(name)]
        # In a group without quotas: it is the cable, not the host.
        group = self._cable(name)
        group.create()
        # It says when it is ready, and nothing after that; a session of its own, for it outlives the process that made it.
        started = subprocess.Popen(
            group.joining([*command, str(latency_ms / 1000)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._cables.append(started)
        assert started.stdout is not None and started.stderr is not None
        with started.stdout, started.stderr:
            if started.stdout.readline() != b"ready\n":
                said = started.stderr.read().decode("utf-8", "replace").strip().splitlines()[-1:]
                raise MachineError(
                    f"no link with a latency for {name}: {' '.join(said)}.", "It takes /dev/net/tun; or leave latency_ms out."
                )

    def _cable(self, name: str) -> Group:
        return Group(f"{self._prefix}-{name}.cable", Limits(CABLE_CPUS))

    def _shape(self, namespace: str, device: str, bits_per_s: float | None) -> None:
        if bits_per_s is None:
            subprocess.run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
            return
        # A bucket must hold what arrives between two ticks of the kernel's clock at this rate, and one unsplit burst of the sender.
        burst_bytes = max(65_536, int(bits_per_s / 8 / 100))
        rate = f"{max(8000, int(bits_per_s))}bit"
        shaped = ["tbf", "rate", rate, "burst", str(burst_bytes), "latency", f"{QUEUE_MS}ms"]
        _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shaped)

    @property
    def _switch(self) -> str:
        # No host's: their names have no underscore.
        return f"{self._prefix}_sw"

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _port(self, name: str) -> str:
        # Names of interfaces have at most 15 characters.
        return f"port{self._number[name]}"


def _run(*command: str) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_S).stdout
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip()
        raise MachineError(f"`{' '.join(command)}` failed: {said}.", "It takes a kernel with namespaces, veth, bridge and tbf.") from error

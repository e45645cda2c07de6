"""The compose file of a testbed: a coordinator and its devices as containers with limits, on a network of their own.

Written as JSON, which is YAML, for `docker compose` and for docker-compose 1.29 alike. Nothing of it is looked up: a pure function.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fleetune.coordinator.testbed.backend import COORDINATOR, Place
from fleetune.coordinator.testbed.spec import DeviceSpec

LABEL = "io.fleetune.testbed"
MEMBER_LABEL = "io.fleetune.member"
PORT = 7433
STATE = "/var/lib/fleetune"
"""In every container: the one folder that outlives it."""

COORDINATOR_STATE = f"{STATE}/coordinator"
JOIN_LINE = "join-line"
"""The token's file, beside the compose file; in the containers it is a secret."""

NETWORK = "link"
# What the entry needs before it leaves for an account without any: tc, setpriv, and the init process that hands signals on to that account.
CAPABILITIES = ("KILL", "NET_ADMIN", "SETGID", "SETPCAP", "SETUID")
STOP_S = 30
PIDS_MAX = 1024


@dataclass(frozen=True)
class Plan:
    """What was found out about this machine. `disks`: member -> block device that holds its state; a plain volume where there is none."""

    image: str
    subnet: str
    cores: float
    """What the engine may use: it refuses a quota above that."""
    disks: Mapping[str, str]


def address(plan: Plan) -> str:
    """Where the coordinator listens, by number: a name is not resolved while its container is down."""
    return f"{_host(plan, 2)}:{PORT}"


def volume(place: Place, member: str) -> str:
    return f"{place.prefix}_{member}"


def document(place: Place, plan: Plan) -> dict[str, Any]:
    """Paths in it count from the folder that it is written to, which is `place.own`."""
    members = [COORDINATOR, *(device.name for device in place.spec.devices)]
    services = {COORDINATOR: _coordinator(place, plan)}
    services.update((device.name, _device(place, plan, device, 10 + index)) for index, device in enumerate(place.spec.devices))
    return {
        "services": services,
        # No way out of it: what a device does stays on this machine.
        "networks": {NETWORK: {"internal": True, "ipam": {"config": [{"subnet": plan.subnet}]}, "labels": {LABEL: place.prefix}}},
        "volumes": {member: _volume(place, plan, member) for member in members},
        "secrets": {"fleetune_join": {"file": f"./{JOIN_LINE}"}},
    }


def _coordinator(place: Place, plan: Plan) -> dict[str, Any]:
    spec = place.spec
    # The job names these by their paths on the host.
    shared = [place.folder / "data" / "test.jsonl", *([place.base.parent] if place.base is not None else [])]
    return {
        **_common(place, plan, COORDINATOR, 2, spec.coordinator_cpus, spec.coordinator_memory_mib),
        "command": ["coordinator", "--listen", f"0.0.0.0:{PORT}"],
        "environment": {"FLEETUNE_ADDRESS": address(plan), "HF_HUB_OFFLINE": "1"},
        "volumes": [f"{COORDINATOR}:{STATE}", *(f"{path}:{path}:ro" for path in shared)],
        "healthcheck": _health("60s", "fleetune", "health"),
    }


def _device(place: Place, plan: Plan, device: DeviceSpec, host: int) -> dict[str, Any]:
    name = device.name
    return {
        **_common(place, plan, name, host, device.cpus, device.memory_mib),
        "command": ["agent"],
        "environment": {
            "FLEETUNE_AGENT_CONFIG": f"/testbed/config/{name}.toml",
            "FLEETUNE_AGENT_NAME": name,
            "UP_MBIT": f"{device.up_mbit:g}",
            "DOWN_MBIT": f"{device.down_mbit:g}",
            "LATENCY_MS": f"{device.latency_ms:g}",
            "HF_HUB_OFFLINE": "1",
        },
        "volumes": [
            f"{name}:{STATE}",
            f"../config/{name}.toml:/testbed/config/{name}.toml:ro",
            f"../data/{name}:/testbed/data/{name}:ro",
        ],
        "secrets": ["fleetune_join"],
        "healthcheck": _health("30s", "python3", "-IS", "/usr/local/lib/fleetune/watched.py", "--check"),
    }


def _health(interval: str, *command: str) -> dict[str, Any]:
    # As the daemon's account: the container's own, root, has no right to look into another's files.
    account = ["setpriv", "--reuid", "fleetune", "--regid", "fleetune", "--clear-groups"]
    return {"test": ["CMD", *account, *command], "interval": interval, "timeout": "30s", "start_period": "120s"}


def _common(place: Place, plan: Plan, member: str, host: int, cpus: float, memory_mib: int) -> dict[str, Any]:
    return {
        "image": plan.image,
        "hostname": member,
        "init": True,  # ends what a daemon leaves behind
        "restart": "on-failure",  # as the unit files say; what was killed by hand stays down
        "stop_grace_period": f"{STOP_S}s",
        "cpus": min(cpus, plan.cores),
        "mem_limit": f"{memory_mib}m",
        "memswap_limit": f"{memory_mib}m",  # the same: no swap
        "pids_limit": PIDS_MAX,
        "cap_drop": ["ALL"],
        "cap_add": list(CAPABILITIES),
        "security_opt": ["no-new-privileges:true"],
        "networks": {NETWORK: {"ipv4_address": _host(plan, host)}},
        "labels": {LABEL: place.prefix, MEMBER_LABEL: member},
        "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "2"}},
    }


def _volume(place: Place, plan: Plan, member: str) -> dict[str, Any]:
    described: dict[str, Any] = {"name": volume(place, member), "labels": {LABEL: place.prefix}}
    if member in plan.disks:
        described |= {"driver": "local", "driver_opts": {"type": "ext4", "device": plan.disks[member]}}
    return described


def _host(plan: Plan, number: int) -> str:
    return str(ipaddress.IPv4Network(plan.subnet)[number])

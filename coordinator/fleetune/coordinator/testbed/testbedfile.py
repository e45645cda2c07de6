"""A testbed.toml becomes a `TestbedSpec`, or every complaint about it at once."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import cast

from fleetune.coordinator.testbed import tables
from fleetune.coordinator.testbed.backend import COORDINATOR
from fleetune.coordinator.testbed.spec import KINDS, DeviceSpec, Split, TestbedSpec

SUBJECT = "the testbed file"
DEVICES_MAX = 200
NAME_CHARACTERS_MAX = 20
NAME = re.compile(r"[a-z][a-z0-9-]{0,19}")
NAME_WORDS = "up to 20 small letters, digits and dashes, a letter first"

_TOP = ("name", "seed", "coordinator", "data", "device")
_COORDINATOR = ("cpus", "memory_mib")
_DATA = ("split", "alpha")
_DEVICE = ("kind", "count", "name", "cpus", "memory_mib", "up_mbit", "down_mbit", "latency_ms", "disk_mib", "share")

CPUS = (0.05, 256.0)
MEMORY_MIB = (64, 1 << 22)
MBIT = (0.1, 100_000.0)
LATENCY_MS = (0.0, 2000.0)
DISK_MIB = (128, 1 << 20)
"""An agent leaves 64 MiB of its disk alone."""

SHARE = (0.001, 1000.0)

DEFAULT = """\
name = "kitchen"
seed = 7

[coordinator]
cpus = 2.0
memory_mib = 2048

[data]
split = "dirichlet"
alpha = 0.5

[[device]]
kind = "pi4"
count = 2

[[device]]
kind = "pi5"

[[device]]
kind = "orin-nano"

[[device]]
kind = "orin-agx"

[[device]]
kind = "laptop"
"""
"""What `up` takes without a file: six unequal devices."""


def load(file: Path) -> TestbedSpec:
    """ComplaintsError with all complaints; ConfigError where the file cannot be read."""
    return parse(tables.read_text(SUBJECT, file))


def parse(text: str) -> TestbedSpec:
    """The testbed that a TOML text describes. ComplaintsError with all complaints."""
    complaints = tables.Complaints()
    top = tables.Table(complaints, "", tables.document(SUBJECT, text), _TOP)
    name = top.text("name", "testbed", NAME_WORDS)
    if not NAME.fullmatch(name):
        top.wrong("name", NAME_WORDS, "Choose another name.")
    coordinator = top.table("coordinator", _COORDINATOR)
    data = top.table("data", _DATA)
    split = data.word("split", "iid", ("iid", "dirichlet"))
    devices: list[DeviceSpec] = []
    for path, item in top.tables("device", DEVICES_MAX):
        devices += _devices(tables.Table(complaints, path, item, _DEVICE))
    _check_names(devices, complaints)
    spec = TestbedSpec(
        name=name,
        seed=top.whole("seed", 0, 0, 2**32 - 1),
        coordinator_cpus=coordinator.number("cpus", 2.0, *CPUS),
        coordinator_memory_mib=coordinator.whole("memory_mib", 2048, *MEMORY_MIB),
        split=cast("Split", split),
        alpha=data.number("alpha", 0.5, 0.001, 1e6),
        devices=tuple(devices),
    )
    if not devices and not complaints.found:
        complaints.add("device", None, ", ".join(KINDS), "There is none; write one under a line [[device]].")
    complaints.end(SUBJECT)
    return spec


def _devices(table: tables.Table) -> list[DeviceSpec]:
    word = table.word("kind", "", tuple(KINDS))
    # Of a kind that there is not, only the rest is looked at.
    kind = KINDS.get(word, KINDS["pi4"])
    count = table.whole("count", 1, 1, DEVICES_MAX)
    name = table.text("name", word or "board", NAME_WORDS)
    if not NAME.fullmatch(name):
        table.wrong("name", NAME_WORDS, "Choose another name.")
    elif name == COORDINATOR or name.startswith(f"{COORDINATOR}-"):
        table.wrong("name", f"anything but {COORDINATOR}", "That is the coordinator's own name.")
    # One device of a kind is called as the kind; several are numbered.
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    if len(names[-1]) > NAME_CHARACTERS_MAX >= len(name):
        table.wrong("name", NAME_WORDS, f"{names[-1]} is too long; choose a shorter one.")
    first = DeviceSpec(
        name=names[0],
        kind=word,
        cpus=table.number("cpus", kind.cpus, *CPUS),
        memory_mib=table.whole("memory_mib", kind.memory_mib, *MEMORY_MIB),
        up_mbit=table.number("up_mbit", kind.up_mbit, *MBIT),
        down_mbit=table.number("down_mbit", kind.down_mbit, *MBIT),
        latency_ms=table.number("latency_ms", kind.latency_ms, *LATENCY_MS),
        disk_mib=table.whole("disk_mib", kind.disk_mib, *DISK_MIB),
        share=table.number("share", 1.0, *SHARE),
    )
    return [replace(first, name=one) for one in names] if word else []


def _check_names(devices: list[DeviceSpec], complaints: tables.Complaints) -> None:
    seen: set[str] = set()
    for device in devices:
        if device.name in seen:
            complaints.add("device.name", device.name, "names that differ", "Two devices have it; give one of them a name.")
        seen.add(device.name)
    if len(devices) > DEVICES_MAX:
        complaints.add("device", f"{len(devices)} devices", f"{DEVICES_MAX} at the most", "Take fewer.")

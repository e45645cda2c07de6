"""A chaos.toml becomes a list of faults, or every complaint about it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fleetune.coordinator.testbed import tables
from fleetune.coordinator.testbed.backend import COORDINATOR, FaultKind
from fleetune.coordinator.testbed.spec import TestbedSpec

SUBJECT = "the chaos file"
FAULTS_MAX = 1000
TIME_S_MAX = 7 * 86_400.0

KINDS: tuple[FaultKind, ...] = ("kill", "pause", "cut", "throttle", "fill_disk", "out_of_memory")
ANY = "any"

NOT_OF_THE_COORDINATOR: tuple[FaultKind, ...] = ("throttle", "fill_disk")
"""It has the machine's disk, and a link without a bound."""

_TOP = ("seed", "fault")
_FAULT = ("kind", "target", "at_s", "every_s", "until_s", "for_s", "to_mbit")

DEFAULT_FOR_S = 5.0


@dataclass(frozen=True)
class Fault:
    """One [[fault]]: at `at_s`, or again and again every `every_s` on average until `until_s`. Seconds from the first round's begin."""

    kind: FaultKind
    target: str
    """A device, a kind of device, "any", or "coordinator"."""
    at_s: float | None
    every_s: float | None
    until_s: float
    for_s: float
    to_mbit: float


@dataclass(frozen=True)
class Chaos:
    """A whole file."""

    seed: int
    faults: tuple[Fault, ...]


def load(file: Path, spec: TestbedSpec, can: frozenset[FaultKind], backend: str) -> Chaos:
    """ComplaintsError with all complaints; ConfigError where the file cannot be read."""
    return parse(tables.read_text(SUBJECT, file), spec, can, backend)


def parse(text: str, spec: TestbedSpec, can: frozenset[FaultKind] = frozenset(KINDS), backend: str = "any") -> Chaos:
    """The faults that a TOML text describes, for these devices. `can` is what the backend can do. ComplaintsError with all complaints."""
    complaints = tables.Complaints()
    top = tables.Table(complaints, "", tables.document(SUBJECT, text), _TOP)
    targets = (*spec.names, *sorted({device.kind for device in spec.devices}), ANY, COORDINATOR)
    faults = [_fault(tables.Table(complaints, path, item, _FAULT), targets, can, backend) for path, item in top.tables("fault", FAULTS_MAX)]
    chaos = Chaos(top.whole("seed", 0, 0, 2**32 - 1), tuple(faults))
    if not faults and not complaints.found:
        complaints.add("fault", None, ", ".join(KINDS), "There is none; write one under a line [[fault]].")
    complaints.end(SUBJECT)
    return chaos


def candidates(fault: Fault, spec: TestbedSpec) -> Sequence[str]:
    """The members that a fault may hit, in the testbed's order."""
    if fault.target == COORDINATOR:
        return (COORDINATOR,)
    if fault.target in spec.names:
        return (fault.target,)
    return tuple(device.name for device in spec.devices if fault.target in (ANY, device.kind))


def _fault(table: tables.Table, targets: Sequence[str], can: frozenset[FaultKind], backend: str) -> Fault:
    kind = cast("FaultKind", table.word("kind", "", KINDS))
    target = table.word("target", "", targets)
    if kind in KINDS and kind not in can:
        able = ", ".join(word for word in KINDS if word in can)
        table.wrong("kind", able, f"The {backend} backend cannot do it; leave it out, or take another backend.")
    if target == COORDINATOR and kind in NOT_OF_THE_COORDINATOR:
        table.wrong("target", "a device", f"{kind} is for devices alone.")
    at_s = table.number("at_s", 0.0, 0.0, TIME_S_MAX) if "at_s" in table else None
    every_s = table.number("every_s", 1.0, 1.0, TIME_S_MAX) if "every_s" in table else None
    if (at_s is None) == (every_s is None):
        table.wrong("at_s", "either at_s or every_s", "Say when: at_s once, or every_s with until_s again and again.")
    if every_s is not None and "until_s" not in table:
        table.wrong("until_s", f"a number from 0 to {TIME_S_MAX:g}", "With every_s say until when.")
    if every_s is None and "until_s" in table:
        table.wrong("until_s", "only beside every_s", "Remove it, or write every_s for at_s.")
    if kind == "throttle" and "to_mbit" not in table:
        table.wrong("to_mbit", "a number from 0.05 to 100000", "Say to which rate the link is held.")
    if kind in KINDS and kind != "throttle" and "to_mbit" in table:
        table.wrong("to_mbit", "only with throttle", "Remove it.")
    if kind == "out_of_memory" and "for_s" in table:
        table.wrong("for_s", "nothing with out_of_memory", "Remove it: it is over when the kernel has killed something.")
    return Fault(
        kind=kind,
        target=target,
        at_s=at_s,
        every_s=every_s,
        until_s=table.number("until_s", 0.0, 0.0, TIME_S_MAX),
        for_s=0.0 if kind == "out_of_memory" else table.number("for_s", DEFAULT_FOR_S, 0.1, TIME_S_MAX),
        to_mbit=table.number("to_mbit", 1.0, 0.05, 100_000.0),
    )

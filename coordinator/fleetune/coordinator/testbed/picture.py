"""Members of a testbed as a table: who lives, what they are at, what they have taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fleetune.coordinator.figures import bytes_text, duration_text
from fleetune.coordinator.testbed.backend import COORDINATOR, Sample
from fleetune.coordinator.testbed.record import Sampled
from fleetune.coordinator.testbed.spec import TestbedSpec

NEWS_LINES = 8

_STYLES = {"running": "green", "paused": "yellow", "ended": "red", "missing": "red"}


@dataclass(frozen=True)
class Row:
    """One member now."""

    member: str
    board: str
    life: str
    at: str
    """The stage of its open task; for one that is idle, "idle" or "offline"."""
    sample: Sample | None
    trouble: str
    """What its last task failed of, as the coordinator knows it."""


def rows(spec: TestbedSpec, sampled: Sampled, devices: Sequence[Mapping[str, Any]] = ()) -> list[Row]:
    """The coordinator first, then the devices in the testbed's order. `devices` is what the coordinator says of them."""
    known = {str(device["name"]): device for device in devices}
    found = [Row(COORDINATOR, "", sampled.lives.get(COORDINATOR, "missing"), sampled.phase, sampled.members.get(COORDINATOR), "")]
    for device in spec.devices:
        view = known.get(device.name)
        idle = "offline" if view is not None and not view["online"] else "idle"
        at = sampled.stages.get(device.name, idle)
        trouble = str(view["last_failure"]) if view is not None else ""
        found.append(
            Row(device.name, device.kind, sampled.lives.get(device.name, "missing"), at, sampled.members.get(device.name), trouble)
        )
    return found


def table(found: Sequence[Row]) -> RenderableType:
    """As a person reads it."""
    right = ("cpu", "memory", "peak", "sent", "received", "oom")
    made = Table(
        Column("member", no_wrap=True), Column("board", no_wrap=True), Column("life", no_wrap=True), Column("at", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in right), box=None, pad_edge=False, header_style="dim",
    )  # fmt: skip
    for row in found:
        one = row.sample
        cells = ["-"] * len(right)
        if one is not None:
            sizes = (one.memory_bytes, one.memory_peak_bytes, one.sent_bytes, one.received_bytes)
            seconds = "-" if one.cpu_s is None else duration_text(one.cpu_s)
            kills = "-" if one.out_of_memory_kills is None else str(one.out_of_memory_kills)
            cells = [seconds, *("-" if size is None else bytes_text(size) for size in sizes), kills]
        made.add_row(Text(row.member, style="bold"), Text(row.board), Text(row.life, style=_STYLES.get(row.life, "")), Text(row.at), *cells)
    troubles = [Text(f"{row.member}: {row.trouble}", style="yellow") for row in found if row.trouble]
    return Group(made, *([Text(), *troubles] if troubles else []))


def live(spec: TestbedSpec, sampled: Sampled, news: Sequence[str], age_s: float) -> RenderableType:
    """While a run goes on."""
    head = Text.assemble((spec.name, "bold"), f"  {sampled.phase}, round {sampled.round_number}, {duration_text(age_s)}")
    return Group(
        head, Text(), table(rows(spec, sampled)), Text(), *(Text(line, overflow="ellipsis", no_wrap=True) for line in news[-NEWS_LINES:])
    )

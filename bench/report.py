"""What was measured, for people: targets with their verdicts, lines of text, the table in docs/benchmarks.md."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from floors import Floor
    from rounds import Point

MIB = 1 << 20
SMALL_MIB = 1
SMALL_ROUND_S = 0.05
"""What a round of a small state may take beside the bytes: two turns of the database and of the children."""

FLOOR_FACTOR = 2.0
MEMORY_MIB = 160
MEMORY_STATES = 3
AGENT_IDLE_MIB = 60
AGENT_MOVING_MIB = 100
START_S = 5.0
START_AGENTS = 8
SAME_MEMORY = 0.10

KNOWN_NET_S = {(2, 1): 0.005, (8, 1): 0.025, (32, 1): 0.05, (16, 4): 0.10, (8, 16): 0.17, (4, 128): 0.9}
"""The net floor as it was measured on a quiet two-core machine: one that needs over twice as long was busy."""

PEERS = {
    (2, 1): ("7.5 / 20", "2.5 (1.0 tuned)"),
    (8, 1): ("18 / 82", "2.5"),
    (32, 1): ("– / 245", "3.5"),
    (16, 4): ("– / 191", "3.0"),
    (8, 16): ("20 / 64", "3.5 (2.5 tuned)"),
    (4, 128): ("– / 53", "11"),
}
"""Seconds a round of Flower 1.34 (its last gRPC) / 1.41, and of NVFLARE 2.9."""

TLS_FACTOR = 1.5
"""What rounds with TLS may take of what those without it may: the floors have none."""


@dataclass(frozen=True)
class Verdict:
    """One target: `value` must not exceed `limit`."""

    target: str
    value: float
    limit: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{'met   ' if self.met else 'MISSED'} {self.target}: {self.value:.3f} {self.unit}, allowed {self.limit:.3f}"


def verdicts(point: Point) -> list[Verdict]:
    """The targets that this point can tell of."""
    product = point.product
    slack_s = SMALL_ROUND_S if point.mib <= SMALL_MIB else 0.0
    factor = 1.0 if point.plaintext else TLS_FACTOR
    found = [
        Verdict("round, median", product.median_s, factor * (FLOOR_FACTOR * point.durable.median_s + slack_s), "s"),
        Verdict("coordinator RssAnon, peak", product.coordinator_anon_peak_bytes / MIB, MEMORY_MIB + MEMORY_STATES * point.mib, "MiB"),
        Verdict("agent idle, resident", product.agent_idle_bytes / MIB, AGENT_IDLE_MIB, "MiB"),
        Verdict(f"agent moving {point.mib} MiB, resident peak", product.agent_peak_bytes / MIB, AGENT_MOVING_MIB, "MiB"),
    ]
    if point.agents <= START_AGENTS:
        found.append(Verdict("start to the end of the first round", product.start_s, START_S, "s"))
    return found


def busy(point: Point) -> bool:
    known_s = KNOWN_NET_S.get((point.agents, point.mib))
    return known_s is not None and point.net.median_s > 2 * known_s


def text(point: Point) -> str:
    """A point in a few lines."""
    product = point.product
    head = f"{point.agents} agents, {point.mib} MiB, {point.rounds} rounds"
    if busy(point):
        head += "  (net floor over twice the usual: BUSY MACHINE)"
    lines = [
        head,
        f"  round    {_seconds(product.seconds)}, {product.mib_per_s:.0f} MiB/s, "
        f"{product.median_s / point.durable.median_s:.2f} x durable, {product.median_s / point.net.median_s:.2f} x net",
        f"  durable  {_floor(point.durable)}",
        f"  net      {_floor(point.net)}",
        f"  coordinator  {product.coordinator_cpu_s_per_round:.3f} CPU s a round, "
        f"RssAnon peak {_mib(product.coordinator_anon_peak_bytes)} MiB, "
        f"RSS idle {_mib(product.coordinator_idle_bytes)}, peak {_mib(product.coordinator_peak_bytes)} MiB",
        f"  agent        RSS idle {_mib(product.agent_idle_bytes)}, peak {_mib(product.agent_peak_bytes)} MiB; "
        f"its child {_mib(product.child_peak_bytes)} MiB",
        f"  loopback     {product.loopback_bytes_per_round / MIB:.1f} MiB a round; start to first round {product.start_s:.2f} s; "
        f"result {'exact' if product.exact else 'WRONG'}",
        *(f"  {verdict}" for verdict in verdicts(point)),
    ]
    return "\n".join(lines)


def table(points: Sequence[Point], command: str) -> str:
    """Markdown: the machine, a line for each point, the verdicts."""
    how = "without TLS" if points[0].plaintext else "with mutual TLS, as they are by default"
    lines = [
        f"## Rounds {how}: the real daemons beside bare gRPC",
        "",
        "Real coordinator and agents as processes, method `echo`: every device fetches a state of S MiB, adds a constant to every element",
        "and sends all of it back; every element of the result is checked. The *net* floor is bare grpc.aio on uvloop moving the same,",
        "the *durable* floor hashes, writes and fsyncs each update as well before it acknowledges it (bench/floors.py).",
        "The floors never have TLS.",
        "",
        f"Measured on {datetime.date.today().isoformat()} with `{command}` on {machine()}.",
        "",
        "Seconds of a round are the median (minimum to maximum); MiB/s counts both directions. Memory of the coordinator is its peak",
        "RssAnon / RSS, of the agents the peak RSS of the daemon without its child (idle / moving). Floors are medians of the same run.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + " --- |" * len(_COLUMNS),
    ]
    lines += ["| " + " | ".join(_cells(point)) + " |" for point in points]
    lines += ["", "| N, S MiB | target | measured | allowed | |", "| --- | --- | --- | --- | --- |"]
    for point in points:
        lines += [
            f"| {point.agents}, {point.mib} | {verdict.target} | {verdict.value:.3g} {verdict.unit} | {verdict.limit:.3g} {verdict.unit} "
            f"| {'met' if verdict.met else 'missed'} |"
            for verdict in verdicts(point)
        ]
    lines += _same_memory(points)
    lines += [
        "",
        "Seconds a round of others, measured on a two-core machine of the same kind, not part of this run:",
        "",
        "| N, S MiB | Flower 1.34, its last gRPC / 1.41 | NVFLARE 2.9 | Fleetune, this run |",
        "| --- | --- | --- | --- |",
    ]
    for point in points:
        if (known := PEERS.get((point.agents, point.mib))) is not None:
            lines.append(f"| {point.agents}, {point.mib} | {known[0]} | {known[1]} | {point.product.median_s:.2f} |")
    return "\n".join(lines)


_COLUMNS = (
    "N, S MiB",
    "round, s",
    "durable floor, s",
    "ratio",
    "net floor, s",
    "MiB/s",
    "coordinator CPU s",
    "coordinator MiB",
    "agent MiB",
    "child MiB",
    "loopback MiB",
    "start, s",
)


def _cells(point: Point) -> tuple[str, ...]:
    product = point.product
    return (
        f"{point.agents}, {point.mib}",
        f"{product.median_s:.3f} ({min(product.seconds):.3f} to {max(product.seconds):.3f})",
        f"{point.durable.median_s:.3f}",
        f"{product.median_s / point.durable.median_s:.2f}",
        f"{point.net.median_s:.3f}{' (busy)' if busy(point) else ''}",
        f"{product.mib_per_s:.0f}",
        f"{product.coordinator_cpu_s_per_round:.3f}",
        f"{_mib(product.coordinator_anon_peak_bytes)} / {_mib(product.coordinator_peak_bytes)}",
        f"{_mib(product.agent_idle_bytes)} / {_mib(product.agent_peak_bytes)}",
        _mib(product.child_peak_bytes),
        _mib(product.loopback_bytes_per_round),
        f"{product.start_s:.1f}",
    )


def _same_memory(points: Sequence[Point]) -> list[str]:
    """Whether the coordinator's memory stays the same with the number of devices, where the run can tell."""
    by_agents = {point.agents: point.product.coordinator_anon_peak_bytes / MIB for point in points if point.mib == 16}
    if len(by_agents) < 2:
        return []
    few, many = min(by_agents), max(by_agents)
    change = by_agents[many] / by_agents[few] - 1
    return [
        "",
        f"Coordinator's RssAnon with {many} devices of 16 MiB against {few}: {by_agents[many]:.0f} and {by_agents[few]:.0f} MiB, "
        f"{change:+.0%} (at most {SAME_MEMORY:.0%} more is wanted: {'met' if change <= SAME_MEMORY else 'missed'}).",
    ]


def machine() -> str:
    """The machine in words: processor, cores, kernel and the versions that matter."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, grpcio {importlib.metadata.version('grpcio')}"
    )


def _floor(floor: Floor) -> str:
    return f"{_seconds(floor.seconds)}, {floor.cpu_s_per_round:.3f} CPU s, {_mib(floor.peak_rss_bytes)} MiB"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f}"


def _seconds(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return f"{median:.3f} s ({ordered[0]:.3f} to {ordered[-1]:.3f})"

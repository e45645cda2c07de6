"""Rounds of the real coordinator with real agents, held against bare gRPC moving the same bytes on the same machine.

Starts a coordinator and N agents as processes of their own, lets them run an `echo` job with a state of S MiB, checks every element
of the result, and reports time, CPU, memory and bytes of each round beside two floors (see floors.py), measured before and after.

    python bench/rounds.py --agents 8 --mib 16 --rounds 7
    python bench/rounds.py --table

Meaningful are the ratios within one run. Bytes on loopback are everybody's, also those of other programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import floors
import numpy as np
import report
import sections
from fleet import Fleet
from meters import Meter, memory

from fleetune.coordinator.client import Client
from fleetune.v1 import control_pb2
from fleetune.wire import codec

MIB = 1 << 20
SETTLE_S = 1.0
"""After the last agent has joined, before their idle memory is read."""

JOIN_S = 120.0
LOOK_S = 0.02
POINTS = ((2, 1), (8, 1), (32, 1), (16, 4), (8, 16), (4, 128), (4, 16), (32, 16))


@dataclass(frozen=True)
class Product:
    """What the real daemons took. Bytes and seconds; `seconds` has one entry a round, without the warm-up rounds."""

    seconds: tuple[float, ...]
    mib_per_s: float
    coordinator_cpu_s_per_round: float
    coordinator_anon_peak_bytes: int
    coordinator_peak_bytes: int
    coordinator_idle_bytes: int
    agent_idle_bytes: int
    agent_peak_bytes: int
    child_peak_bytes: int
    loopback_bytes_per_round: int
    start_s: float
    exact: bool

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Point:
    """One line of the table."""

    agents: int
    mib: int
    rounds: int
    product: Product
    net: floors.Floor
    durable: floors.Floor
    plaintext: bool
    """The floors never have TLS: this tells whether the product did without it, too."""


def measure(agents: int, mib: int, rounds: int, warmup: int, folder: Path, *, plaintext: bool = False) -> Point:
    """Floors, the product, floors again: a machine whose load changes shows in both."""
    check_space(agents, mib, folder)
    before = [floors.measure(agents, mib, rounds, warmup, folder, durable=durable) for durable in (False, True)]
    with tempfile.TemporaryDirectory(prefix="fleetune-bench-", dir=folder) as place:
        product = asyncio.run(_measure_product(agents, mib, rounds, warmup, Path(place), plaintext))
    after = [floors.measure(agents, mib, rounds, warmup, folder, durable=durable) for durable in (False, True)]
    net, durable = (_both(first, second) for first, second in zip(before, after, strict=True))
    return Point(agents, mib, rounds, product, net, durable, plaintext)


def check_space(agents: int, mib: int, folder: Path) -> None:
    """SystemExit where the files of a run would not fit: state, update and cache of each agent, and the same at the coordinator."""
    needed = (agents * 6 + 8) * mib * MIB + 512 * MIB
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(f"{folder} has {free / MIB:.0f} MiB free, about {needed / MIB:.0f} MiB are needed; name another with --folder.")


def _both(first: floors.Floor, second: floors.Floor) -> floors.Floor:
    cpu_s = (first.cpu_s_per_round + second.cpu_s_per_round) / 2
    return floors.Floor(first.seconds + second.seconds, cpu_s, max(first.peak_rss_bytes, second.peak_rss_bytes))


async def _measure_product(agents: int, mib: int, rounds: int, warmup: int, folder: Path, plaintext: bool) -> Product:
    async with Fleet(folder, agents, plaintext=plaintext) as fleet, fleet.client() as client:
        await _joined(fleet, client, agents)
        joined_s = time.monotonic() - fleet.started_s
        await asyncio.sleep(SETTLE_S)
        agent_idle = max(found.resident for pid in fleet.agents if (found := memory(pid)) is not None)
        idle = memory(fleet.coordinator)
        with Meter(fleet.coordinator, fleet.agents) as meter:
            submitted_unix_s = time.time()
            job_id = await client.submit(_job(agents, mib, warmup + rounds))
            job = await _ended(fleet, client, job_id)
        if job.state != control_pb2.JOB_STATE_COMPLETED:
            raise RuntimeError(f"the job did not complete: {job.message}")
        history = list(job.history)
        exact = await _is_exact(client, job_id, folder / "result", agents, len(history))
    # A round lasts until the next one begins, and the last until its commit.
    starts = [view.started_unix_s for view in history] + [history[-1].ended_unix_s]
    seconds = [after - before for before, after in zip(starts[warmup:], starts[warmup + 1 :], strict=False)]
    cpu_s, moved = meter.between(starts[warmup], starts[-1])
    return Product(
        seconds=tuple(seconds),
        mib_per_s=2 * agents * mib / statistics.median(seconds),
        coordinator_cpu_s_per_round=cpu_s / rounds,
        coordinator_anon_peak_bytes=meter.coordinator_anon_peak,
        coordinator_peak_bytes=meter.coordinator_peak,
        coordinator_idle_bytes=idle.resident if idle is not None else 0,
        agent_idle_bytes=agent_idle,
        agent_peak_bytes=meter.agent_peak,
        child_peak_bytes=meter.child_peak,
        loopback_bytes_per_round=round(moved / rounds),
        # The pause in which idle memory was read is not part of it.
        start_s=joined_s + history[0].ended_unix_s - submitted_unix_s,
        exact=exact,
    )


def _job(agents: int, mib: int, rounds: int) -> str:
    return f"""
name = "bench"
[method]
name = "echo"
state_mib = {mib}
[rounds]
count = {rounds}
quorum = 1.0
[devices]
minimum = {agents}
"""


async def _joined(fleet: Fleet, client: Client, agents: int) -> None:
    deadline_s = time.monotonic() + JOIN_S
    while (await client.server_info()).devices_online < agents:
        fleet.check()
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"not all of {agents} agents joined within {JOIN_S:g} s")
        await asyncio.sleep(LOOK_S)


async def _ended(fleet: Fleet, client: Client, job_id: str) -> control_pb2.JobView:
    """Watches as a person would."""
    last = control_pb2.JobView()
    async for view in client.watch(job_id):
        fleet.check()
        last = view
    return last


async def _is_exact(client: Client, job_id: str, folder: Path, agents: int, rounds: int) -> bool:
    """Whether every element is what the devices' constants 1 to N add up to: their mean, once a round."""
    exported = await client.export(job_id, folder)
    path = exported.folder / "adapter_model.safetensors"
    table = codec.read_table(path)
    values = np.memmap(path, np.uint8, "r")[table.data_start :].view("<f4")
    return all(spec.dtype == "F32" for spec in table.specs) and bool((values == rounds * (agents + 1) / 2).all())


def as_json(point: Point) -> dict[str, object]:
    """Everything measured, the medians and the verdicts."""
    return {
        "agents": point.agents,
        "mib": point.mib,
        "rounds": point.rounds,
        "product": {**asdict(point.product), "median_s": point.product.median_s},
        "floors": {
            "net": {**asdict(point.net), "median_s": point.net.median_s},
            "durable": {**asdict(point.durable), "median_s": point.durable.median_s},
        },
        "verdicts": [asdict(verdict) for verdict in report.verdicts(point)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=4, help="agent processes")
    parser.add_argument("--mib", type=int, default=16, help="size of the state in MiB")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those; the first one starts the agents' children")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie; its disk is measured too")
    parser.add_argument("--plaintext", action="store_true", help="without TLS, as on one machine; the floors never have it")
    parser.add_argument("--table", action="store_true", help="all points of the table, written to docs/benchmarks.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    given = parser.parse_args(arguments)
    if min(given.agents, given.mib, given.rounds) < 1 or given.warmup < 0:
        parser.error("--agents, --mib and --rounds start at 1, --warmup at 0")
    signal.signal(signal.SIGTERM, _interrupt)
    points: list[Point] = []
    try:
        for agents, mib in POINTS if given.table else ((given.agents, given.mib),):
            point = measure(agents, mib, given.rounds, given.warmup, given.folder, plaintext=given.plaintext)
            print(report.text(point), flush=True)
            points.append(point)
    except KeyboardInterrupt:
        print("interrupted; all processes have ended", file=sys.stderr)
        return 130
    if given.json is not None:
        given.json.write_text(json.dumps([as_json(point) for point in points], indent=2) + "\n", encoding="utf-8")
    if given.table:
        command = f"python bench/rounds.py --table --rounds {given.rounds}{' --plaintext' if given.plaintext else ''}"
        sections.put("rounds" if given.plaintext else "rounds-tls", report.table(points, command))
    return 0 if all(point.product.exact for point in points) else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""What a reading of the metrics costs with many devices: seconds of the loop and beside it, allocation, and how long the loop stood still.

python bench/scrape.py --devices 1000 --scrapes 20
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import uvloop

from fleetune.coordinator.metrics import service
from fleetune.coordinator.registry import Greeting, Session
from fleetune.coordinator.rpc.fleet import Line
from fleetune.coordinator.store.identities import CertificateRow
from fleetune.v1 import fleet_pb2
from support import scraping
from support.coordinating import Coordinator, coordinating

TICK_S = 0.001


def people(coordinator: Coordinator, devices: int) -> None:
    """So many connected devices, each with a certificate and a heartbeat, without their connections."""
    now_s = time.monotonic()
    registry, fleet, roster = coordinator.engine.registry, coordinator.fleet, coordinator.running.roster
    for number in range(devices):
        device_id, name = f"device-{number:06}", f"board-{number:06}"
        session = registry.admit(Greeting(device_id, name, "run-1", methods=frozenset({"echo"})), now_s)
        assert isinstance(session, Session)
        heartbeat = fleet_pb2.Heartbeat(
            sequence=1,
            cpu_percent=number % 100,
            memory_available_bytes=2 << 30,
            memory_total_bytes=4 << 30,
            temperature_c=40.5 + number % 40,
            agent_rss_bytes=50 << 20,
            child_rss_bytes=900 << 20,
            disk_free_bytes=20 << 30,
        )
        fleet.lines[device_id] = Line(session, fleet_pb2.Hello(), telemetry=heartbeat)
        row = CertificateRow(f"{number:064x}", "agent", name, device_id, 0, "", "", "", 0.0, time.time() + 1e6, time.time())
        roster._remember([row])  # the roster's own way would sign a certificate for each


async def tick(gaps: list[float]) -> None:
    """How much later than asked for the loop comes round, for as long as it runs."""
    while True:
        began_s = time.perf_counter()
        await asyncio.sleep(TICK_S)
        gaps.append(time.perf_counter() - began_s - TICK_S)


async def measure(devices: int, scrapes: int) -> None:
    service.FRESH_S = 0.0
    with tempfile.TemporaryDirectory() as folder:
        async with coordinating(Path(folder), metrics_listen="127.0.0.1:0") as coordinator:
            people(coordinator, devices)
            metrics = coordinator.running.metrics
            assert metrics is not None
            gc.collect()
            gc.freeze()
            gaps: list[float] = []
            idle: list[float] = []
            ticking = asyncio.create_task(tick(idle))
            await asyncio.sleep(1.0)
            ticking.cancel()
            walls: list[float] = []
            ticking = asyncio.create_task(tick(gaps))
            answer = await scraping.ask(metrics.port, Accept_Encoding="gzip")
            cpu_s = time.process_time()
            for _ in range(scrapes):
                began_s = time.perf_counter()
                answer = await scraping.ask(metrics.port, Accept_Encoding="gzip")
                walls.append(time.perf_counter() - began_s)
            cpu_s = time.process_time() - cpu_s
            ticking.cancel()
            found = await scraping.scrape(metrics.port)
            tracemalloc.start()
            await scraping.ask(metrics.port, Accept_Encoding="gzip")
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            series = sum(len(family.samples) for family in found.families.values())
            for name, value in dataclasses.asdict(
                Found(
                    devices,
                    series,
                    len(answer.text),
                    len(answer.body),
                    ms(sorted(walls)[len(walls) // 2]),
                    ms(cpu_s / scrapes),
                    ms(found.value("fleetune_scrape_render_seconds")),
                    ms(found.value("fleetune_scrape_snapshot_seconds")),
                    ms(max(idle)),
                    ms(sorted(gaps)[len(gaps) * 99 // 100]),
                    ms(max(gaps)),
                    round(peak / 2**20, 1),
                )
            ).items():
                print(f"{name:24} {value}")


@dataclasses.dataclass(frozen=True)
class Found:
    devices: int
    series: int
    text_bytes: int
    gzip_bytes: int
    scrape_ms_median: float
    cpu_ms: float
    """Of both ends, and of looking at the loop."""
    render_ms: float
    snapshot_ms: float
    idle_loop_late_ms_max: float
    loop_late_ms_p99: float
    loop_late_ms_max: float
    allocated_mib_peak: float


def ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--scrapes", type=int, default=20)
    chosen = parser.parse_args()
    uvloop.run(measure(chosen.devices, chosen.scrapes))


if __name__ == "__main__":
    main()

"""What a heartbeat says about the machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fleetune.agent.probe import disk, thermal
from fleetune.agent.probe.compute import CpuMeter
from fleetune.agent.probe.memory import memory, resident_bytes
from fleetune.v1 import fleet_pb2


class Telemetry:
    """Fills heartbeats; remembers the CPU counters from one to the next. Owned by the session."""

    def __init__(self, state_dir: Path, root: Path = Path("/")) -> None:
        self._state_dir = state_dir
        self._root = root
        self._cpu = CpuMeter(root)
        self._cpu.percent(time.monotonic())

    def heartbeat(self, sequence: int, child_pid: int | None = None, task_id: str = "") -> fleet_pb2.Heartbeat:
        """The machine now. A few small files are read: about a millisecond on a board."""
        now = memory(self._root)
        return fleet_pb2.Heartbeat(
            sequence=sequence,
            cpu_percent=self._cpu.percent(time.monotonic()),
            memory_available_bytes=now.available_bytes,
            memory_total_bytes=now.total_bytes,
            temperature_c=thermal.hottest_c(self._root),
            agent_rss_bytes=resident_bytes(os.getpid()),
            child_rss_bytes=resident_bytes(child_pid),
            disk_free_bytes=disk.free_bytes(self._state_dir),
            task_id=task_id,
        )

"""The device's profile, as the agent tells it when it connects."""

from __future__ import annotations

import platform
from pathlib import Path

from fleetune.agent.probe import compute, disk
from fleetune.agent.probe.memory import memory
from fleetune.v1 import fleet_pb2


def profile(state_dir: Path, configured_cores: int = 0, configured_accelerator: str = "auto", root: Path = Path("/")) -> fleet_pb2.Profile:
    """What the machine has for this agent. Configured cores and accelerator (0 and "auto": none) stand in for the measured ones."""
    usable = compute.cores(root)
    found = compute.accelerator(root)
    if configured_accelerator not in ("auto", found.kind):
        found = compute.Accelerator(configured_accelerator, "")
    now = memory(root)
    return fleet_pb2.Profile(
        machine=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        python_version=platform.python_version(),
        cores=min(usable, configured_cores) if configured_cores else usable,
        memory_total_bytes=now.total_bytes,
        memory_available_bytes=now.available_bytes,
        disk_free_bytes=disk.free_bytes(state_dir),
        accelerator=found.kind,
        accelerator_name=found.name,
        board=compute.board(root),
    )

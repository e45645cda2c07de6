"""From a configuration to a running daemon: the lock on the state folder, the event loop and the signals."""

from __future__ import annotations

import asyncio
import logging
import signal

from fleetune import allocator
from fleetune.agent import identity
from fleetune.agent.config import AgentConfig, missing_files
from fleetune.agent.daemon import Daemon

LOG = logging.getLogger(__name__)

KEPT_MEMORY_BYTES = 8 << 20
"""Freed memory that stays for the next chunks; the rest goes back to the system."""


def run(config: AgentConfig, version: str, connect_timeout_s: float | None) -> None:
    """Run until SIGTERM or SIGINT. StateInUseError, RefusedError, UnreachableError and ConfigError say why it did not."""
    for variable in config.unused_environment:
        LOG.warning("environment variable is no setting name=%s", variable)
    for complaint in missing_files(config):
        # Only a warning: a disk may be mounted later.
        LOG.warning("%s", complaint.sentence())
    allocator.tune_for_chunks(KEPT_MEMORY_BYTES)
    with identity.lock(config.state_dir):
        device_id = identity.device_id(config.state_dir)
        LOG.info(
            "starting version=%s name=%s id=%s coordinator=%s state_dir=%s",
            version,
            config.name,
            device_id,
            config.coordinator,
            config.state_dir,
        )
        daemon = Daemon(config, device_id, version, connect_timeout_s)
        try:
            import uvloop
        except ImportError:  # no wheel for this platform: asyncio's own loop takes more of the processor, and is no different otherwise
            asyncio.run(_run(daemon))
        else:
            uvloop.run(_run(daemon))


async def _run(daemon: Daemon) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    allocator.settle()
    await daemon.run(stop)

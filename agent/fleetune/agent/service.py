"""From a configuration to a running daemon: the lock on the state folder, the event loop and the signals."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import signal

from fleetune.agent import identity
from fleetune.agent.config import AgentConfig, missing_files
from fleetune.agent.daemon import Daemon

LOG = logging.getLogger(__name__)


def run(config: AgentConfig, version: str, connect_timeout_s: float | None) -> None:
    """Run until SIGTERM or SIGINT. StateInUseError, RefusedError, UnreachableError and ConfigError say why it did not."""
    for variable in config.unused_environment:
        LOG.warning("environment variable is no setting name=%s", variable)
    for complaint in missing_files(config):
        # Only a warning: a disk may be mounted later.
        LOG.warning("%s", complaint.sentence())
    _quieten_allocator()
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
        asyncio.run(_run(Daemon(config, device_id, version, connect_timeout_s)))


async def _run(daemon: Daemon) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await daemon.run(stop)


def _quieten_allocator() -> None:
    """Chunks of 1 MiB come and go on several threads: fewer arenas and an early trim keep glibc from holding on to them."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_arena_max = -1, -8
        libc.mallopt(m_arena_max, 2)
        libc.mallopt(m_trim_threshold, 4 * 1024 * 1024)

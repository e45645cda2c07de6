"""From a configuration to a running daemon: the lock on the state folder, the event loop and the signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import replace

from fleetune import allocator
from fleetune.agent import credentials, identity
from fleetune.agent.config import AgentConfig, missing_files
from fleetune.agent.credentials import Credentials
from fleetune.agent.daemon import Daemon
from fleetune.errors import ConfigError
from fleetune.supervisor import Supervisor
from fleetune.wire import channel
from fleetune.wire import identity as identities

LOG = logging.getLogger(__name__)

DEFAULT_ADDRESS = "127.0.0.1:7433"

KEPT_MEMORY_BYTES = 8 << 20
"""Freed memory that stays for the next chunks; the rest goes back to the system."""


def run(config: AgentConfig, version: str, connect_timeout_s: float | None) -> None:
    """Run until SIGTERM or SIGINT. StateInUseError, RefusedError, UnreachableError and ConfigError say why it did not."""
    for variable in config.unused_environment:
        LOG.warning("environment variable is no setting name=%s", variable)
    for complaint in missing_files(config):
        # Only a warning: a disk may be mounted later.
        LOG.warning("%s", complaint.sentence())
    supervisor = Supervisor.from_environment(os.environ)
    allocator.tune_for_chunks(KEPT_MEMORY_BYTES)
    with identity.lock(config.state_dir):
        held = admitted(config)
        if held.identity is not None:
            config = replace(config, name=held.identity.facts.name)
        device_id = identity.device_id(config.state_dir)
        LOG.info(
            "starting version=%s name=%s id=%s coordinator=%s tls=%s state_dir=%s",
            version,
            config.name,
            device_id,
            held.address,
            "no" if held.identity is None else "mutual",
            config.state_dir,
        )
        daemon = Daemon(config, held, device_id, version, connect_timeout_s)
        try:
            import uvloop
        except ImportError:  # no wheel for this platform: asyncio's own loop takes more of the processor, and is no different otherwise
            asyncio.run(_run(daemon, supervisor))
        else:
            uvloop.run(_run(daemon, supervisor))


def admitted(config: AgentConfig) -> Credentials:
    """As whom this agent dials. ConfigError where it has not joined a fleet, or the settings contradict its certificate."""
    folder = credentials.folder_of(config.state_dir)
    if config.plaintext:
        address = config.coordinator or DEFAULT_ADDRESS
        if not channel.is_loopback(address.rpartition(":")[0]):
            raise ConfigError(
                f"plaintext is for a coordinator on this machine, and {address} is another.",
                "Join the fleet with `fleetune-agent join` and leave plaintext out, or set coordinator to a port of 127.0.0.1.",
            )
        return Credentials(folder, None, address)
    found = identities.load(folder)
    if found is None:
        raise ConfigError(
            f"This device has joined no fleet: there is no identity in {folder}.",
            "Run `fleetune-agent join` with a line of `fleetune token create`; or give --plaintext for a coordinator on this machine "
            "that runs so, too.",
        )
    if found.facts.kind != "agent":
        raise ConfigError(f"The identity in {folder} is of {found.facts.kind} {found.facts.name!r}.", "Join with a token for devices.")
    if config.name_is_set and config.name != found.facts.name:
        raise ConfigError(
            f"The setting name says {config.name!r}, and the certificate in {folder} is for {found.facts.name!r}.",
            f"Leave the setting out, or join under the new name: `fleetune-agent join --again --name {config.name}`.",
        )
    return Credentials(folder, found, config.coordinator)


async def _run(daemon: Daemon, supervisor: Supervisor) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    allocator.settle()
    await daemon.run(stop, supervisor)

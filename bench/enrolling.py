"""Members of a benchmark's fleet: its authority, an operator and devices, made in this process before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fleetune.agent import identity as devices
from fleetune.coordinator import config, initialise
from fleetune.coordinator.fleet_client import FleetClient
from fleetune.v1 import registry_pb2
from fleetune.wire import enrolment, identity
from fleetune.wire.identity import Identity
from fleetune.wire.joinline import JoinLine

USES_MAX = 1000
"""Of one token."""


def initialised(state_dir: Path, operator_folder: Path) -> Identity:
    """What `fleetune init` makes; what is there already stays."""
    if identity.load(operator_folder) is None:
        settings = config.load(None, {}, {"state_dir": str(state_dir), "listen": "127.0.0.1:0"})
        initialise.initialise(settings, "bench", operator_folder, "")
    made = identity.load(operator_folder)
    assert made is not None
    return made


async def line_for(address: str, operator: Identity, uses: int) -> JoinLine:
    """The line that `fleetune token create` prints, good for so many devices."""
    async with FleetClient(address, operator) as client:
        request = registry_pb2.CreateTokenRequest(kind=registry_pb2.IDENTITY_KIND_AGENT, uses=min(uses, USES_MAX), ttl_s=3600.0)
        answer = await client.create_token(request)
    return JoinLine(address, answer.join_port, bytes.fromhex(answer.root_fingerprint), answer.token)


def enrolled(line: JoinLine, states: Sequence[tuple[str, Path]]) -> None:
    """Let devices join, each a name and a state folder."""
    for name, state_dir in states:
        state_dir.mkdir(parents=True, exist_ok=True)
        identity.store(state_dir / "identity", enrolment.enrol(line, name, devices.device_id(state_dir)))

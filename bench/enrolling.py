"""Members of a benchmark's fleet: its authority, an operator and devices, made in this process before anything is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Connection

from fleetune.agent import identity as devices
from fleetune.coordinator import certificates, config, initialise, tlsfolder
from fleetune.coordinator.fleet_client import FleetClient
from fleetune.coordinator.principal import Role
from fleetune.coordinator.store import identities
from fleetune.coordinator.store.db import Database
from fleetune.coordinator.store.identities import CertificateRow
from fleetune.v1 import registry_pb2
from fleetune.wire import enrolment, identity, keys
from fleetune.wire.identity import SERVER_NAME, Facts, Identity
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


async def registered(state_dir: Path, members: Sequence[tuple[str, str, Path]]) -> None:
    """What joining leaves behind for many devices at once, each a name, an id and a folder; while the coordinator does not run."""
    signing, now, days = tlsfolder.read(tlsfolder.of(state_dir)).authority, time.time(), 30.0
    rows: list[CertificateRow] = []
    for name, device_id, folder in members:
        request = keys.make_request(name)
        issued = signing.sign_agent(request.signing_request, name, device_id, days, now)
        rows.append(
            CertificateRow(
                fingerprint=issued.fingerprint,
                kind="agent",
                name=name,
                device_id=device_id,
                role=int(Role.NONE),
                authority=issued.authority,
                roots=certificates.roots_digest(signing.roots_pem),
                token_id="",
                not_before_unix_s=issued.not_before_unix_s,
                not_after_unix_s=issued.not_after_unix_s,
                issued_unix_s=now,
            )
        )
        facts = Facts("agent", name, "", "", SERVER_NAME, issued.not_before_unix_s, issued.not_after_unix_s)
        identity.store(folder, Identity(facts, request.key, issued.certificate, signing.roots_pem))

    def enlist(tx: Connection) -> None:
        for row in rows:
            identities.add_certificate(tx, row)
            identities.bind_device(tx, row.device_id, row.name, now)

    database = Database(state_dir / "coordinator.sqlite")
    try:
        await database.open()
        await database.write(enlist)
    finally:
        await database.close()

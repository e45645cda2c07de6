"""`fleetune init`: the fleet's own authority, the coordinator's certificate, and the first operator, on the coordinator's own machine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from fleetune.coordinator import certificates, operator, statelock, tlsfolder
from fleetune.coordinator.config import CoordinatorConfig, is_wildcard
from fleetune.coordinator.faults import FolderInUseError
from fleetune.coordinator.principal import NAME, Role
from fleetune.coordinator.store import identities, records
from fleetune.coordinator.store.db import Database
from fleetune.errors import ConfigError
from fleetune.wire import keys
from fleetune.wire.identity import SERVER_NAME, Facts, Identity


@dataclass(frozen=True)
class Initialised:
    """What there is now."""

    state_dir: Path
    new_authority: bool
    """False: there was one, and only the operator's identity was missing."""
    root_fingerprint: str
    operator: str
    identity_folder: Path
    address: str
    """What devices dial, as far as it was told."""


def initialise(config: CoordinatorConfig, operator_name: str, identity_folder: Path, address: str) -> Initialised:
    """Make what is missing and overwrite nothing: `address` is HOST:PORT for join lines, or empty.

    ConfigError for settings that name another authority, a bad name, or a folder that is not whole; FolderInUseError where everything is
    there already; MachineError while the coordinator runs.
    """
    if config.tls is not None:
        raise ConfigError(
            "the settings tls.* name another authority, so there is none to make here.",
            "Leave them out for an authority of the fleet's own.",
        )
    if not NAME.fullmatch(operator_name):
        raise ConfigError(
            f"an operator cannot be called {operator_name[:80]!r}.", "Take 1 to 63 of A-Z a-z 0-9 . _ - with --operator, such as ada."
        )
    with statelock.held(config.state_dir):
        missing = tlsfolder.missing(config.state_dir)
        if missing and tlsfolder.of(config.state_dir).exists():
            raise ConfigError(
                f"{tlsfolder.of(config.state_dir)} lacks {', '.join(missing)}.",
                "Restore the folder from a backup, or move it away; every device and operator has to join again then.",
            )
        if not missing and _holds_identity(identity_folder):
            raise FolderInUseError(
                f"this coordinator has its authority ({tlsfolder.of(config.state_dir)}), and {identity_folder} holds an identity.",
                "Nothing is left to do; `fleetune token create --operator` lets further operators join.",
            )
        operator.refuse_overwriting(identity_folder, again=False)
        now = time.time()
        if missing:
            tlsfolder.make(config.state_dir, address, now)
        material = tlsfolder.read(tlsfolder.of(config.state_dir))
        made, row = _operator(material, operator_name, config, now)
        asyncio.run(_enlist(config.state_dir, row, operator_name))
        # Last: with it the work is done, and without it the same words go on from here.
        operator.put(identity_folder, made)
    root = material.authority.fingerprint
    return Initialised(config.state_dir, bool(missing), root, operator_name, identity_folder, config.address or material.address)


def _holds_identity(folder: Path) -> bool:
    return (folder / "identity.json").exists()


def _operator(material: tlsfolder.Material, name: str, config: CoordinatorConfig, now: float) -> tuple[Identity, identities.CertificateRow]:
    request = keys.make_request(name)
    signing = material.authority
    issued = signing.sign_operator(request.signing_request, name, Role.ADMIN, config.certificate_days, now)
    facts = Facts(
        kind="operator",
        name=name,
        role=Role.ADMIN.name.lower(),
        coordinator=config.address or material.address or _here(config.listen),
        server_name=SERVER_NAME,
        not_before_unix_s=issued.not_before_unix_s,
        not_after_unix_s=issued.not_after_unix_s,
    )
    row = certificates.made_here(issued, signing, name, Role.ADMIN, now)
    return Identity(facts, request.key, issued.certificate, signing.roots_pem), row


def _here(listen: str) -> str:
    """Where the coordinator answers on its own machine; empty where the system chooses the port."""
    host, _, port = listen.rpartition(":")
    if port == "0":
        return ""
    return f"{('[::1]' if host.startswith('[') else '127.0.0.1') if is_wildcard(host) else host}:{port}"


async def _enlist(state_dir: Path, row: identities.CertificateRow, name: str) -> None:
    database = Database(state_dir / "coordinator.sqlite")
    try:
        await database.open()
        detail = f"certificate={row.fingerprint[:16]} role={Role(row.role).name.lower()}"
        audit = records.AuditRow(row.issued_unix_s, "fleetune init", "join", f"operator {name}", "done", detail)

        def enlist(tx: Connection) -> None:
            identities.add_certificate(tx, row)
            records.add_audit(tx, audit)

        await database.write(enlist)
    finally:
        await database.close()

"""How the coordinator lets in: from which files its TLS comes, how they are followed while it runs, and what join lines tell."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.coordinator import tlsfolder
from fleetune.coordinator.config import CoordinatorConfig, TlsFiles, is_wildcard
from fleetune.coordinator.handshakes import Handshakes, Offer
from fleetune.errors import ConfigError, FleetuneError
from fleetune.wire import channel

if TYPE_CHECKING:
    from fleetune.coordinator.authority import Authority
    from fleetune.coordinator.certificates import Roster
    from fleetune.coordinator.rpc.fleet import FleetService

log = logging.getLogger("fleetune.tls")

LOOK_S = 1.0
"""How soon a rotation or a new certificate on disk is taken up."""

MEND_S = 3600.0
"""How often the age of the server's certificate is looked at."""


@dataclass
class Tls:
    """What the coordinator shows, and whom it takes. Written only by `follow`."""

    handshakes: Handshakes
    authority: Authority | None
    """None: another authority made the certificates."""
    folder: Path
    files: TlsFiles | None
    server_root: str = ""
    """Hex SHA-256 of the root that the server's certificate comes from."""
    address: str = ""
    """As `fleetune init` was told."""
    mark: object = field(default=None)


def open_tls(config: CoordinatorConfig, now_unix_s: float) -> Tls | None:
    """The TLS that the settings ask for; None for plaintext. Raises ConfigError where files are missing, damaged or open to others."""
    if config.plaintext:
        return None
    folder = tlsfolder.of(config.state_dir)
    if config.tls is not None:
        return Tls(Handshakes(_foreign(config.tls)), None, folder, config.tls, mark=_foreign_mark(config.tls))
    _check_folder(config.state_dir)
    if tlsfolder.mend(folder, now_unix_s):
        log.warning("the coordinator's certificate was renewed")
    mark = tlsfolder.mark(folder)
    material = tlsfolder.read(folder)
    offer = Offer(material.server_key, material.server_chain, material.roots)
    return Tls(Handshakes(offer), material.authority, folder, None, material.server_root, material.address, mark)


async def follow(tls: Tls, roster: Roster, fleet: FleetService) -> None:
    """Take up what changes on disk, renew the server's certificate in time, and tell devices to renew where the roots have changed."""
    told: dict[str, int] = {}
    mended_s = time.monotonic()
    while True:
        await asyncio.sleep(LOOK_S)
        if tls.files is None and time.monotonic() - mended_s > MEND_S:
            mended_s = time.monotonic()
            await _mend(tls.folder)
        await _take_up(tls, roster)
        if tls.authority is not None:
            _tell(tls.authority, roster, fleet, told)


def outgoing_host() -> str:
    """The address of this machine that others see, as far as it knows: of the route to elsewhere. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def dialled(config: CoordinatorConfig, stored: str, port: int) -> str:
    """HOST:PORT for join lines: the setting, what `fleetune init` was told, or what is listened on."""
    if config.address or stored:
        return config.address or stored
    host = config.listen.rpartition(":")[0]
    return f"{outgoing_host() if is_wildcard(host) else host}:{port}"


async def _mend(folder: Path) -> None:
    try:
        if await asyncio.to_thread(tlsfolder.mend, folder, time.time()):
            log.warning("the coordinator's certificate was renewed")
    except (FleetuneError, OSError) as error:
        log.error("the coordinator's certificate could not be renewed: %s", error)


async def _take_up(tls: Tls, roster: Roster) -> None:
    mark = _foreign_mark(tls.files) if tls.files is not None else tlsfolder.mark(tls.folder)
    if mark == tls.mark:
        return
    tls.mark = mark
    try:
        if tls.files is not None:
            tls.handshakes.replace(await asyncio.to_thread(_foreign, tls.files))
        else:
            material = await asyncio.to_thread(tlsfolder.read, tls.folder)
            tls.authority, tls.server_root, tls.address = material.authority, material.server_root, material.address
            roster.trust(material.authority)
            tls.handshakes.replace(Offer(material.server_key, material.server_chain, material.roots))
    except (FleetuneError, OSError) as error:
        # Caught between two of the writer's renames, or wrong for good: what was read before goes on until the next change.
        log.warning("the changed TLS files cannot be used yet: %s", error)
        return
    log.info("TLS files were changed and are taken up")


def _tell(authority: Authority, roster: Roster, fleet: FleetService, told: dict[str, int]) -> None:
    """Each session once: agents whose newest certificate came with other roots than today's should renew."""
    from fleetune.coordinator.certificates import roots_digest

    digest = roots_digest(authority.roots_pem)
    for device_id, line in fleet.lines.items():
        newest = roster.newest_of_device(device_id)
        if newest is not None and newest.roots != digest and told.get(device_id) != line.session.session_id:
            told[device_id] = line.session.session_id
            fleet.ask_to_renew(device_id)
    for device_id in told.keys() - fleet.lines.keys():
        del told[device_id]


def _foreign(files: TlsFiles) -> Offer:
    from fleetune.coordinator import authority

    parts: list[bytes] = []
    for path in (files.key, files.certificate, files.roots):
        try:
            parts.append(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Correct the settings tls.* or the file's rights.") from error
    if files.key.stat().st_mode & 0o077:
        raise ConfigError(f"{files.key} can be read by others (mode {files.key.stat().st_mode & 0o777:04o}).", f"chmod 600 {files.key}")
    key, certificate, roots = parts
    authority.certificates(roots)
    if not authority.fits(key, certificate):
        raise ConfigError(f"{files.certificate} is not the certificate of {files.key}.", "Put its own certificate first in the file.")
    return Offer(key, certificate, roots)


def _foreign_mark(files: TlsFiles) -> str:
    found = hashlib.sha256()
    for path in (files.key, files.certificate, files.roots):
        try:
            status = path.stat()
        except OSError:
            continue
        found.update(f"{path} {status.st_mtime_ns} {status.st_ino} {status.st_size}".encode())
    return found.hexdigest()


def check(config: CoordinatorConfig) -> None:
    """What can be said before anything is opened. Raises ConfigError where nobody could come in safely."""
    if config.plaintext and not channel.is_loopback(config.listen.rpartition(":")[0]):
        raise ConfigError(
            f"listen = {config.listen!r} can be reached from other machines, and plaintext encrypts and authenticates nothing.",
            "Listen on 127.0.0.1, or leave plaintext out: `fleetune init` makes what TLS needs.",
        )
    if not config.plaintext and config.tls is None:
        _check_folder(config.state_dir)


def _check_folder(state_dir: Path) -> None:
    folder = tlsfolder.of(state_dir)
    missing = tlsfolder.missing(state_dir)
    if len(missing) == len(tlsfolder.REQUIRED):
        raise ConfigError(
            f"this coordinator has no certificate yet: {folder} is not there.",
            "`fleetune init` makes an authority of its own and your operator's identity; --plaintext goes without, on loopback only.",
        )
    if missing:
        raise ConfigError(
            f"{folder} lacks {', '.join(missing)}.", "Restore the folder from a backup, or move it away and run `fleetune init` again."
        )

"""How the coordinator lets in: from which files its TLS comes, when they are read again, and what join lines tell."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.coordinator import tlsfolder
from fleetune.coordinator.config import CoordinatorConfig, TlsFiles, is_wildcard
from fleetune.coordinator.faults import FolderInUseError
from fleetune.coordinator.handshakes import Handshakes, Offer
from fleetune.errors import ConfigError, FleetuneError
from fleetune.waiting import happened
from fleetune.wire import channel

if TYPE_CHECKING:
    from fleetune.coordinator.authority import Authority
    from fleetune.coordinator.certificates import Roster
    from fleetune.coordinator.rpc.fleet import FleetService

log = logging.getLogger("fleetune.tls")

SLEEP_S_MAX = 3600.0
"""Of the wait until the server's certificate is to be renewed: the wall clock, by which that is due, may be set meanwhile."""

WRITER_S = 5.0
"""How long a reload waits for whoever is changing the folder at that moment."""

MEND_AGAIN_S = 600.0
"""After a renewal that failed, on a full disk for example."""


@dataclass(frozen=True)
class Shown:
    """What the files hold, read and found to fit together."""

    offer: Offer
    authority: Authority | None = field(compare=False)
    """None: another authority made the certificates."""
    signing_root: str = ""
    """Hex SHA-256 of the root that it signs with."""
    server_root: str = ""
    """Hex SHA-256 of the root that the server's certificate comes from."""
    address: str = ""
    """As `fleetune init` was told."""
    renew_unix_s: float = float("inf")
    """When the server's certificate is to be renewed; never where another authority made it."""


class Tls:
    """What the coordinator shows, and whom it takes.

    The files are looked at when a handshake begins (a `stat` of each), and read where one has changed: that connection gets the new
    ones already. Nothing looks in between, except on a signal and when this process has written them.
    """

    def __init__(self, read: Callable[[float], Shown], mark: Callable[[], object]) -> None:
        """Both come from any thread, and `mark` changes whenever a file does.

        `read` waits for so many seconds for a writer to end, and raises FolderInUseError where it does not; ConfigError or OSError for
        what cannot be used.
        """
        self._read = read
        self._mark_of = mark
        self._lock = threading.Lock()
        self._on_news: Callable[[str], None] = _nobody
        # Before the files: what changes while they are read is read again.
        self._mark = mark()
        self._shown = read(WRITER_S)
        self.handshakes = Handshakes(self._shown.offer, self._look)

    @property
    def authority(self) -> Authority | None:
        return self._shown.authority

    @property
    def server_root(self) -> str:
        return self._shown.server_root

    @property
    def address(self) -> str:
        return self._shown.address

    @property
    def renew_unix_s(self) -> float:
        return self._shown.renew_unix_s

    def on_news(self, hear: Callable[[str], None]) -> None:
        """`hear` is told of each change: an empty text, or why it cannot be used. On whatever thread took it up, so it must not log."""
        self._on_news = hear

    def take_up(self) -> bool:
        """Read the files again, changed or not; False where they cannot be used, and what was read before goes on. Blocks on the disk."""
        with self._lock:
            return self._read_again(self._mark_of(), WRITER_S)

    def _look(self) -> None:
        # A handshake that comes while another one reads, or while somebody writes, goes on with what is known: it waits for nobody.
        if not self._lock.acquire(blocking=False):
            return
        try:
            mark = self._mark_of()
            if mark != self._mark:
                self._read_again(mark, 0.0)
        finally:
            self._lock.release()

    def _read_again(self, mark: object, patience_s: float) -> bool:
        try:
            shown = self._read(patience_s)
        except FolderInUseError as error:
            # In the middle of the writing. The mark stays, so that the next handshake looks once more.
            if patience_s:
                self._on_news(str(error))
            return False
        except (FleetuneError, OSError, ValueError) as error:
            # Wrong for good, or half of what another authority's tools write: what was read before goes on until the next change.
            self._mark = mark
            self._on_news(str(error))
            return False
        self._mark = mark
        if shown != self._shown:
            self._shown = shown
            self.handshakes.replace(shown.offer)
            self._on_news("")
        return True


def open_tls(config: CoordinatorConfig, now_unix_s: float) -> Tls | None:
    """The TLS that the settings ask for; None for plaintext. Raises ConfigError where files are missing, damaged or open to others."""
    if config.plaintext:
        return None
    if config.tls is not None:
        files = config.tls
        return Tls(lambda _: Shown(_foreign(files), None), lambda: _mark((files.key, files.certificate, files.roots)))
    _check_folder(config.state_dir)
    folder = tlsfolder.of(config.state_dir)
    if tlsfolder.mend(folder, now_unix_s):
        log.warning("the coordinator's certificate was renewed")
    return Tls(lambda patience_s: _own(folder, patience_s), lambda: _mark([folder / name for name in tlsfolder.REQUIRED]))


class Follower:
    """Lets what has changed reach those who are there already, and renews the server's certificate in time."""

    def __init__(self, tls: Tls, folder: Path, roster: Roster, fleet: FleetService) -> None:
        self._tls = tls
        self._folder = folder
        self._roster = roster
        self._fleet = fleet
        self._changed = asyncio.Event()
        self._reload = False

    def reload(self) -> None:
        """Somebody says that the files were changed. On the event loop."""
        self._reload = True
        self._changed.set()

    def _hear(self, news: str) -> None:
        if news:
            log.warning("the changed TLS files cannot be used yet, the former go on: %s", news)
        else:
            log.info("TLS files were changed and are taken up")
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()

        def hear(news: str) -> None:
            with contextlib.suppress(RuntimeError):  # a last handshake, and the loop has ended
                loop.call_soon_threadsafe(self._hear, news)

        self._tls.on_news(hear)
        again_s = 0.0
        try:
            while True:
                wait_s = max(self._tls.renew_unix_s - time.time(), again_s, 0.0)
                if await happened(self._changed, min(wait_s, SLEEP_S_MAX)):
                    self._changed.clear()
                    if self._reload:
                        self._reload = False
                        if await asyncio.to_thread(self._tls.take_up):
                            log.info("reloaded: the TLS files were read again")
                        continue  # what has changed is news, which wakes this again
                    self._spread()
                elif time.time() >= self._tls.renew_unix_s:
                    again_s = 0.0 if await self._mend() else MEND_AGAIN_S
        finally:
            self._tls.on_news(_nobody)

    def _spread(self) -> None:
        """Sign with the present authority, and let devices renew that know another one."""
        authority = self._tls.authority
        if authority is None:
            return
        self._roster.trust(authority)
        for device_id in [device_id for device_id in self._fleet.lines if is_behind(self._roster, device_id)]:
            self._fleet.ask_to_renew(device_id)

    async def _mend(self) -> bool:
        try:
            if await asyncio.to_thread(tlsfolder.mend, self._folder, time.time()):
                log.warning("the coordinator's certificate was renewed")
        except (FleetuneError, OSError) as error:
            log.error("the coordinator's certificate could not be renewed: %s", error)
            return False
        return await asyncio.to_thread(self._tls.take_up)


def is_behind(roster: Roster, device_id: str) -> bool:
    """Whether the device's newest certificate came with other roots than those of today, so that it should renew."""
    from fleetune.coordinator.certificates import roots_digest

    newest, authority = roster.newest_of_device(device_id), roster.authority
    return newest is not None and authority is not None and newest.roots != roots_digest(authority.roots_pem)


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


def _own(folder: Path, patience_s: float) -> Shown:
    material = tlsfolder.read_whole(folder, patience_s)
    offer = Offer(material.server_key, material.server_chain, material.roots)
    return Shown(
        offer=offer,
        authority=material.authority,
        signing_root=material.authority.fingerprint,
        server_root=material.server_root,
        address=material.address,
        renew_unix_s=tlsfolder.renew_unix_s(material.server_chain),
    )


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


def _mark(paths: Sequence[Path]) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever a file does. A few microseconds: it is asked for at every handshake."""
    found: list[tuple[int, int, int]] = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((status.st_mtime_ns, status.st_ino, status.st_size))
    return tuple(found)


def _nobody(_news: str) -> None:
    return


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

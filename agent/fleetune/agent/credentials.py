"""This agent's certificate while the daemon runs: renewed by itself, or replaced by a person who joined again."""

from __future__ import annotations

import logging
from pathlib import Path

from fleetune.errors import ConfigError
from fleetune.wire import identity
from fleetune.wire.identity import Identity

LOG = logging.getLogger(__name__)

IDENTITY_FOLDER = "identity"


def folder_of(state_dir: Path) -> Path:
    """Where an agent's identity lies."""
    return state_dir / IDENTITY_FOLDER


class Credentials:
    """The identity in use and the folder it lies in. `identity` None: plaintext, on this machine."""

    def __init__(self, folder: Path, present: Identity | None, coordinator: str = "") -> None:
        """`coordinator` is the address that a setting names; empty: the identity's own."""
        self._folder = folder
        self._identity = present
        self._coordinator = coordinator
        self._stamp = self._look() if present is not None else None

    @property
    def identity(self) -> Identity | None:
        return self._identity

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def address(self) -> str:
        """HOST:PORT to dial."""
        if self._coordinator or self._identity is None:
            return self._coordinator
        return self._identity.facts.coordinator

    def trouble(self) -> str:
        """Why the coordinator would refuse the certificate by its dates, or an empty string."""
        return identity.trouble(self._identity.facts) if self._identity is not None else ""

    def store(self, renewed: Identity) -> None:
        """Put it in place and use it. Raises OSError, and then the old one stays in use."""
        identity.store(self._folder, renewed)
        self._identity = renewed
        self._stamp = self._look()

    def reread(self) -> bool:
        """True where somebody has put another identity there since, as `fleetune-agent join --again` does; it is used from now on."""
        stamp = self._look()
        if self._identity is None or stamp is None or stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            found = identity.load(self._folder)
        except ConfigError as error:
            LOG.warning("a new identity cannot be used cause=%r", str(error))
            return False
        if found is None or found.facts.kind != "agent":
            return False
        if found.facts.name != self._identity.facts.name:
            LOG.warning("a new identity is for another name=%s: restart the agent to use it", found.facts.name)
            return False
        self._identity = found
        LOG.info("a new identity is used name=%s", found.facts.name)
        return True

    def _look(self) -> tuple[int, int] | None:
        """What tells one file of facts from the next: each is put in place by a rename."""
        try:
            found = (self._folder / identity.FACTS_FILE).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

"""`fleetune ca rotate`: replaces the fleet's root on the coordinator's machine, and tells who has not followed yet."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from fleetune.coordinator import statelock, tlsfolder
from fleetune.coordinator.faults import MachineError, RefusedError
from fleetune.coordinator.store import copies
from fleetune.errors import ConfigError

_NEWEST = """
SELECT kind, name, authority FROM certificates
WHERE revoked_unix_s = 0 AND not_after_unix_s > ? ORDER BY issued_unix_s
"""


@dataclass(frozen=True)
class Rotated:
    root_fingerprint: str
    """Hex SHA-256 of the DER of the root that signs now."""
    behind: tuple[str, ...]
    """Whose certificates are all from another root, as "agent NAME" or "operator NAME"."""
    told: bool
    """Whether a running coordinator was told to take it up; without that it does so when somebody connects next."""


def begin(state_dir: Path) -> Rotated:
    """First step. ConfigError for no authority, FolderInUseError for a rotation that is under way."""
    folder = _folder(state_dir)
    _behind(state_dir, "")  # a database that cannot be asked later is better known now
    material = tlsfolder.rotate(folder, time.time())
    _note(state_dir, "ca rotate", material.authority.fingerprint, "")
    # Before anybody is told: devices that are connected renew within moments.
    behind = _behind(state_dir, material.authority.fingerprint)
    return Rotated(material.authority.fingerprint, behind, _tell(state_dir))


def finish(state_dir: Path, *, force: bool) -> Rotated:
    """Second step. RefusedError where somebody would be shut out and `force` was not said; ConfigError where there was no first."""
    folder = _folder(state_dir)
    behind = _behind(state_dir, tlsfolder.read(folder).authority.fingerprint)
    if behind and not force:
        raise RefusedError(
            f"{len(behind)} have not renewed since the new root was made, and would be shut out: {', '.join(behind)}.",
            "Devices renew while they are connected, operators with `fleetune operators renew`. --force shuts out who has not.",
        )
    material = tlsfolder.finish(folder, time.time())
    _note(state_dir, "ca rotate --finish", material.authority.fingerprint, f"shut out: {', '.join(behind)}" if behind else "")
    return Rotated(material.authority.fingerprint, behind, _tell(state_dir))


def _folder(state_dir: Path) -> Path:
    missing = tlsfolder.missing(state_dir)
    if missing:
        raise ConfigError(
            f"{tlsfolder.of(state_dir)} lacks {', '.join(missing)}.",
            "Name the coordinator's folder with --state-dir; `fleetune init` makes one.",
        )
    return tlsfolder.of(state_dir)


def _tell(state_dir: Path) -> bool:
    """Let the coordinator of this folder read its TLS files again, where one runs that may be signalled."""
    owner = statelock.reloading_owner(state_dir)
    if owner is None:
        return False
    try:
        os.kill(owner, signal.SIGHUP)
    except OSError:  # another user's, or it has ended since
        return False
    return True


def _note(state_dir: Path, action: str, root: str, detail: str) -> None:
    """For the audit log. What was done is done: a database that is busy or full does not undo it."""
    values = (time.time(), f"user {os.getuid()} of this machine", action, f"root {root[:16]}", "done", detail)
    with contextlib.suppress(sqlite3.Error), contextlib.closing(copies.connect(state_dir / "coordinator.sqlite")) as connection, connection:
        connection.execute("INSERT INTO audit (unix_s, actor, action, subject, outcome, detail) VALUES (?, ?, ?, ?, ?, ?)", values)


def _behind(state_dir: Path, root: str) -> tuple[str, ...]:
    database = state_dir / "coordinator.sqlite"
    try:
        with contextlib.closing(copies.connect(database)) as connection:
            rows = connection.execute(_NEWEST, (time.time(),)).fetchall()
    except sqlite3.Error as error:
        raise MachineError(f"the database {database} cannot be asked who has renewed ({error}).", "Start the coordinator once.") from error
    followed = {(kind, name) for kind, name, authority in rows if authority == root}
    return tuple(sorted(f"{kind} {name}" for kind, name in {(kind, name) for kind, name, _ in rows} - followed))

"""Copies of the whole database file, consistent also while somebody writes it."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import uuid
from pathlib import Path

from fleetune.errors import DiskFullError

COPIES_KEPT = 2
"""Copies from before an upgrade that stay beside the database."""

SUFFIX = ".backup"
BUSY_TIMEOUT_S = 5.0


def copy(source: Path, target: Path) -> None:
    """Write the last committed state of `source` to `target`: whole and on disk, or not there. Replaces what is there.

    Raises sqlite3.Error for a source that cannot be read, DiskFullError, OSError.
    """
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        # mode=rw: a reader of a database in WAL mode writes beside it, and must not make one that is not there.
        with contextlib.closing(connect(source)) as reading, contextlib.closing(sqlite3.connect(aside)) as writing:
            reading.backup(writing)
            # One file without company: what reads it may lie on another disk, and must not miss a log beside it.
            writing.execute("PRAGMA journal_mode=DELETE")
        aside.chmod(0o600)
        sync(aside)
        os.replace(aside, target)
        sync(target.parent)
    except (sqlite3.Error, OSError) as error:
        if is_full(error):
            raise DiskFullError(f"No space left in {target.parent} for a copy of the database {source}.", "Make room there.") from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def connect(path: Path) -> sqlite3.Connection:
    """A connection to a database that exists; sqlite3.OperationalError where there is none."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S)


def before_upgrade(database: Path, revision: str) -> Path:
    """Copy the database beside itself under the name of its `revision`; the oldest copies go. Returns the copy."""
    target = database.with_name(f"{database.name}.{revision}{SUFFIX}")
    copy(database, target)
    for old in sorted(database.parent.glob(f"{database.name}.*{SUFFIX}"))[:-COPIES_KEPT]:
        old.unlink()
    return target


def sync(path: Path) -> None:
    """Make a file or a folder's names durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, sqlite3.Error) and "database or disk is full" in str(error)

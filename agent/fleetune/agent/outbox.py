"""The outbox: results that wait for their receipt, in SQLite beside the update files, so that kill -9 loses none.

An update's row is committed before its first byte is sent. `synchronous=NORMAL` and no fsync of the file are enough for that:
what the kernel has taken survives the death of the process. A power cut may lose the newest rows or tear a file; both are
harmless, since a missing row means that the coordinator hands the task out again, and a torn file is found by its digest at
start. A disk flush per round on an SD card would cost more than all of the rest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from fleetune.agent.domain import Blob, Evaluated, Failed, FailureKind, Measured, Refused, Result, Update
from fleetune.errors import ConfigError
from fleetune.wire import digests

LOG = logging.getLogger(__name__)

SCHEMA_VERSION = 1
DATABASE_NAME = "outbox.sqlite"
UPDATE_SUFFIX = ".safetensors"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    task_id    TEXT PRIMARY KEY,
    lease      INTEGER NOT NULL,
    epoch      INTEGER NOT NULL,
    kind       TEXT NOT NULL,
    digest     TEXT NOT NULL DEFAULT '',
    size_bytes INTEGER NOT NULL DEFAULT 0,
    file_name  TEXT NOT NULL DEFAULT '',
    body       BLOB NOT NULL
)
"""

_RATES_SCHEMA = """
CREATE TABLE IF NOT EXISTS rates (
    task_id    TEXT PRIMARY KEY,
    bits_per_s REAL NOT NULL
)
"""
"""Of updates that are held to one. A table of its own, which an older agent does not mind."""


@dataclass(frozen=True)
class Recovery:
    """What an outbox held at start: results to send, and updates whose file is no longer what was recorded."""

    results: tuple[Result, ...]
    damaged: tuple[Update, ...]


class Outbox:
    """Rows and update files. Synchronous, for one thread at a time; the only writer of its folder.

    The training child writes an update to `path_for(...)`, and only `put` makes it count.
    """

    def __init__(self, folder: Path, database: str | None = None) -> None:
        """Open or create; ConfigError for an outbox of a newer agent. A database that SQLite cannot read is set aside."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._database = database or str(folder / DATABASE_NAME)
        try:
            self._connection = _open(self._database)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) or self._database == ":memory:":
                raise ConfigError(
                    f"The outbox {self._database} cannot be opened: {error}.", "Check the rights and the space there."
                ) from error
            aside = f"{self._database}.damaged"
            LOG.error("outbox is damaged, set aside path=%s cause=%s; its results are lost, the coordinator will ask again", aside, error)
            _set_aside(self._database, aside)
            self._connection = _open(self._database)

    def path_for(self, task_id: str, lease: int, epoch: int) -> Path:
        """Where the child writes the update of this task and lease, which another epoch may have, too."""
        name = digests.of_bytes(f"{task_id}\0{lease}\0{epoch}".encode())[:32]
        return self.folder / (name + UPDATE_SUFFIX)

    def path_of(self, update: Update) -> Path:
        return self.folder / update.file_name

    def put(self, result: Result) -> None:
        """Record a result; one of the same task replaces the earlier one. Survives the death of the process on return."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO results (task_id, lease, epoch, kind, digest, size_bytes, file_name, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (task_id) DO UPDATE SET lease = excluded.lease, epoch = excluded.epoch, kind = excluded.kind, "
                "digest = excluded.digest, size_bytes = excluded.size_bytes, file_name = excluded.file_name, body = excluded.body",
                _row(result),
            )
            connection.execute("DELETE FROM rates WHERE task_id = ?", (result.task_id,))
            if isinstance(result, Update) and result.uplink_bits_per_s > 0:
                connection.execute("INSERT INTO rates (task_id, bits_per_s) VALUES (?, ?)", (result.task_id, result.uplink_bits_per_s))

    def delete(self, result: Result) -> None:
        """Forget a result, first its row and then its file. Nothing happens where it is gone already, or another took its place."""
        with self._transaction() as connection:
            own = (result.task_id, result.epoch, result.lease)
            connection.execute("DELETE FROM results WHERE task_id = ? AND epoch = ? AND lease <= ?", own)
            # Also those of an older agent's deletions, which knows nothing of rates.
            connection.execute("DELETE FROM rates WHERE task_id NOT IN (SELECT task_id FROM results)")
        if isinstance(result, Update):
            self.path_of(result).unlink(missing_ok=True)

    def results(self) -> tuple[Result, ...]:
        """All rows, oldest first."""
        rows = self._connection.execute(
            "SELECT task_id, lease, epoch, kind, digest, size_bytes, file_name, body, bits_per_s "
            "FROM results LEFT JOIN rates USING (task_id) ORDER BY results.rowid"
        )
        return tuple(_result(*row) for row in rows)

    def recover(self) -> Recovery:
        """Check all files against their rows and remove files without a row. Reads every update once."""
        whole: list[Result] = []
        damaged: list[Update] = []
        for result in self.results():
            if isinstance(result, Update) and not _is_whole(self.path_of(result), result.blob):
                damaged.append(result)
            else:
                whole.append(result)
        named = {result.file_name for result in whole if isinstance(result, Update)}
        for path in self.folder.iterdir():
            if path.is_file() and UPDATE_SUFFIX in path.name and path.name not in named:
                path.unlink(missing_ok=True)
        return Recovery(tuple(whole), tuple(damaged))

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection, None, None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _open(database: str) -> sqlite3.Connection:
    # Used by one thread at a time, not always by the same one.
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"The outbox {database} has layout {version}, this agent knows up to {SCHEMA_VERSION}.",
                "Use the newer agent, or empty the state folder.",
            )
        connection.execute(_SCHEMA)
        connection.execute(_RATES_SCHEMA)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("SELECT count(*) FROM results").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _set_aside(database: str, aside: str) -> None:
    os.replace(database, aside)
    for suffix in ("-wal", "-shm"):
        Path(database + suffix).unlink(missing_ok=True)


def _is_whole(path: Path, blob: Blob) -> bool:
    try:
        return path.stat().st_size == blob.size_bytes and digests.of_file(path) == blob.digest
    except OSError as error:
        LOG.warning("update file cannot be read path=%s cause=%s", path, error)
        return False


def _row(result: Result) -> tuple[str, int, int, str, str, int, str, bytes]:
    if isinstance(result, Update):
        blob = result.blob
        return (result.task_id, result.lease, result.epoch, "update", blob.digest, blob.size_bytes, result.file_name, result.report)
    if isinstance(result, Evaluated):
        return (result.task_id, result.lease, result.epoch, "evaluated", "", 0, "", result.evaluation)
    if isinstance(result, Measured):
        return (result.task_id, result.lease, result.epoch, "measured", "", 0, "", result.figures)
    if isinstance(result, Refused):
        return (result.task_id, result.lease, result.epoch, "refused", "", 0, "", result.reason.encode())
    told = {"kind": result.kind.value, "stage": result.stage, "message": result.message, "traceback": result.traceback}
    return (result.task_id, result.lease, result.epoch, "failed", "", 0, "", json.dumps(told).encode())


def _result(
    task_id: str, lease: int, epoch: int, kind: str, digest: str, size_bytes: int, file_name: str, body: bytes, bits_per_s: float | None
) -> Result:
    if kind == "update":
        return Update(task_id, lease, epoch, Blob(digest, size_bytes), file_name, body, bits_per_s or 0.0)
    if kind == "evaluated":
        return Evaluated(task_id, lease, epoch, body)
    if kind == "measured":
        return Measured(task_id, lease, epoch, body)
    if kind == "refused":
        return Refused(task_id, lease, epoch, body.decode())
    told = json.loads(body)
    return Failed(task_id, lease, epoch, FailureKind(told["kind"]), told["stage"], told["message"], told["traceback"])

"""The database: one writer thread with one connection, readers beside it, every commit durable before it is answered."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select, update
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from fleetune.coordinator.store import copies, migrations, schema
from fleetune.errors import ConfigError, DurabilityError
from fleetune.workers import Workers

log = logging.getLogger("fleetune.store")

T = TypeVar("T")

BUSY_TIMEOUT_MS = 5000

_LOOK = "Look at the disk's health, then start again: what was acknowledged before is there."


class Database:
    """SQLite through SQLAlchemy Core. All writes go through `write`, one transaction each; grouping is the caller's."""

    def __init__(self, path: Path | None) -> None:
        """`path` None keeps everything in memory (tests)."""
        self._path = path
        self._writer = Workers("db-writer")
        # An in-memory database is one connection: its readers take turns with the writer.
        self._reader = Workers("db-reader") if path else self._writer
        self._engine = _engine(path)
        self.on_broken: Callable[[DurabilityError], None] = _ignore
        """Hears of a write that the disk did not take for another reason than want of room, whoever asked for it and whatever that one
        makes of the error: nothing is known of the file from then on."""

    async def open(self) -> None:
        """Create what is missing, upgrade what is older after copying it aside.

        Raises ConfigError for a file that is no database or is newer than this program, DiskFullError where the copy has no room,
        DurabilityError where the folder cannot be flushed.
        """
        try:
            await self._writer.run(_prepare, self._engine, self._path)
            await self._writer.run(_flush_folder, self._engine, self._path)
        except (DatabaseError, sqlite3.DatabaseError) as error:  # the driver's own where the very first statement fails
            reason = error.orig if isinstance(error, DatabaseError) else error
            raise ConfigError(
                f"the database {self._path} cannot be used ({reason}).", "Restore it from a backup or name another state_dir."
            ) from error

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Run `change` in one transaction on the writer thread; returns once it is on disk. Rolled back where it raises."""

        def run() -> T:
            with self._engine.begin() as tx:
                return change(tx)

        try:
            return await self._writer.run(run)
        except DatabaseError as error:
            if _is_broken(error):
                self.on_broken(DurabilityError(f"The database {self._path} does not take what is written: {error.orig}.", _LOOK))
            raise

    async def try_write(self, change: Callable[[Connection], object]) -> bool:
        """As `write`, for what may be missing: False where the disk is full."""
        try:
            await self.write(change)
        except OperationalError as error:
            if not isinstance(error.orig, sqlite3.Error) or not copies.is_full(error.orig):
                raise
            return False
        return True

    async def read(self, question: Callable[[Connection], T]) -> T:
        """Run `question` beside the writer, on the last committed state."""

        def run() -> T:
            with self._engine.connect() as connection:
                return question(connection)

        return await self._reader.run(run)

    async def close(self) -> None:
        await self._writer.run(self._engine.dispose)
        self._writer.close()
        self._reader.close()


def _is_broken(error: DatabaseError) -> bool:
    """Whether the disk failed: a read or a write that the system did not do, or a file that is no database any more."""
    told = str(error.orig)
    return isinstance(error.orig, sqlite3.Error) and ("disk I/O error" in told or "malformed" in told or "file is not a database" in told)


def _ignore(error: DurabilityError) -> None:
    return


def _engine(path: Path | None) -> Engine:
    if path is None:
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _set_pragmas(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        # FULL: a commit that was answered survives a power cut; NORMAL loses some (docs/decisions/0002-commit-then-send.md).
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    return engine


def _prepare(engine: Engine, path: Path | None) -> None:
    with engine.connect() as connection:
        found = _found(connection, path)
    if found is None:
        with _exclusive(engine) as tx:
            _create(tx)
    elif found > schema.SCHEMA_VERSION:
        raise ConfigError(
            f"the database {path} has schema version {found}, this program knows up to {schema.SCHEMA_VERSION}.",
            "Install the newer program again, or restore the backup made before the upgrade.",
        )
    elif found < schema.SCHEMA_VERSION:
        assert path is not None
        kept = copies.before_upgrade(path, revision_of(found))
        with _exclusive(engine) as tx:
            _upgrade(tx, found)
        log.warning("database upgraded from schema version %d to %d, the one before is kept as %s", found, schema.SCHEMA_VERSION, kept)


def _flush_folder(engine: Engine, path: Path | None) -> None:
    """Make it durable that there is a log. SQLite flushes the folder, too, as it begins the log, but tells nobody where that fails."""
    if path is None:
        return
    with engine.begin() as tx:
        tx.execute(update(schema.meta).where(schema.meta.c.key == "schema_version").values(value=schema.meta.c.value))
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise DurabilityError(f"The folder {path.parent} does not take what is written: {error.strerror}.", _LOOK) from error
    finally:
        os.close(descriptor)


def _found(connection: Connection, path: Path | None) -> int | None:
    """The schema version of the tables that are there; None for an empty database."""
    tables = set(inspect(connection).get_table_names())
    if schema.meta.name not in tables:
        if tables:
            raise ConfigError(f"{path} is a database of another program.", "Name another state_dir.")
        return None
    if schema.revision.name in tables and (revision := connection.execute(select(schema.revision.c.version_num)).scalar()):
        return int(revision)
    # From before the revisions, when the version stood here alone.
    version = connection.execute(select(schema.meta.c.value).where(schema.meta.c.key == "schema_version")).scalar()
    return int(version) if version is not None else None


def _create(tx: Connection) -> None:
    schema.metadata.create_all(tx)
    tx.execute(insert(schema.revision).values(version_num=revision_of(schema.SCHEMA_VERSION)))
    tx.execute(insert(schema.meta).values(key="schema_version", value=str(schema.SCHEMA_VERSION)))
    tx.execute(insert(schema.meta).values(key="epoch", value="1"))


def _upgrade(tx: Connection, found: int) -> None:
    if schema.revision.name not in inspect(tx).get_table_names():
        schema.revision.create(tx)
        tx.execute(insert(schema.revision).values(version_num=revision_of(found)))
    migrations.upgrade(tx)
    # For a program from before the revisions: it refuses by this number what it does not know.
    tx.execute(update(schema.meta).where(schema.meta.c.key == "schema_version").values(value=str(schema.SCHEMA_VERSION)))


@contextlib.contextmanager
def _exclusive(engine: Engine) -> Generator[Connection, None, None]:
    """One transaction that holds tables, too: Python's driver begins one by itself only before it changes rows."""
    with engine.begin() as tx:
        tx.exec_driver_sql("BEGIN IMMEDIATE")
        yield tx


def revision_of(version: int) -> str:
    """2 -> "0002", as the revisions are named."""
    return f"{version:04d}"

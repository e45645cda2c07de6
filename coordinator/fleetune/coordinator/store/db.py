"""The database: one writer thread with one connection, readers beside it, every commit durable before it is answered."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from fleetune.coordinator.store import schema
from fleetune.errors import ConfigError
from fleetune.workers import Workers

T = TypeVar("T")

BUSY_TIMEOUT_MS = 5000


class Database:
    """SQLite through SQLAlchemy Core. All writes go through `write`, one transaction each; grouping is the caller's."""

    def __init__(self, path: Path | None) -> None:
        """`path` None keeps everything in memory (tests)."""
        self._path = path
        self._writer = Workers("db-writer")
        # An in-memory database is one connection: its readers take turns with the writer.
        self._reader = Workers("db-reader") if path else self._writer
        self._engine = _engine(path)

    async def open(self) -> None:
        """Create what is missing. Raises ConfigError for a file that is no database or is newer than this program."""
        try:
            await self.write(lambda tx: _prepare(tx, self._path))
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

        return await self._writer.run(run)

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


def _prepare(tx: Connection, path: Path | None) -> None:
    found: str | None = None
    tables = set(inspect(tx).get_table_names())
    if schema.meta.name in tables:
        found = tx.execute(select(schema.meta.c.value).where(schema.meta.c.key == "schema_version")).scalar()
    elif tables:
        raise ConfigError(f"{path} is a database of another program.", "Name another state_dir.")
    if found is None:
        schema.metadata.create_all(tx)
        tx.execute(insert(schema.meta).values(key="schema_version", value=str(schema.SCHEMA_VERSION)))
        tx.execute(insert(schema.meta).values(key="epoch", value="1"))
    elif int(found) > schema.SCHEMA_VERSION:
        raise ConfigError(
            f"the database {path} has schema version {found}, this program knows up to {schema.SCHEMA_VERSION}.",
            "Install the newer program again, or restore the backup made before the upgrade.",
        )

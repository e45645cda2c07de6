"""The database file: opened, refused, read beside the writer."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError

from fleetune.coordinator.store import schema
from fleetune.coordinator.store.db import Database
from fleetune.errors import ConfigError, DurabilityError


@pytest.fixture(params=["memory", "file"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(tmp_path / "state" / "c.sqlite" if request.param == "file" else None)
    await opened.open()
    yield opened
    await opened.close()


async def refused(path: Path) -> str:
    database = Database(path)
    try:
        with pytest.raises(ConfigError) as caught:
            await database.open()
    finally:
        await database.close()
    return str(caught.value)


async def test_a_new_database_has_a_version_and_an_epoch(database: Database) -> None:
    rows = await database.read(lambda c: {row.key: row.value for row in c.execute(select(schema.meta))})
    assert rows == {"schema_version": str(schema.SCHEMA_VERSION), "epoch": "1"}


async def test_opening_twice_keeps_what_is_there(tmp_path: Path) -> None:
    for value in ("1", "7"):
        database = Database(tmp_path / "c.sqlite")
        await database.open()
        found = await database.read(lambda c: c.execute(select(schema.meta.c.value).where(schema.meta.c.key == "epoch")).scalar())
        assert found == value
        await database.write(lambda tx: tx.execute(update(schema.meta).where(schema.meta.c.key == "epoch").values(value="7")))
        await database.close()


async def test_a_change_that_raises_leaves_nothing(database: Database) -> None:
    def change(tx: object) -> None:
        tx.execute(insert(schema.meta).values(key="x", value="1"))  # type: ignore[attr-defined]
        tx.execute(insert(schema.meta).values(key="x", value="2"))  # type: ignore[attr-defined]

    with pytest.raises(IntegrityError):
        await database.write(change)
    assert await database.read(lambda c: c.execute(select(schema.meta.c.value).where(schema.meta.c.key == "x")).scalar()) is None


async def test_every_commit_is_flushed_to_the_disk(database: Database) -> None:
    assert await database.write(lambda tx: tx.execute(text("PRAGMA synchronous")).scalar()) == 2
    assert await database.read(lambda c: c.execute(text("PRAGMA foreign_keys")).scalar()) == 1


async def test_a_reader_sees_the_last_commit_while_a_writer_writes(tmp_path: Path) -> None:
    database = Database(tmp_path / "c.sqlite")
    await database.open()
    loop = asyncio.get_running_loop()
    inside, go_on = asyncio.Event(), asyncio.Event()

    def change(tx: object) -> None:
        tx.execute(insert(schema.meta).values(key="x", value="1"))  # type: ignore[attr-defined]
        loop.call_soon_threadsafe(inside.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()

    writing = asyncio.create_task(database.write(change))
    await inside.wait()
    question = select(schema.meta.c.value).where(schema.meta.c.key == "x")
    assert await database.read(lambda c: c.execute(question).scalar()) is None
    go_on.set()
    await writing
    assert await database.read(lambda c: c.execute(question).scalar()) == "1"
    await database.close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)")
        raw.execute("INSERT INTO meta VALUES ('schema_version', '999')")
    raw.close()
    assert "schema version 999" in await refused(path)
    raw = sqlite3.connect(path)
    assert [name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")] == ["meta"]
    raw.close()


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"my holiday diary " * 1000)
    assert "not a database" in await refused(path)
    assert path.read_bytes().startswith(b"my holiday")


async def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE recipes (name TEXT)")
    raw.close()
    assert "another program" in await refused(path)
    raw = sqlite3.connect(path)
    assert [name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")] == ["recipes"]
    raw.close()


async def test_a_place_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").mkdir()
    assert "unable to open" in await refused(tmp_path / "c.sqlite")


async def test_a_full_database_is_an_operational_error_and_recovers(tmp_path: Path) -> None:
    database = Database(tmp_path / "c.sqlite")
    await database.open()
    pages = await database.write(lambda tx: tx.execute(text("PRAGMA page_count")).scalar())
    await database.write(lambda tx: tx.execute(text(f"PRAGMA max_page_count = {pages}")))
    with pytest.raises(OperationalError, match="full"):
        await database.write(lambda tx: tx.execute(insert(schema.meta).values(key="big", value="x" * 100_000)))
    await database.write(lambda tx: tx.execute(text("PRAGMA max_page_count = 1000000")))
    await database.write(lambda tx: tx.execute(insert(schema.meta).values(key="big", value="x" * 100_000)))
    await database.close()


async def test_a_file_that_breaks_while_it_is_open_is_told_beside_the_error_and_a_full_one_is_not(tmp_path: Path) -> None:
    database = Database(tmp_path / "c.sqlite")
    told: list[DurabilityError] = []
    database.on_broken = told.append
    await database.open()
    await database.write(lambda tx: tx.execute(text("PRAGMA wal_checkpoint(TRUNCATE)")))
    with pytest.raises(IntegrityError):
        await database.write(lambda tx: tx.execute(insert(schema.meta).values(key="epoch", value="1")))
    assert told == []
    await database.read(lambda c: c.execute(text("PRAGMA shrink_memory")))
    await database.write(lambda tx: tx.execute(text("PRAGMA shrink_memory")))  # what lies in memory hides what became of the file
    with (tmp_path / "c.sqlite").open("r+b") as file:
        file.write(bytes(1 << 16))
    with pytest.raises(DatabaseError):
        await database.write(lambda tx: tx.execute(insert(schema.meta).values(key="x", value="1")))
    assert [str(tmp_path / "c.sqlite") in str(error) for error in told] == [True]
    await database.close()

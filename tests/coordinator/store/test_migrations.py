"""Databases of earlier programs: brought up to date with a copy beside them, or left as they were."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine

from fleetune.coordinator.store import copies, migrations, schema
from fleetune.coordinator.store.db import Database, revision_of
from fleetune.errors import ConfigError

FIRST_COPY = "c.sqlite.0001.backup"
NEWEST = revision_of(schema.SCHEMA_VERSION)


def migrated(path: Path, revision: str) -> Path:
    """A database made by running the revisions alone."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as tx:
        migrations.upgrade(tx, revision)
        tx.exec_driver_sql("INSERT INTO meta VALUES ('epoch', '5')")
        tx.exec_driver_sql(f"INSERT INTO meta VALUES ('schema_version', '{int(revision)}')")
    engine.dispose()
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """From before the revisions: its version in `meta` alone, and one job."""
    path = migrated(tmp_path / "c.sqlite", "0001")
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("DROP TABLE alembic_version")
        raw.execute("INSERT INTO jobs VALUES ('echo-1', 'echo', 'submit-1', 'toml', 'completed', '{}', 1.5)")
    return path


def ask(path: Path, question: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as raw:
        return raw.execute(question).fetchall()


def layout(path: Path) -> set[tuple[object, ...]]:
    """Every table's columns and every index, whatever the words that made them."""
    found: set[tuple[object, ...]] = set()
    for (table,) in ask(path, "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"):
        found |= {(table, *column[1:]) for column in ask(path, f"PRAGMA table_info({table})")}
        found |= {(table, *key[2:]) for key in ask(path, f"PRAGMA foreign_key_list({table})")}
        for index in ask(path, f"PRAGMA index_list({table})"):
            found.add((table, index[1], index[2], *(row[2] for row in ask(path, f"PRAGMA index_info({index[1]})"))))
    return found


def copies_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.backup"))


async def opened(path: Path) -> None:
    database = Database(path)
    try:
        await database.open()
    finally:
        await database.close()


async def test_an_old_database_keeps_its_rows_and_has_its_copy_beside_it(old: Path) -> None:
    await opened(old)
    assert ask(old, "SELECT job_id, submitted_unix_s FROM jobs") == [("echo-1", 1.5)]
    assert ask(old, "SELECT value FROM meta WHERE key = 'epoch'") == [("5",)]
    assert ask(old, "SELECT version_num FROM alembic_version") == [(NEWEST,)]
    assert ask(old, "SELECT count(*) FROM audit") == [(0,)]
    before = old.with_name(FIRST_COPY)
    assert ask(before, "SELECT job_id FROM jobs") == [("echo-1",)]
    assert ask(before, "SELECT name FROM sqlite_master WHERE name IN ('audit', 'alembic_version')") == []


async def test_the_program_before_refuses_the_upgraded_database_by_its_number(old: Path) -> None:
    await opened(old)
    assert ask(old, "SELECT value FROM meta WHERE key = 'schema_version'") == [(str(schema.SCHEMA_VERSION),)]


async def test_a_new_database_has_the_newest_revision_and_no_copy(tmp_path: Path) -> None:
    await opened(tmp_path / "c.sqlite")
    assert ask(tmp_path / "c.sqlite", "SELECT version_num FROM alembic_version") == [(NEWEST,)]
    assert copies_of(tmp_path) == []


async def test_the_revisions_lead_to_the_tables_of_a_new_database(tmp_path: Path) -> None:
    await opened(tmp_path / "new.sqlite")
    assert layout(migrated(tmp_path / "migrated.sqlite", NEWEST)) == layout(tmp_path / "new.sqlite")


async def test_opening_again_copies_nothing(old: Path) -> None:
    await opened(old)
    old.with_name(FIRST_COPY).unlink()
    await opened(old)
    assert not old.with_name(FIRST_COPY).exists()


async def test_a_newer_database_is_refused_with_both_versions_and_left_alone(old: Path) -> None:
    await opened(old)
    newer = schema.SCHEMA_VERSION + 1
    with contextlib.closing(sqlite3.connect(old)) as raw, raw:
        raw.execute(f"UPDATE alembic_version SET version_num = '{revision_of(newer)}'")
    before = layout(old)
    with pytest.raises(ConfigError) as caught:
        await opened(old)
    assert f"schema version {newer}" in str(caught.value)
    assert f"up to {schema.SCHEMA_VERSION}" in str(caught.value)
    assert "Install the newer program" in caught.value.remedy
    assert layout(old) == before


async def test_an_upgrade_that_fails_leaves_the_old_database(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, upgrade = layout(old), migrations.upgrade

    def breaks(tx: Connection) -> None:
        upgrade(tx)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(migrations, "upgrade", breaks)
    with pytest.raises(RuntimeError, match="in the middle"):
        await opened(old)
    assert layout(old) == whole
    assert ask(old, "SELECT value FROM meta WHERE key = 'schema_version'") == [("1",)]
    monkeypatch.undo()
    await opened(old)
    assert ask(old, "SELECT job_id FROM jobs") == [("echo-1",)]


def test_a_process_killed_in_the_middle_of_an_upgrade_leaves_the_old_database(old: Path) -> None:
    whole = layout(old)
    script = f"""
import asyncio, os, signal
from pathlib import Path
from fleetune.coordinator.store import migrations
from fleetune.coordinator.store.db import Database
upgrade = migrations.upgrade
def killed(tx):
    upgrade(tx)
    os.kill(os.getpid(), signal.SIGKILL)
migrations.upgrade = killed
asyncio.run(Database(Path({str(old)!r})).open())
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert layout(old) == whole


def test_only_the_last_copies_are_kept(old: Path) -> None:
    for revision in ("0001", "0002", "0003"):
        copies.before_upgrade(old, revision)
    assert copies_of(old.parent) == ["c.sqlite.0002.backup", "c.sqlite.0003.backup"]


def test_a_copy_is_consistent_while_somebody_writes(old: Path, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(old)) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("INSERT INTO meta VALUES ('a', 'committed')")
        writer.commit()
        writer.execute("INSERT INTO meta VALUES ('b', 'not committed')")
        copies.copy(old, tmp_path / "copy.sqlite")
    assert ask(tmp_path / "copy.sqlite", "SELECT key FROM meta WHERE key IN ('a', 'b')") == [("a",)]

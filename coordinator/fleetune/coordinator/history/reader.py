"""Reads a coordinator's state folder for the checker, without changing it.

For a coordinator that has stopped or was killed. Beside a running one the rows are of one moment, but the files move on.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fleetune.coordinator.domain import RoundEntry
from fleetune.coordinator.history import arithmetic, check
from fleetune.coordinator.history.facts import (
    Acknowledgement,
    BlobFile,
    Happened,
    JobHistory,
    RoundFolder,
    RoundRow,
    StateFolder,
    Violation,
)
from fleetune.coordinator.rounds import adapter
from fleetune.coordinator.rounds.machine import Event
from fleetune.coordinator.store import records
from fleetune.coordinator.store.records import BlobRow, UpdateRow
from fleetune.errors import ConfigError
from fleetune.wire import digests

DATABASE = "coordinator.sqlite"

_JSON = ConfigDict(ser_json_inf_nan="constants")
_entry_json: TypeAdapter[RoundEntry | None] = TypeAdapter(RoundEntry | None, config=_JSON)
_EVENTS = cast("tuple[type[Event], ...]", get_args(Event))
_event_json: dict[str, TypeAdapter[Event]] = {kind.__name__: TypeAdapter(kind) for kind in _EVENTS}

_Digests = dict[tuple[int, int], str]
"""(device, inode) -> digest: a round's state has two names and is read once."""


def examine(state_dir: Path, acknowledgements: Path | None = None, retained: Path | None = None) -> list[Violation]:
    """Every broken rule of a state folder. Raises ConfigError for a folder or a log that is none.

    `acknowledgements` is a file of JSON lines with task_id, digest and status, `retained` a folder of blobs that the coordinator has
    cleared away, by digest. Blocks; reads every byte of every blob.
    """
    state = read(state_dir)
    told = read_acknowledgements(acknowledgements) if acknowledgements is not None else []
    return [*check.check(state, told), *arithmetic.check(state, retained)]


def read(state_dir: Path) -> StateFolder:
    """All rows, and the digests of all files. Raises ConfigError where there is no database of ours."""
    place = state_dir / DATABASE
    if not place.is_file():
        raise ConfigError(
            f"{state_dir} is no coordinator's state_dir: there is no {DATABASE}.", "Name the folder given to `serve --state-dir`."
        )
    known: _Digests = {}
    unreadable: list[Violation] = []
    try:
        connection = sqlite3.connect(f"{place.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("BEGIN")  # all questions are answered as of one commit
            jobs = list(_jobs(connection, state_dir / "jobs", known, unreadable))
            blobs = [BlobRow(*row) for row in connection.execute("SELECT digest, size_bytes, kind, job_id, unix_s FROM blobs")]
            counts = {
                row["device_id"]: row["updates_accepted"] for row in connection.execute("SELECT device_id, updates_accepted FROM devices")
            }
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"the database {place} cannot be read ({error}).", "Name a coordinator's state_dir, or restore a backup."
        ) from error
    return StateFolder(jobs, blobs, _blob_files(state_dir / "blobs", known), counts, unreadable)


def read_acknowledgements(path: Path) -> list[Acknowledgement]:
    """Receipts as devices got them. Raises ConfigError naming the line that is none; a torn last line is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    found: list[Acknowledgement] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            item = cast("dict[str, str]", json.loads(line))
            found.append(Acknowledgement(item["task_id"], item["digest"], item["status"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"line {number} of {path} is no receipt ({error}): task_id, digest and status are needed.") from error
    return found


def _jobs(connection: sqlite3.Connection, folder: Path, known: _Digests, unreadable: list[Violation]) -> Iterator[JobHistory]:
    for row in connection.execute("SELECT job_id, status, toml, machine FROM jobs ORDER BY submitted_unix_s").fetchall():
        job_id = str(row["job_id"])
        try:
            state = records.load_machine(row["machine"])
        except ValidationError as error:
            unreadable.append(Violation("row_unreadable", job_id, 0, f"the machine cannot be read: {error}"))
            continue
        yield JobHistory(
            job_id,
            row["status"],
            row["toml"],
            state,
            tuple(_rounds(connection, job_id, unreadable)),
            tuple(_updates(connection, job_id)),
            tuple(_events(connection, job_id, unreadable)),
            tuple(_folders(folder, job_id, known)),
            _links(folder / job_id),
        )


def _rounds(connection: sqlite3.Connection, job_id: str, unreadable: list[Violation]) -> Iterator[RoundRow]:
    question = "SELECT round, state_digest, state_bytes, entry FROM rounds WHERE job_id = ? ORDER BY round"
    for row in connection.execute(question, (job_id,)):
        try:
            entry = _entry_json.validate_json(row["entry"])
        except ValidationError as error:
            unreadable.append(Violation("row_unreadable", job_id, row["round"], f"the entry cannot be read: {error}"))
            continue
        assert entry is not None
        yield RoundRow(row["round"], row["state_digest"], row["state_bytes"], entry)


def _updates(connection: sqlite3.Connection, job_id: str) -> Iterator[UpdateRow]:
    question = "SELECT task_id, job_id, round, device_id, digest, status, unix_s FROM updates WHERE job_id = ? ORDER BY round, device_id"
    for row in connection.execute(question, (job_id,)):
        yield UpdateRow(*row)


def _events(connection: sqlite3.Connection, job_id: str, unreadable: list[Violation]) -> Iterator[Happened]:
    question = "SELECT sequence, unix_s, kind, body FROM events WHERE job_id = ? ORDER BY sequence"
    for row in connection.execute(question, (job_id,)):
        reader = _event_json.get(row["kind"])
        try:
            event = reader.validate_json(row["body"]) if reader is not None else None
        except ValidationError as error:
            unreadable.append(Violation("row_unreadable", job_id, 0, f"event {row['sequence']} cannot be read: {error}"))
            continue
        if event is None:
            unreadable.append(Violation("row_unreadable", job_id, 0, f"event {row['sequence']} is of the unknown kind {row['kind']}"))
            continue
        yield Happened(row["sequence"], row["unix_s"], event)


def _folders(jobs: Path, job_id: str, known: _Digests) -> Iterator[RoundFolder]:
    for number in adapter.rounds(jobs, job_id):
        place = adapter.folder(jobs, job_id, number)
        path = place / adapter.STATE_FILE
        try:
            manifest: object = json.loads((place / adapter.MANIFEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            manifest = None
        whole = cast("dict[str, object]", manifest) if isinstance(manifest, dict) else None
        if path.is_file():
            yield RoundFolder(number, path, _digest(path, known), path.stat().st_size, whole)
        else:
            yield RoundFolder(number, path, "", 0, whole)


def _links(job: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in ("best", "final"):
        link = job / name
        if link.is_symlink():
            target = os.readlink(link)
            found[name] = int(number[1]) if (number := re.fullmatch(r"rounds/([0-9]+)", target)) else 0
    return found


def _blob_files(folder: Path, known: _Digests) -> dict[str, BlobFile]:
    if not folder.is_dir():
        return {}
    return {path.name: BlobFile(path, path.stat().st_size, _digest(path, known)) for path in sorted(folder.iterdir())}


def _digest(path: Path, known: _Digests) -> str:
    found = path.stat()
    key = (found.st_dev, found.st_ino)
    if key not in known:
        known[key] = digests.of_file(path)
    return known[key]

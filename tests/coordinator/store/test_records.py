"""Rows go in and come out as they were."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from fleetune.coordinator.domain import Evaluation, Failure, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds import machine as m
from fleetune.coordinator.store import records, schema
from fleetune.coordinator.store.db import Database
from support.machines import Desk, blob


@pytest.fixture(params=["memory", "file"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(tmp_path / "c.sqlite" if request.param == "file" else None)
    await opened.open()
    yield opened
    await opened.close()


def job(job_id: str = "job", submitted_unix_s: float = 1.0) -> records.JobRow:
    return records.JobRow(job_id, "name", f"submit-{job_id}", "name = 'x'", submitted_unix_s, Desk().machine)


DEVICE = records.DeviceRow("id-1", "pi", 1.0, 1.0, b"hello")


async def test_a_job_in_the_middle_of_a_round_comes_back_as_it_was(database: Database) -> None:
    row = job()
    await database.write(lambda tx: records.add_job(tx, row))
    desk = Desk(evaluation="devices")
    desk.machine = row.machine
    desk.open("a", "b")
    desk.update("a", metrics={"loss": math.inf})
    desk.fail("b")
    machine = desk.machine
    await database.write(lambda tx: records.save_machine(tx, "job", machine.status, records.dump_machine(machine)))
    (found,) = await database.read(records.load_jobs)
    assert found == replace(row, machine=machine)


async def test_jobs_come_oldest_first(database: Database) -> None:
    for row in (job("b", 2.0), job("a", 3.0), job("c", 1.0)):
        await database.write(functools.partial(records.add_job, row=row))
    assert [row.job_id for row in await database.read(records.load_jobs)] == ["c", "b", "a"]


async def test_a_committed_round_is_written_once(database: Database) -> None:
    await database.write(lambda tx: records.add_job(tx, job()))
    entry = RoundEntry(1, "committed", 1.0, state=blob("s"), metrics={"loss": math.nan, "accuracy": 0.5})
    entry.tasks["t"] = TaskEntry("t", "id-1", "pi", "train", 1, "done", update=Update(blob("u"), 3), evaluation=Evaluation({}, 0))
    for number in (1, 2, 1):
        await database.write(functools.partial(records.save_round, job_id="job", entry=replace(entry, number=number)))
    first, second = await database.read(lambda c: list(records.load_rounds(c, "job")))
    assert (first.number, second.number) == (1, 2)
    assert first.tasks == entry.tasks
    assert math.isnan(first.metrics["loss"])


@pytest.mark.parametrize(
    "event",
    [
        m.Started(),
        m.UpdateArrived("t", Update(blob("x"), 1, {"loss": math.nan})),
        m.DeviceOnline("id-1", frozenset({"t"})),
        m.TaskFailed("t", Failure("crash", "train", "it’s gone \x00 \U0001f600")),
    ],
)
async def test_every_event_can_be_read_by_a_person(database: Database, event: m.Event) -> None:
    await database.write(lambda tx: records.add_events(tx, [records.EventRow(1.0, "job", event)]))
    ((kind, body),) = await database.read(lambda c: c.execute(select(schema.events.c.kind, schema.events.c.body)).all())
    assert kind == type(event).__name__
    assert isinstance(json.loads(body), dict)


async def test_the_first_result_of_a_task_is_the_one_that_counts(database: Database) -> None:
    first = records.UpdateRow("t", "job", 1, "id-1", "a" * 64, "accepted", 1.0)
    await database.write(lambda tx: records.add_updates(tx, [first, replace(first, digest="b" * 64)]))
    await database.write(lambda tx: records.add_updates(tx, [replace(first, status="late")]))
    assert await database.read(lambda c: records.find_update(c, "t")) == first
    assert await database.read(lambda c: records.find_update(c, "u")) is None


async def test_blobs_are_listed_and_dropped(database: Database) -> None:
    rows = [records.BlobRow(letter * 64, 1, "state", "job", 1.0) for letter in "abca"]
    await database.write(lambda tx: records.add_blobs(tx, rows))
    await database.write(lambda tx: records.drop_blobs(tx, {"a" * 64, "f" * 64}))
    assert await database.read(records.blob_digests) == {"b" * 64, "c" * 64}


async def test_a_device_keeps_its_counters_over_a_reconnect(database: Database) -> None:
    await database.write(lambda tx: records.save_device(tx, DEVICE))
    await database.write(lambda tx: records.count_for_device(tx, "id-1", 2, 1, "out of memory"))
    await database.write(lambda tx: records.count_for_device(tx, "id-1", 1, 0, ""))
    await database.write(lambda tx: records.count_for_device(tx, "unknown", 1, 0, ""))
    await database.write(lambda tx: records.save_device(tx, replace(DEVICE, name="pi5", first_seen_unix_s=9.0, last_seen_unix_s=9.0)))
    (found,) = await database.read(records.load_devices)
    assert found == records.DeviceRow("id-1", "pi5", 1.0, 9.0, b"hello", 3, 1, "out of memory")


async def test_log_lines_are_bounded_per_job(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LOG_LINES_PER_JOB", 3)
    for word in "abcde":
        await database.write(functools.partial(records.add_logs, rows=[records.LogRow(1.0, "job", 1, "pi", word)]))
    await database.write(lambda tx: records.add_logs(tx, []))
    assert [row.text for row in await database.read(lambda c: records.load_logs(c, "job", ""))] == ["c", "d", "e"]
    assert await database.read(lambda c: records.load_logs(c, "job", "other")) == []

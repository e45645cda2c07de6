"""Clearing away beside uploads and commits, on a real store and a real database."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

import pytest
from sqlalchemy import text

from fleetune.coordinator.domain import Blob, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds import adapter
from fleetune.coordinator.rounds.history import History
from fleetune.coordinator.rounds.machine import JobMachine
from fleetune.coordinator.rounds.needs import JobFacts, Trim
from fleetune.coordinator.rounds.retention import SPOOL_IDLE_S, Garbage, Retention, rounds_kept
from fleetune.coordinator.store import records
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.coordinator.store.db import Database
from fleetune.errors import DurabilityError
from fleetune.wire import digests
from fleetune.workers import Workers
from support.machines import PLAN


class Shelf:
    """A retention over jobs that the test changes by hand."""

    def __init__(self, root: Path) -> None:
        self.blobs = BlobStore(root)
        self.database = Database(root / "db.sqlite")
        self.disk = Workers("disk", 2)
        self.jobs: list[JobFacts] = []
        self.now = 0.0
        self.work: set[asyncio.Task[None]] = set()
        self.folder = root / "jobs"
        self.retention = Retention(
            self.blobs, self.database, self.folder, self.disk, lambda: list(self.jobs), self._start, lambda: self.now
        )

    def _start(self, coroutine: Coroutine[object, object, None], name: str) -> None:
        self.work.add(asyncio.create_task(coroutine, name=name))

    async def store(self, data: bytes) -> Blob:
        digest = await self.disk.run(self.blobs.put_bytes, data)
        return Blob(digest, len(data))

    async def row(self, blob: Blob) -> None:
        row = records.BlobRow(blob.digest, blob.size_bytes, "update", "job", 0.0)
        await self.database.write(lambda tx: records.add_blobs(tx, [row]))

    async def collect(self, trim: Trim | None = None, *, dry_run: bool = False) -> Garbage:
        def keep(trimmed: object) -> None:
            assert isinstance(trimmed, dict)
            self.jobs = [JobFacts(j.job_id, j.machine, j.history, trimmed.get(j.job_id, j.keep_rounds)) for j in self.jobs]

        return await self.retention.collect(trim, keep, dry_run=dry_run)

    def there(self) -> set[str]:
        return set(self.blobs.digests())


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    made = Shelf(tmp_path)
    await made.database.open()
    yield made
    await asyncio.gather(*made.work)
    await made.database.close()
    made.disk.close()


def running(name: str) -> JobFacts:
    machine = JobMachine(PLAN)
    machine.status = "running"
    machine.round = RoundEntry(1, "training", 0.0)
    return JobFacts(name, machine, History(), 3)


def accept(job: JobFacts, device: str, blob: Blob) -> None:
    assert job.machine.round is not None
    task = TaskEntry(f"{job.job_id}/1/{device}/train", device, device, "train", 1, "done")
    task.update = Update(blob, 1)
    job.machine.round.tasks[task.task_id] = task


def drop_all(job: JobFacts) -> set[str]:
    assert job.machine.round is not None
    gone = {task.update.blob.digest for task in job.machine.round.tasks.values() if task.update is not None}
    job.machine.round.tasks.clear()
    return gone


async def test_a_blob_that_a_job_has_come_to_need_survives_1000_interleavings(shelf: Shelf) -> None:
    """Uploads of few distinct contents into two jobs, rounds that end, and collections, all at once: what is needed is there."""
    rng = random.Random(20)
    jobs = [running("a"), running("b")]
    shelf.jobs = jobs
    collections = 0

    async def upload(number: int) -> None:
        data = f"update {rng.randrange(6)}".encode()
        job = rng.choice(jobs)
        async with shelf.retention.keeping(digests.of_bytes(data)):
            blob = await shelf.store(data)
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            if rng.random() < 0.7:  # or it came too late
                accept(job, f"d{number % 4}", blob)
                assert blob.digest in shelf.there()

    async def end_round() -> None:
        await shelf.retention.forget(drop_all(rng.choice(jobs)))

    async def collect() -> None:
        nonlocal collections
        collections += 1
        await shelf.collect(dry_run=rng.random() < 0.1)

    for number in range(250):
        await asyncio.gather(upload(number), collect(), upload(number + 1), *([end_round()] if number % 3 == 0 else []), collect())
        needed = {task.update.blob.digest for job in jobs for task in job.machine.round.tasks.values() if task.update}  # type: ignore[union-attr]
        assert needed <= shelf.there()
    assert collections == 500


async def test_what_the_last_commit_still_stands_on_stays_until_the_next_is_on_disk(shelf: Shelf) -> None:
    job = running("a")
    shelf.jobs = [job]
    blob = await shelf.store(b"folded, but the round is not committed yet")
    accept(job, "d", blob)
    shelf.retention.guard([job])
    gone = drop_all(job)  # decided, in memory only: a crash now would go back
    await shelf.collect()
    await shelf.retention.forget(gone)
    assert shelf.there() == {blob.digest}
    shelf.retention.committed()
    await shelf.retention.forget(())
    assert shelf.there() == set()


async def test_a_full_disk_gets_the_room_of_blobs_whose_rows_cannot_go(shelf: Shelf) -> None:
    blob = await shelf.store(b"an update")
    await shelf.row(blob)
    pages = await shelf.database.write(lambda tx: tx.execute(text("PRAGMA page_count")).scalar_one())
    await shelf.database.write(lambda tx: tx.execute(text("CREATE TABLE ballast (data BLOB)")))
    # Every removed row takes more room with it than there is.
    await shelf.database.write(
        lambda tx: tx.execute(text("CREATE TRIGGER full BEFORE DELETE ON blobs BEGIN INSERT INTO ballast VALUES (zeroblob(1000000)); END"))
    )
    await shelf.database.write(lambda tx: tx.execute(text(f"PRAGMA max_page_count = {pages + 8}")))
    await shelf.retention.forget({blob.digest})
    assert await shelf.database.read(records.blob_digests) == {blob.digest}
    assert shelf.there() == set()


async def test_nothing_is_removed_where_the_disk_does_not_take_the_rows_removal(shelf: Shelf) -> None:
    blob = await shelf.store(b"an update")
    await shelf.row(blob)
    told: list[DurabilityError] = []
    shelf.database.on_broken = told.append
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write beyond it fails with EFBIG, which is "disk I/O error" to SQLite.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        await shelf.retention.forget({blob.digest})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ["disk I/O error" in str(error) for error in told] == [True]
    assert await shelf.database.read(records.blob_digests) == {blob.digest}
    assert shelf.there() == {blob.digest}


async def test_a_dry_run_counts_and_leaves_everything(shelf: Shelf) -> None:
    await shelf.store(b"12345")
    await shelf.row(Blob("a" * 64, 7))
    found = await shelf.collect(dry_run=True)
    assert (found.blobs, found.blob_bytes, found.rows) == (1, 5, 1)
    assert len(shelf.there()) == 1
    assert await shelf.collect() == found
    assert shelf.there() == set()
    assert await shelf.database.read(records.blob_digests) == set()
    assert await shelf.collect() == Garbage()


async def test_a_held_blob_is_no_garbage_for_a_while(shelf: Shelf) -> None:
    blob = await shelf.store(b"being exported")
    shelf.retention.hold(blob.digest)
    assert (await shelf.collect()).blobs == 0
    shelf.now = 1e6
    assert (await shelf.collect()).blobs == 1


async def test_broken_uploads_go_unless_they_are_young_or_their_task_is_open(shelf: Shelf) -> None:
    job = running("a")
    shelf.jobs = [job]
    assert job.machine.round is not None
    job.machine.round.tasks["a/1/d/train"] = TaskEntry("a/1/d/train", "d", "d", "train", 1)
    for key in ("a/1/d/train", "a/1/e/train", "young"):
        path = shelf.blobs._spool_path(key, Blob("b" * 64, 9))
        path.write_bytes(b"123")
        if key != "young":
            long_ago = time.time() - SPOOL_IDLE_S - 60
            os.utime(path, (long_ago, long_ago))
    found = await shelf.collect()
    assert (found.spools, found.spool_bytes) == (1, 3)
    left = {shelf.blobs.spooled(key, Blob("b" * 64, 9)) for key in ("a/1/d/train", "young")}
    assert left == {3}
    assert shelf.blobs.spooled("a/1/e/train", Blob("b" * 64, 9)) == 0


async def test_ended_jobs_are_trimmed_to_the_wish_and_stay_so_after_a_restart(shelf: Shelf) -> None:
    machine = JobMachine(PLAN)
    machine.status, machine.committed, machine.best_round, machine.ended_unix_s = "completed", 4, 2, 100.0
    states = [await shelf.store(f"state {n}".encode()) for n in range(1, 5)]
    history = [RoundEntry(n, "committed", 0.0, state=states[n - 1]) for n in range(1, 5)]
    for n in range(1, 5):
        folder = adapter.folder(shelf.folder, "old", n)
        folder.mkdir(parents=True)
        shelf.blobs.link_out(states[n - 1].digest, folder / adapter.STATE_FILE)
        (folder / adapter.README_FILE).write_text("x" * 10)
    shelf.jobs = [JobFacts("old", machine, History.of(history), 4)]
    assert (await shelf.collect(Trim(1, 99.0))) == Garbage(), "not old enough"
    found = await shelf.collect(Trim(1, 100.0))
    assert (found.blobs, found.folders, found.folder_bytes) == (2, 2, 20)
    assert adapter.rounds(shelf.folder, "old") == [2, 4]
    assert shelf.there() == {states[1].digest, states[3].digest}
    assert await shelf.database.read(lambda c: rounds_kept(c, "old", 4)) == 1
    assert await shelf.database.read(lambda c: rounds_kept(c, "other", 4)) == 4
    assert await shelf.collect() == Garbage()


async def test_damaged_blobs_that_were_set_aside_are_garbage(shelf: Shelf) -> None:
    blob = await shelf.store(b"was whole once")
    assert shelf.blobs.quarantine(blob.digest)
    assert shelf.there() == set()
    found = await shelf.collect()
    assert (found.damaged, found.damaged_bytes) == (1, 14)
    assert shelf.blobs.quarantined() == {}

"""Keeping and clearing away: carries out what `needs` decides on the blobs, their rows, the round folders and the spool."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from fleetune.coordinator.rounds import adapter, needs
from fleetune.coordinator.rounds.needs import JobFacts, Trim
from fleetune.coordinator.store import copies, records
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.coordinator.store.db import Database
from fleetune.workers import Workers

log = logging.getLogger("fleetune.retention")

HOLD_S = 600.0
"""A blob that somebody was told to fetch outlives its round by this."""

SPOOL_IDLE_S = 3600.0
"""What arrives for no open task is garbage once nothing has come for so long."""


@dataclass(frozen=True)
class Garbage:
    """Counts and bytes of what was found and, unless it was only looked for, removed."""

    blobs: int = 0
    blob_bytes: int = 0
    rows: int = 0
    """Of blobs that are not there."""
    folders: int = 0
    folder_bytes: int = 0
    """Without the tensors that a folder shares with a blob."""
    spools: int = 0
    spool_bytes: int = 0
    damaged: int = 0
    damaged_bytes: int = 0


class Retention:
    """What is kept, held for a while, and cleared away. Used on the event loop; disk work leaves it."""

    def __init__(
        self,
        blobs: BlobStore,
        database: Database,
        jobs_folder: Path,
        disk: Workers,
        jobs: Callable[[], list[JobFacts]],
        start: Callable[[Coroutine[object, object, None], str], object],
        monotonic: Callable[[], float],
    ) -> None:
        """`jobs` tells the facts as of now; `start` runs work beside the loop, or not at all when everything ends."""
        self._blobs = blobs
        self._database = database
        self._jobs_folder = jobs_folder
        self._disk = disk
        self._jobs = jobs
        self._start = start
        self._monotonic = monotonic
        self._incoming: dict[str, int] = {}
        """Digest -> how many are about to store that blob and to make a job need it."""
        self._held_until_s: dict[str, float] = {}
        """Digest -> monotonic time until which somebody may fetch it."""
        self._later: set[str] = set()
        """Would have been cleared away, but was held or guarded."""
        self._doomed: set[str] = set()
        """Being cleared away just now."""
        self._guarded: frozenset[str] = frozenset()
        self._cleared = asyncio.Event()
        self._collecting = asyncio.Lock()

    # -- what protects

    def guard(self, jobs: Iterable[JobFacts]) -> None:
        """These jobs are about to change: until `committed`, a restart would find them as they are now, with all that they need now."""
        self._guarded = frozenset(needs.needed(jobs))

    def committed(self) -> None:
        """What was decided is on disk."""
        self._guarded = frozenset()

    def hold(self, digest: str) -> None:
        """Somebody is about to fetch the blob: it stays for a while even if its round goes."""
        now = self._monotonic()
        self._held_until_s = {d: until for d, until in self._held_until_s.items() if until > now} | {digest: now + HOLD_S}

    def is_held(self, digest: str) -> bool:
        """Whether `hold` has been called for it lately."""
        return self._held_until_s.get(digest, 0.0) > self._monotonic()

    @contextlib.asynccontextmanager
    async def keeping(self, digest: str) -> AsyncGenerator[None]:
        """Store the blob and make a job need it inside. Nobody clears it away meanwhile; afterwards it goes unless a job needs it.

        Two jobs may well come to the same bytes, so that one's clearing up would take the other's fresh blob.
        """
        while digest in self._doomed:
            await self._cleared.wait()
        self.expect(digest)
        try:
            yield
        finally:
            self.settle(digest)

    def expect(self, digest: str) -> None:
        """Inside `keeping`: the blob stays beyond it, until `settle`."""
        self._incoming[digest] = self._incoming.get(digest, 0) + 1

    def settle(self, digest: str) -> None:
        """One fewer waits for a job to need the blob; after the last one it goes unless a job does."""
        self._incoming[digest] -= 1
        if not self._incoming[digest]:
            del self._incoming[digest]
            if digest not in needs.needed(self._jobs()):
                self._start(self.forget({digest}), f"clear {digest[:12]}")

    def _held(self) -> set[str]:
        now = self._monotonic()
        return {digest for digest, until in self._held_until_s.items() if until > now}

    # -- what goes

    async def forget(self, digests: Collection[str]) -> None:
        """Delete those of the blobs that nothing needs: the row first, so that no row ever names a missing blob."""
        asked = set(digests) | self._later
        self._later = asked & (self._held() | self._guarded)
        await self._clear(needs.doomed(asked, self._jobs(), self._later, self._doomed, self._incoming.keys()))

    async def _clear(self, doomed: set[str], change: Callable[[Connection], None] | None = None) -> None:
        """Remove rows, with `change` in the same transaction, and then files. Nobody stores a doomed blob meanwhile."""
        if not doomed and change is None:
            return

        def forget(tx: Connection) -> None:
            records.drop_blobs(tx, doomed)
            if change is not None:
                change(tx)

        self._doomed |= doomed
        try:
            try:
                await self._database.write(forget)
            except OperationalError as error:
                log.warning("rows of %d blobs not cleared away, the next start does it: %s", len(doomed), error.orig)
                # What an operator wishes for later must be written down first.
                if change is not None:
                    raise
                # A full disk has no room for the rows' removal, and room is what the files give back: a row without a blob does no
                # harm. Of a failing disk nothing is known, nor which rows are still there.
                if error.orig is None or not copies.is_full(error.orig):
                    return
            await self._disk.run(self._delete, doomed)
        finally:
            self._doomed -= doomed
            self._wake()

    def _wake(self) -> None:
        """Let those go on that wait to store what was being cleared away."""
        self._cleared.set()
        self._cleared = asyncio.Event()

    def _delete(self, digests: Collection[str]) -> None:
        for digest in digests:
            self._blobs.delete(digest)

    async def sweep(self) -> None:
        """Clear away what a crash has left: blobs without a row or without a need, rows without a blob. Before anything runs."""
        rows = await self._database.read(records.blob_digests)
        there = set(await self._disk.run(lambda: list(self._blobs.digests())))
        needed = needs.needed(self._jobs())
        for digest in sorted(needed - there):
            log.error("blob=%s is needed but missing in %s", digest, self._blobs.root)
        stale_rows, stale_files = rows - (needed & there), there - needed
        if stale_rows:
            await self._database.write(lambda tx: records.drop_blobs(tx, stale_rows))
        if stale_files:
            log.info("cleared away %d blobs that no job needs", len(stale_files))
            await self._disk.run(self._delete, stale_files)

    def drop_old_folders(self, job: JobFacts) -> list[int]:
        """The rounds whose folders went, because they are neither among the last nor the best. Blocks on disk."""
        kept = needs.kept_rounds(job)
        old = [number for number in adapter.rounds(self._jobs_folder, job.job_id) if number not in kept]
        for number in old:
            adapter.drop(self._jobs_folder, job.job_id, number)
        return old

    # -- what an operator asks

    async def collect(self, trim: Trim | None, keep: Callable[[Mapping[str, int]], None], *, dry_run: bool) -> Garbage:
        """Find what no running job and no kept adapter needs and remove it unless `dry_run`. Raises OperationalError.

        `keep` notes how many rounds the trimmed jobs keep from now on; it is also written down, since a restart must not miss the rest.
        """
        async with self._collecting:
            there = set(await self._disk.run(lambda: list(self._blobs.digests())))
            rows = await self._database.read(records.blob_digests)
            ids = [job.job_id for job in self._jobs()]
            folders = await self._disk.run(lambda: {job_id: adapter.rounds(self._jobs_folder, job_id) for job_id in ids})
            # From here until the doomed are marked nothing is awaited: no job can come to need one of them unseen.
            jobs = self._jobs()
            trimmed = needs.trimmed(jobs, trim)
            jobs = [replace(job, keep_rounds=trimmed.get(job.job_id, job.keep_rounds)) for job in jobs]
            guarded = (self._held(), self._guarded, self._doomed, self._incoming.keys())
            doomed = needs.doomed(there, jobs, *guarded)
            # A blob that came between the two questions has a row and is not among those that were there.
            lost_rows = {digest for digest in needs.doomed(rows - there, jobs, *guarded) if not self._blobs.has(digest)}
            found = _Found(doomed, lost_rows, needs.stale_folders(jobs, folders), needs.open_task_ids(jobs))
            if dry_run:
                return await self._disk.run(self._count, found)
            marked = doomed | lost_rows
            self._doomed |= marked
            try:
                garbage = await self._disk.run(self._count, found)
                await self._clear(marked, _keeping_rounds(trimmed) if trimmed else None)
            finally:
                self._doomed -= marked
                self._wake()
            keep(trimmed)
            await self._disk.run(self._remove, found)
            log.info("garbage cleared away: %s", garbage)
            return garbage

    def _count(self, found: _Found) -> Garbage:
        sizes = [size for digest in found.blobs if (size := self._size(digest)) is not None]
        folders = [adapter.folder(self._jobs_folder, job_id, n) for job_id, numbers in found.folders.items() for n in numbers]
        spools = self._blobs.stale_spool(found.open_tasks, SPOOL_IDLE_S)
        damaged = self._blobs.quarantined()
        return Garbage(
            blobs=len(sizes),
            blob_bytes=sum(sizes),
            rows=len(found.rows),
            folders=len(folders),
            folder_bytes=sum(_own_bytes(folder) for folder in folders),
            spools=len(spools),
            spool_bytes=sum(spools.values()),
            damaged=len(damaged),
            damaged_bytes=sum(damaged.values()),
        )

    def _size(self, digest: str) -> int | None:
        try:
            return self._blobs.size(digest)
        except FileNotFoundError:
            return None

    def _remove(self, found: _Found) -> None:
        for job_id, numbers in found.folders.items():
            for number in numbers:
                adapter.drop(self._jobs_folder, job_id, number)
        self._blobs.clean_spool(SPOOL_IDLE_S, open_keys=found.open_tasks)
        self._blobs.drop_quarantined()


@dataclass(frozen=True)
class _Found:
    """Garbage by name. `folders` is job id -> round numbers."""

    blobs: Collection[str]
    rows: Collection[str]
    folders: Mapping[str, list[int]]
    open_tasks: Collection[str]


_KEPT = "keep_rounds/"


def _keeping_rounds(trimmed: Mapping[str, int]) -> Callable[[Connection], None]:
    def change(tx: Connection) -> None:
        for job_id, rounds in trimmed.items():
            records.write_meta(tx, f"{_KEPT}{job_id}", str(rounds))

    return change


def rounds_kept(connection: Connection, job_id: str, default: int) -> int:
    """How many of its last rounds a job keeps: as configured, or fewer where an operator has trimmed it."""
    return min(default, int(records.read_meta(connection, f"{_KEPT}{job_id}") or default))


def _own_bytes(folder: Path) -> int:
    """Bytes that go with the folder; a file with another name elsewhere does not."""
    stats = [entry.stat(follow_symlinks=False) for entry in os.scandir(folder)]
    return sum(found.st_size for found in stats if found.st_nlink == 1)

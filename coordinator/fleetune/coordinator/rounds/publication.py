"""After a round: its record from memory or the database, its folder on disk, and the end of the blobs that nobody needs any more."""

from __future__ import annotations

import logging

from fleetune.coordinator.domain import Prepared, RoundEntry
from fleetune.coordinator.rounds import adapter, needs
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rounds.means import Means
from fleetune.coordinator.store import records
from fleetune.errors import DiskFullError

log = logging.getLogger("fleetune.engine")


class Publication:
    def __init__(self, means: Means) -> None:
        self._means = means

    async def round_of(self, job: LiveJob, number: int) -> RoundEntry | None:
        """The record of a committed round; None where there is none of that number."""
        if (entry := job.history.get(number)) is not None or not 1 <= number <= job.history.committed:
            return entry
        found = await self._means.database.read(lambda c: list(records.load_rounds(c, job.job_id, number, number)))
        return found[0] if found else None

    async def publish(self, job: LiveJob, entry: RoundEntry) -> None:
        """Write the round's folder and let go of what it replaces."""
        prepared = job.machine.prepared
        assert prepared is not None
        async with job.publishing:
            await self._means.disk.run(self._publish_now, job, entry, prepared)
            dropped = await self._means.disk.run(self._means.retention.drop_old_folders, job.facts)
        await self._drop_updates(entry)
        gone = [found for number in dropped if (found := await self.round_of(job, number)) is not None]
        # What this round replaced: the optimiser's state before it and, for the first round, the state the job began with.
        before = await self.round_of(job, entry.number - 1)
        replaced = (before.optimizer, before.state) if before is not None else (prepared.state,)
        left = (*(old.published for old in gone), *replaced)
        await self._means.retention.forget({blob.digest for blob in left if blob is not None})
        job.touch()

    def _publish_now(self, job: LiveJob, entry: RoundEntry, prepared: Prepared) -> None:
        try:
            adapter.write(self._means.jobs_folder, self._means.blobs, adapter.Adapter(job.job_id, job.spec, prepared, entry))
        except (OSError, DiskFullError) as error:
            # The round is committed; its folder is written again at the next start or export.
            log.error("job=%s round=%d adapter folder not written: %s", job.job_id, entry.number, error)
            return
        if job.machine.best_round == entry.number:
            adapter.point(self._means.jobs_folder, job.job_id, "best", entry.number)

    def mend_folders(self, job: LiveJob) -> None:
        """Write kept rounds' folders that a crash between commit and write has cost. Blocks on disk."""
        if job.machine.prepared is None:
            return
        adapter.tidy(self._means.jobs_folder, job.job_id)
        for entry in job.history:
            tensors = entry.published
            if entry.number in needs.kept_rounds(job.facts) and tensors is not None and self._means.blobs.has(tensors.digest):
                found = adapter.Adapter(job.job_id, job.spec, job.machine.prepared, entry)
                if not adapter.is_whole(self._means.jobs_folder, found):  # a power cut may leave a folder of empty files
                    adapter.drop(self._means.jobs_folder, job.job_id, entry.number)
                self._publish_now(job, entry, job.machine.prepared)
        if job.ended and job.machine.committed:
            adapter.point(self._means.jobs_folder, job.job_id, "final", job.machine.committed)

    async def _drop_updates(self, entry: RoundEntry) -> None:
        await self._means.retention.forget({task.update.blob.digest for task in entry.trained() if task.update})

    async def drop_round(self, entry: RoundEntry) -> None:
        """Everything that an abandoned round has made."""
        await self._drop_updates(entry)
        await self._means.retention.forget({blob.digest for blob in (entry.state, entry.optimizer, entry.adapter) if blob is not None})

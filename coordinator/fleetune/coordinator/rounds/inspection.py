"""When the blobs of an open round are read again, and what the job is told of those that are damaged; `damage` mends them."""

from __future__ import annotations

from fleetune.coordinator.domain import Failure
from fleetune.coordinator.rounds import damage, machine, needs
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rounds.means import Means

RECHECK_AFTER_S = 60.0
"""What was checked more recently than this is still in memory: to read it again would tell nothing about the disk, and take a part of
every short round."""


class Inspection:
    def __init__(self, means: Means) -> None:
        self._means = means

    async def check_updates(self, job: LiveJob) -> bool:
        """Take back the acceptance of updates whose bytes are damaged; True where there was one."""
        entry = job.machine.round
        if entry is None or entry.phase not in ("training", "folding"):
            return False
        tasks = [(task.task_id, task.lease, task.update.blob) for task in entry.trained() if task.update is not None]
        found = False
        for task_id, lease, blob in tasks:
            if await self._means.disk.run(damage.is_whole, self._means.blobs, blob):
                continue
            task = job.machine.open_task(task_id)
            if task is None or task.lease != lease:
                continue  # the round has gone on, and its updates with it
            found = await self._means.disk.run(damage.withdrawn, self._means.blobs, blob) or found
            self._means.post(job.job_id, machine.UpdateDamaged(task_id, lease))
        return found

    async def check_fresh_state(self, job: LiveJob) -> bool:
        """Have the round in evaluation folded once more where its new state is damaged; True where it is."""
        entry = job.machine.round
        if entry is None or not await self.fresh_state_withdrawn(job):
            return False
        self._means.post(job.job_id, machine.StateDamaged(entry.number))
        return True

    async def fresh_state_withdrawn(self, job: LiveJob) -> bool:
        """Whether the new state of a round in evaluation is damaged; then it is out of the store."""
        fresh = list(needs.fresh_states(job.facts).values())
        found = bool(fresh) and await self._means.disk.run(damage.withdrawn_any, self._means.blobs, fresh)
        job.suspect = job.suspect or found
        return found

    def has_lain(self, job: LiveJob) -> bool:
        """Whether anything that the open round folds was written longer than RECHECK_AFTER_S ago. A restart checks by itself."""
        if job.suspect:
            return True
        entry = job.machine.round
        written = [entry.started_unix_s] if entry is not None else []
        written += [last.ended_unix_s] if (last := job.history.last) is not None else []
        return not written or self._means.wall() - min(written) >= RECHECK_AFTER_S

    async def after_restart(self, job: LiveJob) -> None:
        """Early, since a device that must train again does so while the others still train. The coordinator serves meanwhile."""
        await self.check_updates(job)

    async def after_failed_fetch(self, job: LiveJob) -> None:
        """A device got other bytes than were announced: is it the disk here? One look at a time."""
        if job.checking or job.ended:
            return
        job.checking = True
        try:
            standing = damage.standing(job.facts)
            blobs, folder = self._means.blobs, self._means.jobs_folder
            if ailment := await self._means.disk.run(damage.ailment, blobs, folder, standing, base_in_full=True):
                self._means.post(job.job_id, machine.HostFailed("serving files", Failure("internal", "storage", ailment)))
        finally:
            job.checking = False

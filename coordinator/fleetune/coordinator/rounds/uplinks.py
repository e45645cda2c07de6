"""Uploads as they begin and end: how long each took, and what each device of a planned round may send at just now."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fleetune.coordinator.domain import TaskEntry
from fleetune.coordinator.registry import Registry
from fleetune.coordinator.rounds.bandwidth import Claim, UplinkShares
from fleetune.coordinator.rounds.job import LiveJob

TELL_EVERY_S = 0.1
"""Where many begin or end at once, rates are told for all of them together."""

Tell = Callable[[str, str, float], None]
"""Device id, task id and bits per second on their way to a device."""


@dataclass(frozen=True)
class Times:
    """Of one upload, seconds; 0 where it is not known."""

    ready_s: float = 0.0
    """From the task's sending until its upload began."""
    sent_s: float = 0.0
    """From then until its last byte came."""


@dataclass
class _Round:
    """What is known of the uploads of a job's open round."""

    number: int
    shares: UplinkShares | None
    handed_out_s: dict[str, float] = field(default_factory=dict[str, float])
    """Task id -> when it was sent first, by this process."""
    began_s: dict[str, float] = field(default_factory=dict[str, float])
    """Task id -> when its upload began first."""
    sending: dict[str, str] = field(default_factory=dict[str, str])
    """Task id -> device id, of the updates that are on their way."""
    timer: asyncio.TimerHandle | None = None
    told_at_s: float = -math.inf


class Uplinks:
    """Called on the event loop, by whoever receives uploads. Nothing of it outlives a restart, and nothing but rates depends on it."""

    def __init__(
        self,
        jobs: Mapping[str, LiveJob],
        registry: Registry,
        monotonic: Callable[[], float],
        tell: Tell,
    ) -> None:
        self._jobs = jobs
        self._registry = registry
        self._monotonic = monotonic
        self._tell = tell
        self._rounds: dict[str, _Round] = {}

    def handed_out(self, task_id: str) -> None:
        """The task goes to its device."""
        job, entry = self._open(task_id)
        if job is not None and entry is not None and entry.kind == "train":
            self._of(job).handed_out_s.setdefault(task_id, self._monotonic())

    def announced(self, task_id: str) -> None:
        """The header of the task's update has come."""
        job, entry = self._open(task_id)
        if job is not None and entry is not None:
            self._of(job).began_s.setdefault(task_id, self._monotonic())

    def began(self, task_id: str) -> None:
        """Its bytes come now; the caller says when that is over."""
        job, entry = self._open(task_id)
        if job is None or entry is None:
            return
        uploads = self._of(job)
        claim = self._claim(job, entry.device_id)
        if uploads.shares is not None and claim is not None:
            uploads.sending[task_id] = entry.device_id
            uploads.shares.began(task_id, claim)
            self._tell_soon(uploads)

    def ended(self, task_id: str) -> Times:
        """Its last byte has come, or the stream was cut: what others may use now is theirs. How long it took until now."""
        uploads = self._rounds.get(task_id.partition("/")[0])
        if uploads is None or task_id not in uploads.began_s:
            return Times()
        device = uploads.sending.pop(task_id, None)
        if uploads.shares is not None and device is not None:
            uploads.shares.ended(task_id)
            self._tell_soon(uploads)
        began_s = uploads.began_s[task_id]
        # Of a task that was sent before a restart nobody knows when that was.
        return Times(began_s - uploads.handed_out_s.get(task_id, began_s), self._monotonic() - began_s)

    def close(self) -> None:
        for uploads in self._rounds.values():
            if uploads.timer is not None:
                uploads.timer.cancel()

    def _open(self, task_id: str) -> tuple[LiveJob | None, TaskEntry | None]:
        job = self._jobs.get(task_id.partition("/")[0])
        return job, job.machine.open_task(task_id) if job is not None else None

    def _of(self, job: LiveJob) -> _Round:
        assert job.machine.round is not None
        found = self._rounds.get(job.job_id)
        if found is None or found.number != job.machine.round.number:
            if found is not None and found.timer is not None:
                found.timer.cancel()
            for ended in [job_id for job_id in self._rounds if job_id not in self._jobs or self._jobs[job_id].ended]:
                del self._rounds[ended]
            found = self._rounds[job.job_id] = _Round(job.machine.round.number, _shares(job))
        return found

    def _claim(self, job: LiveJob, device_id: str) -> Claim | None:
        """The device's part of what its round's uploads share; None where nothing bounds it."""
        entry, settings = job.machine.round, job.machine.plan.planning
        part = entry.plan.part_of(device_id) if entry is not None and entry.plan is not None else None
        if part is None or settings is None or part.share <= 0 or part.uplink_bits_per_s <= 0:
            return None
        if settings.resource == "airtime":
            # A share of airtime carries that share of the device's own rate, which nothing exceeds.
            own_bits_per_s = part.uplink_bits_per_s / part.share
            return Claim(part.share, own_bits_per_s, own_bits_per_s)
        session = self._registry.sessions.get(device_id)
        own_bits_per_s = session.link.up_bits_per_s if session is not None else 0.0
        return Claim(part.share, part.uplink_bits_per_s / part.share, own_bits_per_s or math.inf)

    def _tell_soon(self, uploads: _Round) -> None:
        if uploads.timer is not None:
            return
        wait_s = uploads.told_at_s + TELL_EVERY_S - self._monotonic()
        if wait_s <= 0:
            self._tell_all(uploads)
        else:
            uploads.timer = asyncio.get_running_loop().call_later(wait_s, self._tell_all, uploads)

    def _tell_all(self, uploads: _Round) -> None:
        uploads.timer, uploads.told_at_s = None, self._monotonic()
        assert uploads.shares is not None
        for task_id, rate in uploads.shares.changes().items():
            self._tell(uploads.sending[task_id], task_id, rate)


def _shares(job: LiveJob) -> UplinkShares | None:
    settings = job.machine.plan.planning
    total = 0.0 if settings is None else 1.0 if settings.resource == "airtime" else settings.uplink_bits_per_s
    return UplinkShares(total, job.spec.method.sharing) if total > 0 else None

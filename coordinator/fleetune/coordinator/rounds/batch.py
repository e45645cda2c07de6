"""What the engine decides in one go: the rows of one transaction, and the commands and answers that follow its commit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection

from fleetune.coordinator.domain import RoundEntry
from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rounds.orders import Receipt
from fleetune.coordinator.store import records

log = logging.getLogger("fleetune.engine")


@dataclass
class Batch:
    """What one transaction writes, and what follows it."""

    events: list[records.EventRow] = field(default_factory=list[records.EventRow])
    taken_back: list[str] = field(default_factory=list[str])
    """Tasks whose accepted update is damaged."""
    updates: list[records.UpdateRow] = field(default_factory=list[records.UpdateRow])
    blobs: list[records.BlobRow] = field(default_factory=list[records.BlobRow])
    rounds: list[tuple[str, RoundEntry]] = field(default_factory=list[tuple[str, RoundEntry]])
    failures: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    jobs: dict[str, LiveJob] = field(default_factory=dict[str, LiveJob])
    commands: list[tuple[LiveJob, machine.Command]] = field(default_factory=list[tuple[LiveJob, machine.Command]])
    answers: list[tuple[asyncio.Future[Receipt], Receipt]] = field(default_factory=list[tuple[asyncio.Future[Receipt], Receipt]])

    def note(self, job: LiveJob, event: machine.Event, now: float) -> None:
        """Rows beside the machine's own, and the log's story."""
        match event:
            case machine.UpdateArrived(task_id, update):
                device_id, number = task_id.split("/")[2], int(task_id.split("/")[1])
                self.updates.append(records.UpdateRow(task_id, job.job_id, number, device_id, update.blob.digest, "accepted", now))
                self.blobs.append(records.BlobRow(update.blob.digest, update.blob.size_bytes, "update", job.job_id, now))
                log.info(
                    "job=%s round=%d device=%s update samples=%d bytes=%d",
                    job.job_id,
                    number,
                    device_id,
                    update.samples,
                    update.blob.size_bytes,
                )
            case machine.UpdateLate(task_id, digest):
                device_id, number = task_id.split("/")[2], int(task_id.split("/")[1])
                self.updates.append(records.UpdateRow(task_id, job.job_id, number, device_id, digest, "late", now))
                log.info("job=%s round=%d device=%s update late", job.job_id, number, device_id)
            case machine.UpdateDamaged(task_id):
                self.taken_back.append(task_id)
                device_id, number = task_id.split("/")[2], int(task_id.split("/")[1])
                log.error("job=%s round=%d device=%s update damaged on disk, its task is given again", job.job_id, number, device_id)
            case machine.StateDamaged(number):
                log.error("job=%s round=%d new state damaged on disk, its updates are folded once more", job.job_id, number)
            case machine.FiguresArrived(task_id, figures):
                step_s = figures.step_s[-1] if figures.step_s else 0.0
                log.info(
                    "job=%s device=%s figures deepest_step_s=%.3g rows=%d", job.job_id, task_id.split("/")[2], step_s, figures.batch_rows
                )
            case machine.Planned(_, plan, reason):
                if plan is None:
                    log.warning("job=%s cannot be planned: %s", job.job_id, reason)
                elif job.machine.round is not None:
                    log.info(
                        "job=%s round=%d planned layout=%s solver=%s devices=%d round_s=%.3g uncovered=%d reason=%r",
                        job.job_id,
                        job.machine.round.number,
                        plan.layout,
                        plan.solver,
                        len(plan.parts),
                        plan.round_s,
                        len(plan.uncovered_depths),
                        plan.reason,
                    )
            case machine.TaskFailed(task_id, failure):
                self.failures.append((task_id.split("/")[2], failure.message))
                log.warning(
                    "job=%s task=%s failed stage=%s kind=%s message=%r", job.job_id, task_id, failure.stage, failure.kind, failure.message
                )
            case machine.TaskRefused(task_id, reason):
                log.info("job=%s task=%s refused reason=%r", job.job_id, task_id, reason)
            case machine.PreparedEvent(prepared):
                self.blobs.append(records.BlobRow(prepared.state.digest, prepared.state.size_bytes, "state", job.job_id, now))
                self.blobs += [records.BlobRow(digest, size, "base", job.job_id, now) for _, digest, size in prepared.files]
            case machine.Folded(_, outcome):
                self.blobs.append(records.BlobRow(outcome.state.digest, outcome.state.size_bytes, "state", job.job_id, now))
                if outcome.adapter is not None:
                    self.blobs.append(records.BlobRow(outcome.adapter.digest, outcome.adapter.size_bytes, "adapter", job.job_id, now))
                if outcome.optimizer is not None:
                    self.blobs.append(records.BlobRow(outcome.optimizer.digest, outcome.optimizer.size_bytes, "optimizer", job.job_id, now))
            case _:
                pass

    def machines(self) -> dict[str, tuple[str, str]]:
        """Job id -> status and machine as they are now; the loop goes on while they are written."""
        return {job_id: (job.machine.status, records.dump_machine(job.machine)) for job_id, job in self.jobs.items()}

    def write(self, tx: Connection, machines: Mapping[str, tuple[str, str]]) -> None:
        """The rows, in the transaction `tx`; `machines` as they were told before."""
        records.add_events(tx, self.events)
        records.drop_updates(tx, self.taken_back)
        records.add_updates(tx, self.updates)
        records.add_blobs(tx, self.blobs)
        for job_id, entry in self.rounds:
            records.save_round(tx, job_id, entry)
        records.count_accepted(tx, [row.device_id for row in self.updates if row.status == "accepted"])
        for device_id, message in self.failures:
            records.count_for_device(tx, device_id, 0, 1, message)
        for job_id, (status, text) in machines.items():
            records.save_machine(tx, job_id, status, text)

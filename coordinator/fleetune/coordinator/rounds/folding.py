"""What the coordinator computes of a round: the fold of its updates and, where the job has a held-out file, the new state's figures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fleetune import consensus, structures
from fleetune.coordinator.domain import Blob, Failure, FoldOutcome
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.rounds import aggregate, damage, layouts, lorafold, machine, ranking, triplets
from fleetune.coordinator.rounds.host import HostError
from fleetune.coordinator.rounds.inspection import Inspection
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rounds.means import Means, expanded, failure_of
from fleetune.errors import DiskFullError, DurabilityError, FleetuneError

log = logging.getLogger("fleetune.engine")

TRIPLETS = "triplets"
MODULES = "modules"
"""What a fold tells of adapters that lose ranks: how many triplets are left, and in how many modules."""

FOLD_RETRY_S = 2.0
"""A fold that found no room on the disk tries again after this."""


class Folding:
    def __init__(self, means: Means, inspection: Inspection) -> None:
        self._means = means
        self._inspection = inspection

    async def fold(self, job: LiveJob, command: machine.Fold) -> None:
        """Fold; without room for the result as often as it takes, since the updates lie safe and somebody may make room."""
        waits, told = f"fold {job.job_id}", False
        try:
            while (full := await self._folded(job, command)) is not None and not job.ended:
                if not told:
                    log.error("job=%s round=%d waits with its fold: %s", job.job_id, command.round_number, full)
                told = True
                self._means.note_room(waits, str(full))
                await asyncio.sleep(FOLD_RETRY_S)
        finally:
            self._means.note_room(waits, "")

    async def _folded(self, job: LiveJob, command: machine.Fold) -> DiskFullError | None:
        """One attempt; what came of it is posted, but for the lack of room."""
        stem = f"{job.job_id}-{command.round_number}-{uuid.uuid4().hex[:8]}"
        out, out_optimizer = self._means.scratch / f"{stem}.state", self._means.scratch / f"{stem}.optimizer"
        out_adapter = self._means.scratch / f"{stem}.adapter"
        try:
            if self._inspection.has_lain(job):
                # The bytes lay on a disk since their digests were checked: nothing damaged gets into the sum.
                if await self._inspection.check_updates(job):
                    return None
                standing = damage.standing(job.facts)
                if ailment := await self._means.disk.run(damage.ailment, self._means.blobs, self._means.jobs_folder, standing):
                    self._means.post(job.job_id, machine.HostFailed("folding", Failure("internal", "storage", ailment)))
                    return None
            result = await self._means.fold_thread.run(self._fold_now, job, command, out, out_optimizer)
            cut = await self._means.fold_thread.run(_cut, out, out_adapter, command.alive) if command.alive else None
            if cut is not None:
                result = replace(
                    result, digest=cut.state.digest, size_bytes=cut.state.size_bytes, metrics={**result.metrics, **cut.metrics}
                )
            async with contextlib.AsyncExitStack() as kept:
                adapter = Blob(cut.adapter.digest, cut.adapter.size_bytes) if cut is not None else None
                found = (
                    (out, result.digest),
                    (out_optimizer, result.optimizer_digest),
                    (out_adapter, adapter.digest if adapter is not None else None),
                )
                files = [(path, digest) for path, digest in found if digest is not None]
                for _, digest in files:
                    await kept.enter_async_context(self._means.retention.keeping(digest))
                await self._means.fold_thread.run(self._store, files)
                optimizer = Blob(result.optimizer_digest, result.optimizer_size_bytes) if result.optimizer_digest is not None else None
                coverage = min(result.coverage.values(), default=0)
                outcome = FoldOutcome(
                    Blob(result.digest, result.size_bytes),
                    optimizer,
                    coverage,
                    result.update_norm,
                    dict(result.metrics),
                    adapter,
                    cut.state.trainables_digest if cut is not None else "",
                )
                await self._means.ask(job.job_id, machine.Folded(command.round_number, outcome, ()))
        except DurabilityError as error:
            self._means.give_up(error)
        except DiskFullError as error:
            return error
        except (FleetuneError, OSError) as error:
            self._means.post(job.job_id, machine.HostFailed("folding", failure_of(error, "fold")))
        return None

    def _fold_now(self, job: LiveJob, command: machine.Fold, out: Path, out_optimizer: Path) -> aggregate.FoldResult:
        """On the fold thread."""
        rule = job.method.fold(job.spec, command.round_number)
        server = None if isinstance(rule, LoraFold) else rule
        plan = aggregate.FoldPlan(
            base_state=self._means.blobs.path(command.state.digest),
            contributions=tuple(
                aggregate.Contribution(c.device_id, self._means.blobs.path(c.blob.digest), c.weight) for c in command.contributions
            ),
            out_state=out,
            server=server,
            optimizer_state=self._means.blobs.path(command.optimizer.digest) if command.optimizer and server else None,
            out_optimizer_state=out_optimizer if server else None,
            layout=layouts.of_job(self._means.blobs, job.machine.prepared, job.spec.lora.targets)
            if job.method.prunes and job.machine.prepared is not None
            else None,
        )
        return lorafold.fold(plan, rule) if isinstance(rule, LoraFold) else aggregate.fold(plan)

    def _store(self, files: Sequence[tuple[Path, str]]) -> None:
        """Make blobs of finished files, which lose their first name. On the fold thread."""
        for path, digest in files:
            try:
                self._means.blobs.put_file(path, link=True, digest=digest)
            finally:
                path.unlink(missing_ok=True)

    def _structure_of_round(self, job: LiveJob) -> str:
        """Hex of the one structure that the round's devices come to by vote; empty where nothing is cut. Blocks on disk."""
        entry, prepared = job.machine.round, job.machine.prepared
        updates = [task.update for task in entry.trained() if task.update and task.update.structure] if entry is not None else []
        if prepared is None or not updates:
            return ""
        layout = layouts.of_job(self._means.blobs, prepared, job.spec.lora.targets)
        found = [(structures.from_bytes(layout, bytes.fromhex(update.structure)), update.samples) for update in updates]
        voted = consensus.voted(layout, found, [update.sparsity for update in updates])
        return structures.to_bytes(layout, voted).hex()

    async def evaluate(self, job: LiveJob, number: int, state: Blob) -> None:
        """Measure the new state on the held-out file."""
        assert job.machine.prepared is not None
        heldout = expanded(job.spec.evaluation.heldout)
        try:
            structure = await self._means.disk.run(self._structure_of_round, job) if job.method.prunes else ""
            evaluation = await self._means.host.evaluate(
                job.machine.prepared.base_folder,
                job.recipe,
                self._means.blobs.path(state.digest),
                heldout,
                structure,
                triplets=job.machine.plan.ranking is not None,
            )
        except (FleetuneError, OSError) as error:
            if not await self._inspection.check_fresh_state(job):
                failure = error.failure if isinstance(error, HostError) else failure_of(error, "evaluate")
                self._means.post(job.job_id, machine.HostFailed("evaluating", failure))
            return
        self._means.post(job.job_id, machine.HeldoutEvaluated(number, evaluation))


@dataclass(frozen=True)
class _Cut:
    """What is left of a folded state, the same as PEFT loads it, and how much that is."""

    state: triplets.Written
    adapter: triplets.Written
    metrics: Mapping[str, float]


def _cut(state: Path, adapter: Path, alive: Mapping[str, str]) -> _Cut:
    """Takes the triplets that do not stay out of the state, in its place, and writes its adapter. On the fold thread."""
    written = triplets.sliced(state, state, alive)
    made = triplets.as_lora(state, adapter)
    left = ranking.left(alive)
    return _Cut(written, made, {TRIPLETS: float(sum(left.values())), MODULES: float(len(left))})

"""What devices send in: whether it still counts, whether it is what it should be, and the event that it becomes."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fleetune.coordinator import loraranks
from fleetune.coordinator.domain import DeviceFigures, Evaluation, Failure, Pruning, TaskEntry, Update
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.methods import fedara, fedspine
from fleetune.coordinator.registry import Registry
from fleetune.coordinator.rounds import aggregate, layouts, lorapairs, machine, ranking
from fleetune.coordinator.rounds.inspection import Inspection
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rounds.lorapairs import NO_LEEWAY, Leeway
from fleetune.coordinator.rounds.means import Means
from fleetune.coordinator.rounds.orders import Receipt
from fleetune.coordinator.store import records
from fleetune.errors import WireError
from fleetune.wire import codec

log = logging.getLogger("fleetune.engine")

SAMPLES_MAX = 2**32
"""Rows of one update; the fold's weights must stay whole numbers in float64 whatever the number of devices."""

Spawn = Callable[[LiveJob, Coroutine[object, object, None], str], None]
"""Starts work of a job beside the loop."""


class Admission:
    """Reads the jobs, changes none: what counts is handed in as an event."""

    def __init__(self, means: Means, registry: Registry, inspection: Inspection, spawn: Spawn) -> None:
        self._means = means
        self._registry = registry
        self._inspection = inspection
        self._spawn = spawn

    async def judge(self, task_id: str, device_id: str, digest: str) -> Receipt | None:
        """The receipt that an update already has, or None where it is still wanted. A late one is recorded by this."""
        job, name = self._job_of(task_id), parse_task_id(task_id)
        if job is None or name is None or not 1 <= name.round_number <= job.machine.committed + 1:
            return Receipt("refused", f"no job has a task {task_id[:200]!r}")
        if name.device_id != device_id:
            return Receipt("refused", f"task {task_id!r} is not this device's")
        if name.kind != "train":
            result = "figures" if name.kind == "measure" else "an evaluation"
            return Receipt("refused", f"task {task_id!r} has {result} for its result, not an update")
        entry = job.machine.open_task(task_id)
        if entry is not None and entry.status == "assigned":
            return None
        if entry is not None and entry.update is not None:
            return _same_or_other(entry.update.blob.digest, digest)
        row = await self._means.database.read(lambda c: records.find_update(c, task_id))
        if row is not None and row.status == "accepted":
            return _same_or_other(row.digest, digest)
        if row is None and device_id in self._registry.names.values():
            await self._means.ask(job.job_id, machine.UpdateLate(task_id, digest))
        return Receipt("late", "the round is over or has gone on without this device")

    async def take_update(self, task_id: str, device_id: str, update: Update, spooled: Path, storing: Awaitable[object]) -> Receipt:
        """Check a received update against the job's tensors and count it, once `storing` has made its blob durable, or raise its error.

        The check and the disk's flush take about as long and need different things, so they go side by side: `spooled` is where the bytes
        lie until `storing` moves them to the blob's place.
        """
        job = self._job_of(task_id)
        settled = await self.judge(task_id, device_id, update.blob.digest)
        if job is None or settled is not None:
            await storing
            return settled or Receipt("refused", "unknown job")
        table = await self._table(job)
        scores, unscored = _scores(job, update.report)
        places = (spooled, self._means.blobs.path(update.blob.digest))
        told = job.machine.round.pruning_of(device_id) if job.machine.round is not None else None
        limit = told.rank if told is not None else rank_limit(job, task_id)
        failure, found = (
            None,
            await asyncio.gather(self._means.disk.run(self._looked_at, job, told, limit, places, table), storing, return_exceptions=True),
        )
        if isinstance(found[1], BaseException):
            raise found[1]
        facts = found[0]
        if not 0 < update.samples <= SAMPLES_MAX:
            message = f"the update's weight (samples) is {update.samples}; 1 to {SAMPLES_MAX} are allowed."
            failure = Failure("internal", "upload", message)
        elif isinstance(facts, aggregate.NotFiniteUpdateError):
            failure = Failure("not_finite", "upload", str(facts))
        elif isinstance(facts, WireError):
            failure = Failure("model", "upload", str(facts))
        elif isinstance(facts, aggregate.UpdateFacts) and (wrong := unasked(job, device_id, facts) or unscored):
            failure = Failure("model", "upload", wrong)
        if failure is not None:
            await self._means.ask(job.job_id, machine.TaskFailed(task_id, failure))
            return Receipt("refused", failure.message)
        if isinstance(facts, BaseException):
            raise facts
        checked = replace(
            update, norm=facts.norm, kind=facts.kind, structure=facts.structure, sparsity=facts.sparsity, report=b"", scores=scores
        )
        if told is not None and fedspine.tells_importance(job.spec, job.machine.committed + 1):
            checked = replace(checked, importance=facts.importance)
        if (objection := job.machine.objection(checked, device_id)) is not None:
            await self._means.ask(job.job_id, machine.TaskFailed(task_id, objection))
            if device_id in job.machine.quarantined:
                log.warning("job=%s device=%s quarantined reason=%r", job.job_id, device_id, job.machine.quarantined[device_id])
            return Receipt("refused", objection.message)
        receipt = await self._means.ask(job.job_id, machine.UpdateArrived(task_id, checked))
        if receipt.status == "late":  # the round closed while the update was being checked
            await self._means.ask(job.job_id, machine.UpdateLate(task_id, update.blob.digest))
        return receipt

    async def take_evaluation(self, task_id: str, device_id: str, evaluation: Evaluation) -> Receipt:
        return await self._take(task_id, device_id, machine.EvaluationArrived(task_id, evaluation))

    async def take_figures(self, task_id: str, device_id: str, figures: DeviceFigures) -> Receipt:
        return await self._take(task_id, device_id, machine.FiguresArrived(task_id, figures))

    async def take_failure(self, task_id: str, device_id: str, failure: Failure) -> Receipt:
        job, entry = self._open_task(task_id)
        if failure.kind == "transfer" and job is not None and entry is not None and entry.device_id == device_id:
            if entry.kind == "evaluate":  # before the failure counts: it may be the last that the round waits for
                await self._inspection.check_fresh_state(job)
            self._spawn(job, self._inspection.after_failed_fetch(job), f"check {job.job_id}")
        return await self._take(task_id, device_id, machine.TaskFailed(task_id, failure))

    async def take_refusal(self, task_id: str, device_id: str, reason: str) -> Receipt:
        return await self._take(task_id, device_id, machine.TaskRefused(task_id, reason))

    async def add_log(self, task_id: str, device_id: str, device_name: str, lines: list[str]) -> None:
        job, name = self._job_of(task_id), parse_task_id(task_id)
        if job is None or name is None or name.device_id != device_id or name.round_number > job.machine.committed + 1:
            return
        now = self._means.wall()
        rows = [records.LogRow(now, job.job_id, name.round_number, device_name, line) for line in lines]
        await self._means.database.write(lambda tx: records.add_logs(tx, rows))

    async def _take(self, task_id: str, device_id: str, event: machine.Event) -> Receipt:
        job, name = self._job_of(task_id), parse_task_id(task_id)
        if job is None or name is None or name.device_id != device_id:
            return Receipt("refused", f"no task {task_id[:200]!r} of this device is known")
        if job.ended:
            return Receipt("late", "the job has ended")
        return await self._means.ask(job.job_id, event)

    def _looked_at(
        self, job: LiveJob, told: Pruning | None, rank: int, places: Sequence[Path], table: codec.TensorTable
    ) -> aggregate.UpdateFacts:
        """Blocks on disk."""
        prepared = job.machine.prepared
        if told is None or prepared is None:
            return inspected(places, table, Leeway(rank))
        layout = layouts.of_job(self._means.blobs, prepared, job.spec.lora.targets)
        facts = inspected(places, table, Leeway(rank, layout))
        return replace(facts, sparsity=layouts.reached(layout, told, facts.structure))

    async def _table(self, job: LiveJob) -> codec.TensorTable:
        assert job.machine.state is not None
        digest = job.machine.state.digest
        # Where adapters lose ranks each round's state has tensors of its own.
        if job.table is None or (job.machine.plan.ranking is not None and job.table_of != digest):
            table = await self._means.disk.run(codec.read_table, self._means.blobs.path(digest))
            job.table, job.table_of = table, digest
        return job.table

    def _job_of(self, task_id: str) -> LiveJob | None:
        return self._means.jobs.get(task_id.partition("/")[0])

    def _open_task(self, task_id: str) -> tuple[LiveJob | None, TaskEntry | None]:
        job = self._job_of(task_id)
        return job, job.machine.open_task(task_id) if job else None


def status_of(job: LiveJob, event: machine.Event) -> Receipt | None:
    """Whether a device's result still counts; None for events that are no results."""
    match event:
        case machine.UpdateArrived(task_id, update):
            entry = job.machine.open_task(task_id)
            if entry is not None and entry.update is not None:
                return _same_or_other(entry.update.blob.digest, update.blob.digest)
            wanted = entry is not None and entry.status == "assigned" and entry.kind == "train"
            return Receipt("accepted") if wanted else Receipt("late", "the round is over or has gone on without this device")
        case (
            machine.EvaluationArrived(task_id)
            | machine.FiguresArrived(task_id)
            | machine.TaskFailed(task_id)
            | machine.TaskRefused(task_id)
        ):
            entry = job.machine.open_task(task_id)
            if entry is None:
                return Receipt("late", "the round is over")
            if isinstance(event, machine.EvaluationArrived) and entry.kind != "evaluate":
                return Receipt("refused", f"task {task_id!r} has another result than an evaluation")
            if isinstance(event, machine.FiguresArrived) and entry.kind != "measure":
                return Receipt("refused", f"task {task_id!r} has another result than figures")
            return Receipt("accepted") if entry.status == "assigned" else Receipt("duplicate")
        case _:
            return None


@dataclass(frozen=True)
class TaskName:
    round_number: int
    device_id: str
    kind: str


def parse_task_id(task_id: str) -> TaskName | None:
    """The parts of "<job>/<round>/<device>/<kind>[/<attempt>]"; None for anything else, since the text comes from the network."""
    found = _TASK_ID.fullmatch(task_id)
    return TaskName(int(found[1]), found[2], found[3]) if found else None


_TASK_ID = re.compile(r"[^/]{1,100}/([1-9][0-9]{0,5})/([A-Za-z0-9-]{1,64})/(train|evaluate|measure)(?:/[0-9]{1,9})?", re.ASCII)


NAMES_TOLD = 3
"""Tensors that a complaint names."""


def unasked(job: LiveJob, device_id: str, facts: aggregate.UpdateFacts) -> str:
    """Why a sound update is not the one that the device was asked for, for a person; empty where it is.

    It must be of the method's kind, and in a planned round hold the tensors of the device's blocks, all of them and no others.
    """
    kinds = job.method.kinds(job.spec)
    if facts.kind not in kinds:
        asked = " or ".join(f"{kind}s" for kind in sorted(kinds))
        return f"the update holds {facts.kind}s; {asked} are asked for. Use the same version of Fleetune on both sides."
    entry, prepared = job.machine.round, job.machine.prepared
    if entry is not None and (fixed := _of_fixed_matrices(job, entry.number, facts.names)):
        return f"the update holds {_some(fixed)}, which no device trains in this round; only the other matrices of the pairs are asked for."
    if job.spec.method.aggregation == "fedsa" and (own := [name for name in facts.names if lorapairs.side_of(name) != "right"]):
        return f"the update holds {_some(own)}, which stays on its device in this job; only A of the pairs is asked for."
    part = entry.plan.part_of(device_id) if entry is not None and entry.plan is not None else None
    if part is None or prepared is None:
        return ""
    wanted = {name for depth in part.depths for name in prepared.blocks[depth - 1].tensors}
    found = set(facts.names)
    blocks = f"its blocks ({', '.join(prepared.blocks[depth - 1].name for depth in part.depths)})"
    if strange := sorted(found - wanted):
        return f"the update holds {_some(strange)}, which {'is' if len(strange) == 1 else 'are'} not of {blocks}; only those are asked for."
    if missing := sorted(wanted - found):
        return f"the update lacks {_some(missing)} of {blocks}; all of their tensors are asked for."
    return ""


def _scores(job: LiveJob, report: bytes) -> tuple[str, str]:
    """The scores of a round's triplets in a report from the network, as they are kept, and why they are refused, for a person."""
    entry = job.machine.round
    if job.machine.plan.ranking is None or entry is None:
        return "", ""
    try:
        found = fedara.scores(report)
    except WireError as error:
        return "", error.message
    wrong = ranking.objection(entry.ranks, found)
    return ("", wrong) if wrong else (ranking.packed(found), "")


def rank_limit(job: LiveJob, task_id: str) -> int:
    """The rank up to which a task's device may send LoRA pairs; 0 where they must have the state's own."""
    entry, name = job.machine.open_task(task_id), parse_task_id(task_id)
    if entry is None or name is None:
        return 0
    rule = job.method.fold(job.spec, name.round_number)
    return loraranks.rank_of(job.spec, entry.device_name) if isinstance(rule, LoraFold) and rule.narrower else 0


def _of_fixed_matrices(job: LiveJob, round_number: int, names: Sequence[str]) -> Sequence[str]:
    """Those of the names whose matrices a round leaves as they are."""
    rule = job.method.fold(job.spec, round_number)
    if not isinstance(rule, LoraFold) or rule.trained == "both":
        return []
    return [name for name in names if lorapairs.side_of(name) not in (None, rule.trained)]


def _some(names: Sequence[str]) -> str:
    """The first of many names."""
    told = ", ".join(repr(name) for name in names[:NAMES_TOLD])
    return told + (f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else "")


def inspected(places: Sequence[Path], expected: codec.TensorTable, leeway: Leeway = NO_LEEWAY) -> aggregate.UpdateFacts:
    """Facts of the update that lies at the first of `places`, or on its way from there at the second."""
    try:
        return aggregate.inspect(places[0], expected, leeway=leeway)
    except FileNotFoundError:
        return aggregate.inspect(places[1], expected, leeway=leeway)


def _same_or_other(known: str, digest: str) -> Receipt:
    if known == digest:
        return Receipt("duplicate")
    return Receipt("refused", f"this task's result was received before, with digest {known[:12]}; this one has {digest[:12]}.")

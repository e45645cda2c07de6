"""A job in the coordinator's memory: its file, its machine, its committed rounds and what its devices report meanwhile."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from fleetune.coordinator.domain import ENDED, PlanSettings, PruneSettings, RankSettings, RoundPlan
from fleetune.coordinator.jobsections import JobSpec
from fleetune.coordinator.methods.base import Method
from fleetune.coordinator.methods.table import METHODS
from fleetune.coordinator.registry import Needs
from fleetune.coordinator.rounds.history import History
from fleetune.coordinator.rounds.machine import JobMachine, JobPlan
from fleetune.coordinator.rounds.needs import JobFacts
from fleetune.v1 import messages_pb2
from fleetune.wire.codec import TensorTable


@dataclass
class Progress:
    """The last word of a device about its task. Lost by a restart; nothing decides by it but the stall check."""

    stage: int = 0
    done: int = 0
    total: int = 0
    loss: float | None = None
    moved_monotonic_s: float = 0.0


@dataclass
class LiveJob:
    """Written only by the engine, on the event loop."""

    job_id: str
    spec: JobSpec
    toml: str
    submit_id: str
    submitted_unix_s: float
    method: Method
    recipe: messages_pb2.Recipe
    machine: JobMachine
    history: History = field(default_factory=History)
    progress: dict[str, Progress] = field(default_factory=dict[str, Progress])
    predicted_round: tuple[int, float] | None = None
    """A round, and the seconds that its plan expects from its opening to its commit; set where a plan tells, for the metrics to compare."""
    table: TensorTable | None = None
    table_of: str = ""
    """Digest of the state whose tensors `table` tells."""
    keep_rounds: int = 3
    """Rounds kept beside the best: as configured, or fewer where an operator has trimmed it."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    version: int = 0
    host_stage: str = ""
    work: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    """What runs off the loop for this job: preparing, folding, publishing."""
    on_host: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    """Those of them that keep the model host busy: an ended job has no use for them."""
    checking: bool = False
    """Its blobs are being read through after a device could not use what it fetched."""
    suspect: bool = False
    """Something that the open round stands on was found damaged: all of it is read before it is folded."""
    publishing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Folders are written and dropped in the order of their rounds."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the job has ended and its last folder is written."""

    @property
    def ended(self) -> bool:
        return self.machine.status in ENDED

    @property
    def needs(self) -> Needs:
        name = self.spec.data.name if self.method.needs_model else ""
        return Needs(self.method.name, name, frozenset(self.spec.devices.tags))

    @property
    def facts(self) -> JobFacts:
        """What is to be known of it to tell what it stands on."""
        return JobFacts(self.job_id, self.machine, self.history, self.keep_rounds)

    def expect(self, plan: RoundPlan, now: float) -> None:
        """Note what the open round's plan predicts of it, from its opening on: what it has taken so far, its training, and what the last
        round took after its training."""
        entry, last = self.machine.round, self.history.last
        assert entry is not None
        after_s = 0.0
        if last is not None and last.training_since_unix_s > 0:
            sent = [task.update.ready_s + task.update.sent_s for task in last.trained() if task.update]
            after_s = max(0.0, last.ended_unix_s - last.training_since_unix_s - max(sent, default=0.0))
        self.predicted_round = (entry.number, now - entry.started_unix_s + plan.round_s + after_s)

    def touch(self) -> None:
        """Wake those who watch."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()


def plan_of(job_id: str, spec: JobSpec, absent_grace_s: float) -> JobPlan:
    """What the round machine must know of a job file."""
    default_metric = "accuracy" if spec.task.kind == "text-classification" else "loss"
    return JobPlan(
        job_id=job_id,
        rounds=spec.rounds.count,
        minimum=spec.devices.minimum,
        per_round=spec.devices.per_round,
        quorum=spec.rounds.quorum,
        deadline_s=spec.rounds.deadline_s,
        wait_s=spec.devices.wait_s,
        seed=spec.seed,
        evaluation=spec.evaluation.source,
        evaluate_every=spec.evaluation.every,
        metric=spec.evaluation.metric or default_metric,
        update_norm_bound=spec.rounds.update_norm_bound,
        patience=spec.rounds.early_stop_patience,
        min_delta=spec.rounds.early_stop_min_delta,
        absent_grace_s=absent_grace_s,
        planning=plan_settings(spec) if METHODS[spec.method.name].plans else None,
        pruning=prune_settings(spec) if METHODS[spec.method.name].prunes else None,
        ranking=rank_settings(spec) if spec.method.name == "fedara" else None,
    )


def rank_settings(spec: JobSpec) -> RankSettings:
    """How a job file wants its adapters to lose ranks."""
    method = spec.method
    return RankSettings(method.ranks_end, method.warm_share, method.final_share, method.arbitration, method.vote_threshold)


def prune_settings(spec: JobSpec) -> PruneSettings:
    """How a job file wants the model pruned."""
    method = spec.method
    return PruneSettings(
        target=method.sparsity,
        steps=spec.training.steps,
        tau=method.prune_every,
        step_max=method.prune_step,
        recovery_rounds=method.recovery_rounds,
        shares=method.importance == "fleet",
        warm_rounds=method.uncut_rounds,
        choice=method.arms,
        pace=method.pace,
        rank=spec.lora.rank,
        rank_min=min(method.rank_min or math.ceil(spec.lora.rank / 2), spec.lora.rank),
        rank_max=spec.lora.rank,
        exploration=method.exploration,
        deadline_s=spec.rounds.deadline_s,
    )


def plan_settings(spec: JobSpec) -> PlanSettings:
    """How a job file wants its rounds planned."""
    method = spec.method
    steps = spec.training.steps if method.payload == "deltas" else 1
    return PlanSettings(
        layout=method.layout,
        solver=method.solver,
        layers_per_block=method.layers_per_block,
        resource=method.resource,
        uplink_bits_per_s=method.uplink_mbps * 1e6,
        rotate_rounds=method.rotate_rounds,
        deadline_factor=method.deadline_factor,
        spares=method.spares,
        passes=max(1, steps) * spec.training.gradient_accumulation,
        rows=spec.training.batch_size,
        value_bits=32 if method.update_dtype == "float32" else 16,
    )

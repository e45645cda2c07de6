"""The coordinator's nouns: facts about devices, tasks, updates and rounds, free of any transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

JobStatus = Literal["queued", "preparing", "waiting", "running", "paused", "completed", "failed", "cancelled"]
ENDED: frozenset[JobStatus] = frozenset({"completed", "failed", "cancelled"})

Phase = Literal["measuring", "training", "folding", "evaluating", "committed"]
TaskKind = Literal["train", "evaluate", "measure"]
TaskStatus = Literal["assigned", "done", "failed", "refused", "missed"]
EvaluationSource = Literal["devices", "heldout", "none"]

UpdateKind = Literal["delta", "state", "gradient"]
Layout = Literal["blocks", "depth", "data-parallel", "single"]
"""Who trains what in a planned round: one block each; from the loss down to a depth each; everything on all; everything on one."""

PlanSolver = Literal["exact", "crunch-equal", "dual", "random-equal", "greedy-equal"]

Metrics = dict[str, float]

FailureKind = Literal[
    "data", "model", "out_of_memory", "not_finite", "disk_full", "crash", "unsupported", "transfer", "internal", "stalled", "norm"
]
LASTING: frozenset[FailureKind] = frozenset({"data", "model", "unsupported"})
"""Failures that the same task would meet again on the same device."""


@dataclass(frozen=True)
class Blob:
    """Content address and size of bytes in the store."""

    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Failure:
    """Why a task ended without a result, as the device told it."""

    kind: FailureKind
    stage: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class DeviceFigures:
    """What training costs a device on a job's model, as it told; tuples are by depth from the loss, index 0 next to it."""

    batch_rows: int
    step_s: tuple[float, ...]
    step_bytes: tuple[int, ...]
    loaded_bytes: int
    room_bytes: int
    """What its training process may take, the loaded model included; 0 is no bound."""
    forward_s: float = 0.0
    only_deepest: bool = False
    source: str = "measured"
    age_s: float = 0.0
    ratio: float = 1.0
    margin: float = 1.0
    flops_per_s: float = 0.0
    peak_flops_per_s: float = 0.0
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class LinkFigures:
    """What a device's link carries, in payload bits per second and seconds; 0 is not known."""

    up_bits_per_s: float = 0.0
    down_bits_per_s: float = 0.0
    round_trip_s: float = 0.0
    source: str = ""
    age_s: float = 0.0
    metered: bool = False


@dataclass(frozen=True)
class DepthBlock:
    """The trainable tensors at one depth from the loss."""

    name: str
    """What people call it, for example "layer.5"."""
    tensors: tuple[str, ...]
    values: int
    """Numbers in them."""


@dataclass(frozen=True)
class PlanSettings:
    """How a job's rounds are planned; None in a job whose method does not plan."""

    layout: Layout | Literal["auto"] = "blocks"
    solver: PlanSolver = "exact"
    layers_per_block: int = 1
    """Neighbouring depths that go to a device as one; the head stays a block of its own."""
    resource: Literal["ingress", "airtime"] = "ingress"
    uplink_bits_per_s: float = 0.0
    """What all uploads may take together, for ingress; 0 is no common bound."""
    rotate_rounds: int = 0
    deadline_factor: float = 1.5
    """Times the predicted round's seconds; 0 is no deadline by the plan."""
    spares: bool = True
    passes: int = 1
    """Forward and backward passes of a task."""
    rows: int = 1
    """Of one pass."""
    value_bits: int = 32
    """Of a number on the wire."""


@dataclass(frozen=True)
class PruneSettings:
    """How a job prunes while it trains; None in a job whose method does not prune."""

    target: float = 0.5
    """Sparsity in the end: the share of heads and neurons that is cut."""
    steps: int = 60
    """Local steps of a round."""
    tau: int = 20
    """Steps after each cut."""
    step_max: float = 0.1
    """Sparsity that one round may add."""
    recovery_rounds: int = 2
    """The last ones, in which nothing is cut where it can be helped."""
    shares: bool = False
    """Whether all cut by what matters to the fleet, which the updates of a round tell."""
    warm_rounds: int = 0
    """The first ones, in which nothing is cut; at least 1 where `shares`."""
    choice: Literal["bandit", "fixed"] = "bandit"
    pace: float = 0.5
    """Of all devices where the choice is fixed: the share of what may be cut in a round."""
    rank: int = 8
    """The same; and the largest one of the bandit."""
    rank_min: int = 2
    rank_max: int = 8
    exploration: float = 0.1
    discount: float = 0.98
    deadline_s: float = 0.0
    """Of a round; 0 is none."""


@dataclass(frozen=True)
class Pruning:
    """What one device was told to prune in a round, and its LoRA's rank."""

    device_id: str
    structure: str
    """Hex of what its model kept when the round began; empty: everything."""
    sparsity_before: float
    sparsity_after: float
    pace: float
    rank: int
    note: str = ""
    """Why the device was not free to choose, for a person."""
    hardware: str = ""
    """The device's class of hardware."""


@dataclass(frozen=True)
class RankSettings:
    """How a job's adapters lose ranks; None in a job whose method keeps them."""

    end: float = 0.25
    """The share of all triplets that is left in the end."""
    warm_share: float = 0.1
    """Of the rounds, before the fall."""
    final_share: float = 0.3
    """Of the rounds, after it."""
    arbitration: Literal["score", "vote"] = "score"
    threshold: float = 0.5
    """Of the votes that a triplet needs to come first."""
    first: int = 0
    """Triplets in the beginning; known once the first state is made."""


@dataclass(frozen=True)
class PlannedPart:
    """One device's part of a planned round. Times are from the round's training start, as predicted."""

    device_id: str
    depths: tuple[int, ...]
    """Depths trained, from 1, next to the loss, ascending."""
    share: float
    uplink_bits_per_s: float
    """Its rate by the plan; 0 is no bound."""
    ready_s: float
    finish_s: float


@dataclass(frozen=True)
class RoundPlan:
    """What was decided before a round's training; stored with the round, so that a task given again is the same task."""

    layout: Layout
    solver: str
    parts: tuple[PlannedPart, ...]
    round_s: float
    uncovered_depths: tuple[int, ...] = ()
    """Depths that nobody can train in this round, ascending; their weights stay as they are."""
    idle_devices: tuple[str, ...] = ()
    idle_names: tuple[str, ...] = ()
    """Of the first of them, for people."""
    lower_bound_s: float | None = None
    predictions: tuple[tuple[str, float | None, float | None], ...] = ()
    """Layout or method, its predicted round seconds, its predicted seconds per full-gradient row; None where the fleet cannot run it."""
    reason: str = ""
    """Why this layout, for a person."""
    rounds_avoided: int = 0
    """How many of the last rounds' pairs of device and block the rotation has kept apart."""

    def depths(self) -> frozenset[int]:
        """Every depth that somebody was asked to train."""
        return frozenset(depth for part in self.parts for depth in part.depths)

    def part_of(self, device_id: str) -> PlannedPart | None:
        return self._by_device.get(device_id)

    @cached_property
    def _by_device(self) -> dict[str, PlannedPart]:
        return {part.device_id: part for part in self.parts}


@dataclass(frozen=True)
class Candidate:
    """A device that may take a task now."""

    device_id: str
    name: str
    trains: bool = True
    """It has rows of the job's data to train on, or the job needs none."""
    evaluates: bool = True
    """The same of rows to measure on."""
    link: LinkFigures = LinkFigures()
    hardware: str = ""
    """Its class of hardware: what its owner calls it, else its board, its accelerator or its kind of processor."""


@dataclass(frozen=True)
class PlanRequest:
    """Everything that the plan of one round follows from."""

    settings: PlanSettings
    round_number: int
    seed: int
    blocks: tuple[DepthBlock, ...]
    """By depth, index 0 next to the loss."""
    state_bytes: int
    """What a device fetches before it trains."""
    candidates: tuple[Candidate, ...]
    figures: Mapping[str, DeviceFigures]
    extra_s: Mapping[str, float]
    """Device id -> seconds by which its uploads begin later than its figures say."""
    untrained_rounds: tuple[int, ...]
    """By depth: rounds since it was last trained."""
    turns: tuple[Mapping[int, str], ...] = ()
    """For each of the last rounds in which each depth had one device: depth -> device id, the newest last."""


@dataclass(frozen=True)
class Update:
    """A train task's committed result."""

    blob: Blob
    samples: int
    metrics: Metrics = field(default_factory=dict[str, float])
    seconds: Metrics = field(default_factory=dict[str, float])
    peak_rss_bytes: int = 0
    norm: float = 0.0
    kind: UpdateKind = "state"
    """Only deltas are held to a norm: a state may be of any size."""
    ready_s: float = 0.0
    """Seconds from the task's sending until its upload began; 0 where that is not known, as after a restart."""
    sent_s: float = 0.0
    """Seconds of the upload."""
    figures: DeviceFigures | None = None
    structure: str = ""
    """Hex of what the device's model keeps; empty in jobs that do not prune, and where nothing is cut."""
    sparsity: float = 0.0
    importance: str = ""
    """How much its heads and neurons matter, as `importances.to_text` writes it; empty where it was not asked for or is not known."""
    report: bytes = b""
    """What the method says of itself, until it is checked; nothing of it is kept."""
    scores: str = ""
    """Hex of a float16 for each triplet, modules in the order of their names; empty in jobs that keep their ranks."""


@dataclass(frozen=True)
class Evaluation:
    """Figures measured on `rows` rows."""

    metrics: Metrics
    rows: int


@dataclass(frozen=True)
class Prepared:
    """What the model host made of a job before its first round. `base_digest` is empty for methods without a model."""

    state: Blob
    trainables_digest: str
    base_digest: str = ""
    hub_id: str = ""
    revision: str = ""
    base_name: str = ""
    base_folder: str = ""
    files: tuple[tuple[str, str, int], ...] = ()
    adapter_config: str = ""
    parameters: int = 0
    trainable_parameters: int = 0
    initial: Evaluation | None = None
    blocks: tuple[DepthBlock, ...] = ()
    """The trainable tensors by depth from the loss, index 0 next to it; empty for methods without a model."""
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    """Module -> triplets of its adapter; empty where adapters are no triplets."""


@dataclass(frozen=True)
class FoldOutcome:
    """A finished fold: the new global state and, with a server optimiser, its state."""

    state: Blob
    optimizer: Blob | None = None
    coverage_min: int = 0
    update_norm: float = 0.0
    metrics: Metrics = field(default_factory=dict[str, float])
    """What the fold tells of itself, as how far a mean of LoRA pairs is from the exact one."""
    adapter: Blob | None = None
    """The state as PEFT loads it, where it is not the state itself."""
    trainables_digest: str = ""
    """Of the state, where its tensors are others than those that the job began with."""


@dataclass
class TaskEntry:
    """One device's part in the open round. Written only by the round machine."""

    task_id: str
    device_id: str
    device_name: str
    kind: TaskKind
    lease: int
    status: TaskStatus = "assigned"
    assigned_unix_s: float = 0.0
    offline_since_unix_s: float = 0.0
    update: Update | None = None
    evaluation: Evaluation | None = None
    failure: Failure | None = None
    reason: str = ""


@dataclass
class RoundEntry:
    """The open round, and each committed one as its record. Written only by the round machine."""

    number: int
    phase: Phase
    started_unix_s: float
    deadline_unix_s: float = 0.0
    tasks: dict[str, TaskEntry] = field(default_factory=dict[str, TaskEntry])
    start_state: Blob | None = None
    state: Blob | None = None
    optimizer: Blob | None = None
    metrics: Metrics = field(default_factory=dict[str, float])
    evaluation_rows: int = 0
    fold_metrics: Metrics = field(default_factory=dict[str, float])
    """What the fold told of itself; nothing is decided by it."""
    late: int = 0
    update_norm: float = 0.0
    norm_limit: float = 0.0
    """The largest norm that a device's update may have; 0 is no bound. Fixed when the round is opened."""
    plan: RoundPlan | None = None
    prunings: tuple[Pruning, ...] = ()
    """What its devices were told to prune, in device-id order; none in jobs that do not."""
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    """Module -> triplets that its adapter had when the round began; empty in jobs that keep their ranks."""
    alive: dict[str, str] = field(default_factory=dict[str, str])
    """Module -> a 1 for each of these that stays, a 0 for each that goes; decided when all updates were there."""
    adapter: Blob | None = None
    """The new state as PEFT loads it, where it is not the state itself."""
    trainables_digest: str = ""
    """Of the new state, where its tensors are others than those that the job began with."""
    training_since_unix_s: float = 0.0
    """When the planned training began; 0 in rounds without a plan."""
    ended_unix_s: float = 0.0

    @property
    def working_since_unix_s(self) -> float:
        """When its devices began to train: measuring them first, which only a first round waits for long, tells nothing of other rounds."""
        return self.training_since_unix_s or self.started_unix_s

    @property
    def published(self) -> Blob | None:
        """The tensors of the round's adapter folder."""
        return self.adapter or self.state

    def pruning_of(self, device_id: str) -> Pruning | None:
        return next((pruning for pruning in self.prunings if pruning.device_id == device_id), None)

    def trained(self) -> list[TaskEntry]:
        """Tasks whose update counts in this round, in device-id order."""
        done = [task for task in self.tasks.values() if task.kind == "train" and task.update is not None]
        return sorted(done, key=lambda task: task.device_id)

    def train_loss(self) -> float | None:
        """Mean training loss weighted by samples, or None where no update told one."""
        pairs = [(t.update.metrics["loss"], t.update.samples) for t in self.trained() if t.update and "loss" in t.update.metrics]
        total = sum(samples for _, samples in pairs)
        return sum(loss * samples for loss, samples in pairs) / total if total else None

    def upload_bytes(self) -> int:
        return sum(task.update.blob.size_bytes for task in self.trained() if task.update)

    def download_bytes(self) -> int:
        """Bytes of global state that the devices of this round needed: each fetches a state once."""
        fetched = {(t.device_id, t.kind) for t in self.tasks.values() if t.status != "refused"}
        start = self.start_state.size_bytes if self.start_state else 0
        return sum(start for _, kind in fetched if kind == "train")

"""The round machine of one job: events in, commands out, no I/O.

    queued -> preparing -> waiting <-> running (training -> folding -> evaluating -> committed) -> completed | failed | cancelled
       ^                      ^___________ paused ___________|
       |____________________________________| resumed while as many jobs run as may

Rounds of a method that plans begin with "measuring": devices whose figures are not known tell them, then the round's plan is asked for
(`PlanRound`, answered by `Planned`), and only the devices in it train.

Everything that happens to a job reaches `JobMachine.handle` as an event with the time it happened; what is to be done about it
comes back as commands, which the engine carries out only after the new state is committed. All of a machine's state is plain
data (`snapshot` / `restore`), so that a restarted coordinator goes on with the open round.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fleetune.coordinator.domain import (
    ENDED,
    LASTING,
    Blob,
    Candidate,
    DeviceFigures,
    Evaluation,
    EvaluationSource,
    Failure,
    FoldOutcome,
    JobStatus,
    Metrics,
    PlannedPart,
    PlanRequest,
    PlanSettings,
    Prepared,
    PruneSettings,
    Pruning,
    RankSettings,
    RoundEntry,
    RoundPlan,
    TaskEntry,
    TaskKind,
    TaskStatus,
    Update,
)
from fleetune.coordinator.rounds import arms, fleetimportance, normbound, ranking, timing
from fleetune.coordinator.rounds.arms import Spine

ROUND_ATTEMPTS = 5
"""A round that misses its quorum is opened again this often before the job fails."""

DEVICE_FAILURES = 3
"""Failures in a row after which a device gets no more tasks of this job."""

MEASURING_S = 1800.0
"""A round waits so long for devices to tell how fast they train, whatever its deadline: the base may have to be fetched first."""

PLAN_SLACK_S = 5.0
"""Added to a deadline by the plan: a short round's prediction is off by more than a part of itself."""

FIRST_SLACK_S = 300.0
"""The same where a device has no update of this job in yet: it may have to fetch the base, and to load the model."""

PLAN_AGAIN_S = 30.0
"""A fleet that cannot train any block is looked at again after this; sooner where other devices are ready."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})

PAUSED = "paused by an operator"
PAUSES_LATER = "pauses after this round"
PAUSED_IN_LINE = "paused by an operator before its turn"
RESUMED_IN_LINE = "resumed; waits for its turn"


@dataclass(frozen=True)
class JobPlan:
    """What the machine must know of the job file."""

    job_id: str
    rounds: int
    minimum: int
    per_round: int
    quorum: float
    deadline_s: float
    wait_s: float
    seed: int
    evaluation: EvaluationSource
    evaluate_every: int
    metric: str
    patience: int
    min_delta: float
    absent_grace_s: float
    update_norm_bound: float = 0.0
    """An update's largest norm as a multiple of the last rounds' median; 0 is no bound."""
    planning: PlanSettings | None = None
    """How rounds are planned; None: every device that is asked does the same."""
    pruning: PruneSettings | None = None
    """How devices prune while they train; None: they do not."""
    ranking: RankSettings | None = None
    """How adapters lose ranks; None: they keep them."""


# --- events ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """The job's turn has come."""


@dataclass(frozen=True)
class PreparedEvent:
    prepared: Prepared


@dataclass(frozen=True)
class HostFailed:
    """Preparing, folding or evaluating on the coordinator went wrong."""

    stage: str
    failure: Failure


@dataclass(frozen=True)
class Offered:
    """Devices that may take a task now; the machine takes what it needs."""

    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class UpdateArrived:
    """A verified, durable update of an open task."""

    task_id: str
    update: Update


@dataclass(frozen=True)
class UpdateLate:
    """An update whose round or task is over: recorded, not folded."""

    task_id: str
    digest: str


@dataclass(frozen=True)
class UpdateDamaged:
    """An accepted update's bytes are no longer what they were. `lease` is the one under which it was accepted."""

    task_id: str
    lease: int
    online: bool = False
    """Whether its device is connected as of now."""


@dataclass(frozen=True)
class StateDamaged:
    """What the fold of a round in evaluation has made is no longer what it was."""

    round_number: int


@dataclass(frozen=True)
class EvaluationArrived:
    task_id: str
    evaluation: Evaluation


@dataclass(frozen=True)
class FiguresArrived:
    """What a measure task has found."""

    task_id: str
    figures: DeviceFigures


@dataclass(frozen=True)
class Planned:
    """The answer to `PlanRound` of this number: a plan, or why there is none. `gone` are those that it was made over and that have left."""

    asked: int
    plan: RoundPlan | None
    reason: str = ""
    gone: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SparesOffered:
    """The answer to `SeekSpares`: devices that are free as of now."""

    round_number: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class TaskFailed:
    task_id: str
    failure: Failure


@dataclass(frozen=True)
class TaskRefused:
    task_id: str
    reason: str


@dataclass(frozen=True)
class DeviceOffline:
    device_id: str


@dataclass(frozen=True)
class DeviceOnline:
    """The device is back; `held` are the ids of tasks that it still works on or has finished."""

    device_id: str
    held: frozenset[str]


@dataclass(frozen=True)
class Folded:
    """The fold of `round_number` is done; `candidates` may evaluate it. `absent`: devices of the round that are not connected."""

    round_number: int
    outcome: FoldOutcome
    candidates: tuple[Candidate, ...]
    absent: frozenset[str] = frozenset()


@dataclass(frozen=True)
class HeldoutEvaluated:
    round_number: int
    evaluation: Evaluation


@dataclass(frozen=True)
class Ticked:
    """Time has passed; deadlines are looked at."""


@dataclass(frozen=True)
class CancelRequested:
    reason: str


@dataclass(frozen=True)
class PauseRequested:
    pass


@dataclass(frozen=True)
class ResumeRequested:
    turn: bool = True
    """Whether there is a place among the jobs that run at once; without one the job gets in line again."""


@dataclass(frozen=True)
class Restarted:
    """The coordinator has restarted: commands whose effect was only in memory are given again."""

    state_damaged: bool = False
    """Whether what the fold of a round in evaluation has made is no longer what it was."""


Event = (
    Started
    | PreparedEvent
    | HostFailed
    | Offered
    | UpdateArrived
    | UpdateLate
    | UpdateDamaged
    | StateDamaged
    | EvaluationArrived
    | FiguresArrived
    | Planned
    | SparesOffered
    | TaskFailed
    | TaskRefused
    | DeviceOffline
    | DeviceOnline
    | Folded
    | HeldoutEvaluated
    | Ticked
    | CancelRequested
    | PauseRequested
    | ResumeRequested
    | Restarted
)


# --- commands -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepare:
    """Make the initial state (and measure it on the held-out set, if there is one)."""


@dataclass(frozen=True)
class SendTask:
    task_id: str
    device_id: str
    kind: TaskKind
    round_number: int
    lease: int
    state: Blob
    deadline_unix_s: float
    part: PlannedPart | None = None
    """What the round's plan says of it; None for tasks without a plan."""
    trainables_digest: str = ""
    """Of `state`, where its tensors are others than those that the job began with."""


@dataclass(frozen=True)
class PlanRound:
    """Decide who trains what, and answer with `Planned`."""

    asked: int
    request: PlanRequest


@dataclass(frozen=True)
class SeekSpares:
    """A device has dropped out of a planned round: say which ones are free, with `SparesOffered`."""

    round_number: int


@dataclass(frozen=True)
class WithdrawTask:
    """Tell the device to drop the task."""

    task_id: str
    device_id: str
    reason: str


@dataclass(frozen=True)
class Contribution:
    device_id: str
    blob: Blob
    weight: int


@dataclass(frozen=True)
class Fold:
    round_number: int
    state: Blob
    optimizer: Blob | None
    contributions: tuple[Contribution, ...]
    alive: Mapping[str, str] = field(default_factory=dict[str, str])
    """Module -> which of its triplets stay; empty in jobs that keep their ranks."""


@dataclass(frozen=True)
class EvaluateHeldout:
    round_number: int
    state: Blob


@dataclass(frozen=True)
class CommitRound:
    """The round is over for good; its record is stored with the same transaction."""

    entry: RoundEntry


@dataclass(frozen=True)
class AbandonRound:
    """The round missed its quorum; its updates are not folded."""

    entry: RoundEntry
    reason: str


@dataclass(frozen=True)
class EndJob:
    status: JobStatus


Command = Prepare | SendTask | PlanRound | SeekSpares | WithdrawTask | Fold | EvaluateHeldout | CommitRound | AbandonRound | EndJob


# --- the machine ----------------------------------------------------------------------------------------------------------------


@dataclass
class JobMachine:
    """State of one job and the rules by which it changes. Written only through `handle`.

    Invariants (`validate`): `round` is set exactly while a round is open; a task is in `round.tasks` under its own id; leases
    only grow; an ended job has no open round; a planned round trains exactly what its plan says, each device once.
    """

    plan: JobPlan
    status: JobStatus = "queued"
    message: str = ""
    round: RoundEntry | None = None
    committed: int = 0
    attempts: int = 0
    """Times the next round was opened and abandoned; part of its task ids."""
    setbacks: int = 0
    """Those of them that count against ROUND_ATTEMPTS: not the ones that only owners' refusals ended."""
    lease: int = 0
    prepared: Prepared | None = None
    state: Blob | None = None
    optimizer: Blob | None = None
    best_round: int = 0
    best_value: float | None = None
    rounds_without_gain: int = 0
    failures_in_row: dict[str, int] = field(default_factory=dict[str, int])
    excluded: dict[str, str] = field(default_factory=dict[str, str])
    """Device id -> why it gets no more train tasks of this job."""
    norms: list[list[float]] = field(default_factory=list[list[float]])
    """Norms of the delta updates of the last committed rounds, a list for each round."""
    block_norms: dict[str, list[list[float]]] = field(default_factory=dict[str, list[list[float]]])
    """The same of planned rounds, by the blocks trained: those of the last rounds in which these were a device's part."""
    offences: dict[str, int] = field(default_factory=dict[str, int])
    """Device id -> updates of this job that were beyond the bound."""
    quarantined: dict[str, str] = field(default_factory=dict[str, str])
    """Device id -> its name and why, for a person; these are excluded, too."""
    unmeasured: dict[str, str] = field(default_factory=dict[str, str])
    """Device id -> why it gets no more evaluate tasks of this job."""
    last_failure: Failure | None = None
    last_failure_device: str = ""
    spines: dict[str, Spine] = field(default_factory=dict[str, Spine])
    """Device id -> what it has pruned, and what is known of its arms; in jobs that prune."""
    importance: str = ""
    """How much heads and neurons matter to the fleet, as `importances.to_text` writes it; in jobs that prune by it, once it is known."""
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    """Module -> triplets that its adapter has now; in jobs whose adapters lose some."""
    trainables_digest: str = ""
    """Of the state, where its tensors are others than those that the job began with."""
    figures: dict[str, DeviceFigures] = field(default_factory=dict[str, DeviceFigures])
    """Device id -> what it last told of itself on this job's model; for plans."""
    extra_s: dict[str, float] = field(default_factory=dict[str, float])
    """Device id -> by how much later than its figures say its uploads begin, seconds; a moving average."""
    depths_failed: dict[str, int] = field(default_factory=dict[str, int])
    """Device id -> the shallowest depth for which its memory was not enough, whatever its figures say."""
    newcomers: dict[str, TaskEntry] = field(default_factory=dict[str, TaskEntry])
    """Open measure tasks beside the rounds, by id: of devices whose figures are not known while those of enough others are."""
    sought_out: list[str] = field(default_factory=list[str])
    """Devices that were asked so since the open round began: none is asked twice in one round."""
    held: tuple[Candidate, ...] = ()
    """Devices that the open round may be planned over; none once it is planned."""
    plans_asked: int = 0
    """Number of the last `PlanRound`: answers to older ones are not taken."""
    seeking: list[str] = field(default_factory=list[str])
    """Train tasks of the open round that have failed, and for which a spare is sought."""
    depth_rounds: list[int] = field(default_factory=list[int])
    """By depth: the last committed round in which it was trained; 0 before the first."""
    turns: list[dict[int, str]] = field(default_factory=list[dict[int, str]])
    """For the last committed rounds in blocks: depth -> device id, as many as the rotation looks back."""
    unplannable: tuple[str, ...] = ()
    """Devices with which no plan was found at the last attempt."""
    no_plan: str = ""
    """Why not, for a person."""
    retry_unix_s: float = 0.0
    """When that is tried again with the same devices."""
    waiting_since_unix_s: float = 0.0
    paused: bool = False
    started_unix_s: float = 0.0
    ended_unix_s: float = 0.0

    # -- what others may ask

    def open_task(self, task_id: str) -> TaskEntry | None:
        return self.newcomers.get(task_id) or (self.round.tasks.get(task_id) if self.round else None)

    def busy_devices(self) -> set[str]:
        """Devices that hold an open task of this job."""
        measured = {task.device_id for task in self.newcomers.values()}
        if self.round is None:
            return measured
        planning_over = {candidate.device_id for candidate in self.held}
        return measured | planning_over | {task.device_id for task in self.round.tasks.values() if task.status == "assigned"}

    def next_deadline_unix_s(self) -> float | None:
        """When `Ticked` is worth sending next."""
        times: list[float] = []
        if self.status == "waiting" and self.plan.wait_s > 0:
            times.append(self.waiting_since_unix_s + self.plan.wait_s)
        if self.status == "waiting" and self.retry_unix_s > 0:
            times.append(self.retry_unix_s)
        # Only open tasks have something to miss: a fold or a held-out evaluation goes on past the devices' deadline.
        waited_for = [task for task in self.round.tasks.values() if task.status == "assigned"] if self.round is not None else []
        if self.round is not None and waited_for:
            if self.round.deadline_unix_s > 0:
                times.append(self.round.deadline_unix_s)
            times += [t.offline_since_unix_s + self.plan.absent_grace_s for t in waited_for if t.offline_since_unix_s > 0]
        for task in self.newcomers.values():
            times.append(task.assigned_unix_s + MEASURING_S)
            if task.offline_since_unix_s > 0:
                times.append(task.offline_since_unix_s + self.plan.absent_grace_s)
        return min(times) if times else None

    def objection(self, update: Update, device_id: str = "") -> Failure | None:
        """Why an update of the open round must not be folded; it then comes as TaskFailed. The same whatever else has arrived."""
        if self.round is None or update.kind != "delta":
            return None
        limit = self.round.norm_limit
        if self.round.plan is not None:
            part = self.round.plan.part_of(device_id)
            before = self.block_norms.get(normbound.blocks_key(part.depths), []) if part is not None else []
            limit = normbound.limit(before, self.plan.update_norm_bound)
        wrong = normbound.objection(update.norm, limit, self.plan.update_norm_bound)
        return Failure("norm", "upload", wrong) if wrong else None

    def prunings(self, kind: TaskKind) -> tuple[Pruning, ...]:
        """What the devices of the open round's tasks of a kind prune: those who train by their arms; who measures cuts nothing, and
        measures what is left of the model on that device by now."""
        if self.round is None or self.plan.pruning is None:
            return ()
        if kind != "evaluate":
            return self.round.prunings
        made = {task.device_id: task.update for task in self.round.trained()}
        devices = sorted(task.device_id for task in self.round.tasks.values() if task.kind == "evaluate")
        return tuple(arms.measured(self.plan.pruning, self.spines.get(device), made.get(device), device) for device in devices)

    def ranks_of(self, kind: TaskKind) -> dict[str, int]:
        """The ranks of the state that tasks of a kind begin with, in the open round: who measures has what is left after the fold."""
        if self.round is None or self.plan.ranking is None:
            return {}
        return ranking.left(self.round.alive) if kind == "evaluate" else self.round.ranks

    def wants_devices(self) -> bool:
        return self.status == "waiting" and not self.paused

    def wants_newcomers(self) -> bool:
        """Whether devices that it has not measured may be offered although a round is open, since there is a plan to come."""
        if self.plan.planning is None or self.round is None or self.paused:
            return False
        return self.round.phase != "measuring" and self.round.number < self.plan.rounds

    # -- what happens

    def handle(self, event: Event, now: float) -> list[Command]:
        """Apply `event`, which happened at unix time `now`; what does not fit the state is ignored, since messages may come late."""
        if self.status in ENDED:
            return []
        commands = self._apply(event, now)
        self.validate()
        return commands

    def _apply(self, event: Event, now: float) -> list[Command]:
        match event:
            case Started():
                return self._start(now)
            case PreparedEvent(prepared):
                return self._accept_prepared(prepared, now)
            case HostFailed(stage, failure):
                self.last_failure, self.last_failure_device = failure, ""
                return self._end("failed", f"{stage} failed on the coordinator: {failure.message}", now)
            case Offered(candidates):
                return self._measure_beside(candidates, now) if self.wants_newcomers() else self._open_round(candidates, now)
            case UpdateArrived(task_id, update):
                return self._accept_update(task_id, update, now)
            case UpdateLate():
                if self.round is not None:
                    self.round.late += 1
                return []
            case UpdateDamaged(task_id, lease, online):
                return self._take_back(task_id, lease, online, now)
            case StateDamaged(round_number):
                return self._fold_again() if self.round is not None and self.round.number == round_number else []
            case EvaluationArrived(task_id, evaluation):
                return self._accept_evaluation(task_id, evaluation, now)
            case FiguresArrived(task_id, figures):
                return self._accept_figures(task_id, figures, now)
            case Planned(asked, plan, reason, gone):
                return self._accept_plan(asked, plan, reason, gone, now)
            case SparesOffered(round_number, candidates):
                return self._take_spares(round_number, candidates, now)
            case TaskFailed(task_id, failure):
                return self._fail_task(task_id, failure, now)
            case TaskRefused(task_id, reason):
                return self._settle(task_id, "refused", reason, now)
            case DeviceOffline(device_id):
                return self._note_offline(device_id, now)
            case DeviceOnline(device_id, held):
                return self._note_online(device_id, held)
            case Folded(round_number, outcome, candidates, absent):
                return self._accept_fold(round_number, outcome, candidates, absent, now)
            case HeldoutEvaluated(round_number, evaluation):
                if self.round is None or self.round.number != round_number or self.round.phase != "evaluating":
                    return []
                return self._commit(evaluation.metrics, evaluation.rows, now)
            case Ticked():
                return self._tick(now)
            case CancelRequested(reason):
                return self._end("cancelled", reason, now)
            case PauseRequested():
                return self._pause()
            case ResumeRequested(turn):
                return self._resume(turn, now)
            case Restarted(state_damaged):
                return self._restart(state_damaged, now)

    def _start(self, now: float) -> list[Command]:
        if self.status != "queued":
            return []
        if self.prepared is not None:  # it has run before, and was resumed while others ran
            self._wait("waits for devices", now)
            return []
        self.status, self.message, self.started_unix_s = "preparing", "", now
        return [Prepare()]

    def _accept_prepared(self, prepared: Prepared, now: float) -> list[Command]:
        if self.status != "preparing":
            return []
        self.prepared, self.state = prepared, prepared.state
        self.ranks = dict(prepared.ranks) if self.plan.ranking is not None else {}
        if prepared.initial is not None:
            self.best_value = prepared.initial.metrics.get(self.plan.metric)
        self._wait("waits for devices", now)
        return []

    def _wait(self, message: str, now: float) -> None:
        self.status = "paused" if self.paused else "waiting"
        self.message = PAUSED if self.paused else message
        self.waiting_since_unix_s = now

    def _open_round(self, candidates: Sequence[Candidate], now: float) -> list[Command]:
        if not self.wants_devices() or self.state is None:
            return []
        usable = sorted((c for c in candidates if self._may_train(c)), key=lambda c: c.device_id)
        if len(usable) < self.plan.minimum:
            self.message = f"waits for devices: {len(usable)} of at least {self.plan.minimum} are ready"
            if only_measure := sum(not c.trains for c in candidates):
                self.message += f"; {only_measure} more can only measure"
            if self.excluded:
                self.message += f"; {len(self.excluded)} get no more tasks of this job after failing"
            return []
        ids = tuple(sorted({c.device_id for c in usable} | {task.device_id for task in self.newcomers.values()}))
        if self.retry_unix_s > now and ids == self.unplannable:
            self.message = self.no_plan  # nothing has changed since
            return []
        number = self.committed + 1
        # What is known of the others is enough for a round: nobody waits for a newcomer to be measured.
        known = [candidate for candidate in usable if candidate.device_id in self.figures]
        beside = self.plan.planning is not None and len(known) >= max(1, self.plan.minimum)
        usable, newcomers = (known, [c for c in usable if c.device_id not in self.figures]) if beside else (usable, [])
        asked = usable
        if 0 < self.plan.per_round < len(usable):
            # Seeded by the round, so that the same fleet gives the same choice whatever happened before.
            asked = random.Random(f"{self.plan.seed}/{number}/{self.attempts}").sample(usable, max(self.plan.per_round, self.plan.minimum))
        self.status, self.message = "running", ""
        deadline = now + self.plan.deadline_s if self.plan.deadline_s > 0 else 0.0
        norm_limit = normbound.limit(self.norms, self.plan.update_norm_bound)
        self.round = RoundEntry(number, "training", now, deadline, start_state=self.state, norm_limit=norm_limit)
        if self.plan.pruning is not None:
            self.spines, self.round.prunings = arms.choose(self.plan.pruning, self.spines, asked, number, self.plan.rounds, self.plan.seed)
        self.round.ranks = dict(self.ranks)
        if self.plan.planning is None:
            return self._assign(asked, "train", self.state, now)
        self.unplannable, self.retry_unix_s = ids, 0.0
        self.round.phase, self.held = "measuring", tuple(sorted(asked, key=lambda c: c.device_id))
        self.round.deadline_unix_s = now + MEASURING_S
        self.sought_out = []
        measuring = self._measure_beside(newcomers, now)
        unknown = [candidate for candidate in asked if candidate.device_id not in self.figures]
        return measuring + (self._assign(unknown, "measure", self.state, now) if unknown else self._ask_for_plan())

    # -- planned rounds

    def _may_train(self, candidate: Candidate) -> bool:
        """Whether a device may take a train task, as far as this job knows."""
        measured = any(task.device_id == candidate.device_id for task in self.newcomers.values())
        return candidate.trains and candidate.device_id not in self.excluded and not measured

    def _measure_beside(self, candidates: Sequence[Candidate], now: float) -> list[Command]:
        """Have those measured whose figures are not known; the open round goes on meanwhile, and the next plan knows of them."""
        assert self.round is not None
        asked = {*self.sought_out, *self.figures, *self.busy_devices(), *(task.device_id for task in self.round.tasks.values())}
        unknown = [c for c in candidates if self._may_train(c) and c.device_id not in asked]
        commands: list[Command] = []
        for device in sorted(unknown, key=lambda c: c.device_id):
            self.lease += 1
            task_id = self._task_id(device.device_id, "measure")
            entry = TaskEntry(task_id, device.device_id, device.name, "measure", self.lease, assigned_unix_s=now)
            self.newcomers[task_id] = entry
            self.sought_out.append(device.device_id)
            commands.append(self._send_beside(entry))
        return commands

    def _send_beside(self, entry: TaskEntry) -> SendTask:
        assert self.state is not None
        until_unix_s = entry.assigned_unix_s + MEASURING_S
        return SendTask(entry.task_id, entry.device_id, entry.kind, self.committed + 1, entry.lease, self.state, until_unix_s)

    def _tick_newcomers(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for entry in list(self.newcomers.values()):
            gone = entry.offline_since_unix_s > 0 and now - entry.offline_since_unix_s >= self.plan.absent_grace_s
            if gone or now >= entry.assigned_unix_s + MEASURING_S:
                del self.newcomers[entry.task_id]
                commands.append(WithdrawTask(entry.task_id, entry.device_id, "not measured in time"))
        return commands

    def _accept_figures(self, task_id: str, figures: DeviceFigures, now: float) -> list[Command]:
        entry = self.open_task(task_id)
        if entry is None or entry.status != "assigned" or entry.kind != "measure":
            return []
        if wrong := self._misfit(figures):
            return self._fail_task(task_id, Failure("model", "measure", wrong), now)
        entry.status, entry.offline_since_unix_s = "done", 0.0
        self.figures[entry.device_id] = figures
        self.failures_in_row.pop(entry.device_id, None)
        if self.newcomers.pop(task_id, None) is not None:
            self.unplannable = ()  # with this device there may be a plan where there is none without it
            return []
        return self._close_if_settled(now)

    def _misfit(self, figures: DeviceFigures) -> str:
        """Why these figures cannot be of this job's model, or an empty string."""
        depths = len(self.prepared.blocks) if self.prepared is not None else 0
        if len(figures.step_s) == len(figures.step_bytes) == depths:
            return ""
        return (
            f"the device tells of {len(figures.step_s)} times and {len(figures.step_bytes)} sizes of steps, and the model has {depths} "
            "depths; install matching versions."
        )

    def _ask_for_plan(self) -> list[Command]:
        """Over the devices of the round whose figures are known."""
        assert self.round is not None and self.plan.planning is not None and self.prepared is not None
        known = tuple(candidate for candidate in self.held if candidate.device_id in self.figures)
        self.held, self.plans_asked = known, self.plans_asked + 1
        trained = self.depth_rounds or [0] * len(self.prepared.blocks)
        request = PlanRequest(
            settings=self.plan.planning,
            round_number=self.round.number,
            seed=self.plan.seed,
            blocks=self.prepared.blocks,
            state_bytes=self._start_state().size_bytes,
            candidates=known,
            figures={candidate.device_id: self._known_figures(candidate.device_id) for candidate in known},
            extra_s={device_id: self.extra_s[device_id] for device_id in (c.device_id for c in known) if device_id in self.extra_s},
            untrained_rounds=tuple(self.committed - number for number in trained),
            turns=tuple(dict(turn) for turn in self.turns),
        )
        return [PlanRound(self.plans_asked, request)]

    def _known_figures(self, device_id: str) -> DeviceFigures:
        return timing.short_of(self.figures[device_id], self.depths_failed.get(device_id, 0))

    def _close_measuring(self, now: float) -> list[Command]:
        """All have told, or are not waited for any more."""
        assert self.round is not None
        known = [candidate for candidate in self.held if candidate.device_id in self.figures]
        if len(known) >= max(1, self.plan.minimum):
            return self._ask_for_plan()
        reason = f"round {self.round.number}: {len(known)} of {len(self.held)} devices told how fast they train"
        return self._give_up_round(f"{reason}, at least {self.plan.minimum} are needed", now)

    def _accept_plan(self, asked: int, plan: RoundPlan | None, reason: str, gone: frozenset[str], now: float) -> list[Command]:
        if self.round is None or self.round.phase != "measuring" or asked != self.plans_asked or self._has_open_tasks():
            return []
        here = tuple(candidate for candidate in self.held if candidate.device_id not in gone)
        if len(here) < self.plan.minimum:
            return self._go_back_to_waiting(f"round {self.round.number}: too few of its devices stayed until it was planned", now)
        if plan is None:
            self.retry_unix_s, self.no_plan = now + PLAN_AGAIN_S, f"waits for other devices: {reason}"
            return self._go_back_to_waiting(self.no_plan, now, waiting=True)
        if any(part.device_id in gone for part in plan.parts):
            self.held = here
            return self._ask_for_plan()
        names = {candidate.device_id: candidate for candidate in self.held}
        self.round.phase, self.round.plan, self.round.training_since_unix_s = "training", plan, now
        self.held = ()
        self.round.deadline_unix_s = self._planned_deadline(now)
        return self._assign([names[part.device_id] for part in plan.parts], "train", self._start_state(), now)

    def _planned_deadline(self, now: float) -> float:
        """For training that begins now; 0 is none."""
        assert self.round is not None
        bounds = [self.plan.deadline_s] if self.plan.deadline_s > 0 else []
        if self.round.plan is not None and self.plan.planning is not None and self.plan.planning.deadline_factor > 0:
            warm = all(part.device_id in self.extra_s for part in self.round.plan.parts)
            # A prediction that has failed so badly that the round did is not to be trusted the same way again.
            factor = self.plan.planning.deadline_factor * 2.0**self.setbacks
            bounds.append(factor * self.round.plan.round_s + (PLAN_SLACK_S if warm else FIRST_SLACK_S))
        return now + min(bounds) if bounds else 0.0

    def _has_open_tasks(self) -> bool:
        return self.round is not None and any(task.status == "assigned" for task in self.round.tasks.values())

    def _go_back_to_waiting(self, message: str, now: float, *, waiting: bool = False) -> list[Command]:
        """The round ends before anybody has trained, by nobody's fault. `waiting`: the job has waited since before it was opened."""
        assert self.round is not None
        entry, self.round, self.held = self.round, None, ()
        self.attempts += 1
        since = self.waiting_since_unix_s
        self._wait(message, now)
        if waiting:
            self.waiting_since_unix_s = since
        return [AbandonRound(entry, message)]

    def _take_spares(self, number: int, candidates: Sequence[Candidate], now: float) -> list[Command]:
        """Idle devices take over what has dropped out, where they can still be in time; the rest of it is left out of this round."""
        if self.round is None or self.round.number != number or not self.seeking:
            return []
        commands: list[Command] = []
        lost, self.seeking = self.seeking, []
        for task_id in lost:
            spare = self._spare_for(self.round.tasks[task_id], candidates, now)
            if spare is not None:
                commands += self._assign([spare], "train", self._start_state(), now)
        return commands + self._close_if_settled(now)

    def _spare_for(self, lost: TaskEntry, candidates: Sequence[Candidate], now: float) -> Candidate | None:
        """The device that is done first with what `lost` was to do; its part is in the plan then."""
        round_, settings, prepared = self.round, self.plan.planning, self.prepared
        assert round_ is not None and round_.plan is not None and settings is not None and prepared is not None
        part = round_.plan.part_of(lost.device_id)
        assert part is not None
        bits = math.fsum(timing.payload_bits(prepared.blocks[depth - 1], settings) for depth in part.depths)
        until_s = round_.deadline_unix_s - round_.training_since_unix_s if round_.deadline_unix_s > 0 else 0.0
        found = timing.taken_over(
            part,
            [c for c in candidates if self._may_train(c) and round_.plan.part_of(c.device_id) is None],
            {c.device_id: self._known_figures(c.device_id) for c in candidates if c.device_id in self.figures},
            self.extra_s,
            bits,
            settings,
            self._start_state().size_bytes,
            now - round_.training_since_unix_s,
            until_s,
        )
        if found is None:
            return None
        spare = next(candidate for candidate in candidates if candidate.device_id == found.device_id)
        idle = tuple(device_id for device_id in round_.plan.idle_devices if device_id != spare.device_id)
        names = tuple(name for name in round_.plan.idle_names if name != spare.name)
        round_.plan = replace(round_.plan, parts=(*round_.plan.parts, found), idle_devices=idle, idle_names=names)
        return spare

    def _note_norms(self, entry: RoundEntry) -> None:
        """The norms of a committed round's deltas; in a planned one, of those of the same blocks each by themselves."""
        deltas = [(task, task.update.norm) for task in entry.trained() if task.update and task.update.kind == "delta"]
        if entry.plan is None:
            self.norms = [*self.norms, [norm for _, norm in deltas]][-normbound.ROUNDS :]
            return
        of_round: dict[str, list[float]] = {}
        for task, norm in deltas:
            part = entry.plan.part_of(task.device_id)
            if part is not None:
                of_round.setdefault(normbound.blocks_key(part.depths), []).append(norm)
        for key, norms in of_round.items():
            self.block_norms[key] = [*self.block_norms.get(key, []), norms][-normbound.ROUNDS :]

    def _learn(self, entry: RoundEntry) -> None:
        """What a committed planned round says for the next plans."""
        if entry.plan is None or self.plan.planning is None or self.prepared is None:
            return
        done = {task.device_id for task in entry.trained()}
        trained = {depth for part in entry.plan.parts if part.device_id in done for depth in part.depths}
        before = self.depth_rounds or [0] * len(self.prepared.blocks)
        self.depth_rounds = [entry.number if depth in trained else number for depth, number in enumerate(before, 1)]
        back = self.plan.planning.rotate_rounds
        if entry.plan.layout == "blocks" and back > 0:
            turn = {depth: part.device_id for part in entry.plan.parts if part.device_id in done for depth in part.depths}
            self.turns = [*self.turns, turn][-back:]

    def _start_state(self) -> Blob:
        assert self.round is not None and self.round.start_state is not None
        return self.round.start_state

    # -- tasks

    def _assign(self, devices: Sequence[Candidate], kind: TaskKind, state: Blob, now: float) -> list[Command]:
        assert self.round is not None
        commands: list[Command] = []
        for device in sorted(devices, key=lambda c: c.device_id):
            self.lease += 1
            task_id = self._task_id(device.device_id, kind)
            entry = TaskEntry(task_id, device.device_id, device.name, kind, self.lease, assigned_unix_s=now)
            self.round.tasks[task_id] = entry
            commands.append(self._send(entry, state))
        return commands

    def _task_id(self, device_id: str, kind: TaskKind) -> str:
        assert self.round is not None
        again = f"/{self.attempts}" if self.attempts else ""
        return f"{self.plan.job_id}/{self.round.number}/{device_id}/{kind}{again}"

    def _send(self, entry: TaskEntry, state: Blob) -> SendTask:
        assert self.round is not None
        part = self.round.plan.part_of(entry.device_id) if self.round.plan is not None and entry.kind == "train" else None
        number, deadline = self.round.number, self.round.deadline_unix_s
        trainables = self.round.trainables_digest if entry.kind == "evaluate" else self.trainables_digest
        return SendTask(entry.task_id, entry.device_id, entry.kind, number, entry.lease, state, deadline, part, trainables)

    def _accept_update(self, task_id: str, update: Update, now: float) -> list[Command]:
        entry = self.open_task(task_id)
        if entry is None or entry.status != "assigned" or entry.kind != "train":
            return []
        entry.status, entry.update, entry.offline_since_unix_s = "done", replace(update, figures=None), 0.0
        self.failures_in_row.pop(entry.device_id, None)
        if self.round is not None and self.round.plan is not None:
            if update.figures is not None and not self._misfit(update.figures):
                self.figures[entry.device_id] = update.figures
            part = self.round.plan.part_of(entry.device_id)
            late_s = entry.assigned_unix_s - self.round.training_since_unix_s
            before_s = self.extra_s.get(entry.device_id)
            if before_s is None:  # loading the model is in its first time, and in no other
                self.extra_s[entry.device_id] = 0.0
            elif part is not None and part.ready_s > late_s:  # else it was given again long after
                self.extra_s[entry.device_id] = timing.later_by(before_s, part.ready_s - late_s, update.ready_s)
        return self._close_if_settled(now)

    def _take_back(self, task_id: str, lease: int, online: bool, now: float) -> list[Command]:
        """A damaged update counts no longer: its device does the task again, under a new lease, and the round waits for it."""
        entry = self.open_task(task_id)
        if self.round is None or entry is None or entry.update is None or entry.lease != lease:
            return []
        if self.round.phase not in ("training", "folding"):
            return []  # it is folded; nobody reads it again
        self.lease += 1
        entry.status, entry.update, entry.lease, entry.assigned_unix_s = "assigned", None, self.lease, now
        entry.offline_since_unix_s = 0.0 if online else now
        self.round.phase, self.round.alive = "training", {}
        if (deadline := self._planned_deadline(now)) > 0:
            # That the disk failed is not the device's fault: it gets the time that the task had at first.
            self.round.deadline_unix_s = deadline
        return [self._send(entry, self._state_of(entry))]

    def _fold_again(self) -> list[Command]:
        """The new state is lost before its commit: the updates that made it are still there, and make the same once more."""
        if self.round is None or self.round.phase != "evaluating":
            return []
        commands: list[Command] = []
        for entry in [task for task in self.round.tasks.values() if task.kind == "evaluate"]:
            if entry.status == "assigned":
                commands.append(WithdrawTask(entry.task_id, entry.device_id, "the state to measure was damaged, it is made again"))
            del self.round.tasks[entry.task_id]
        self.round.phase, self.round.state, self.round.optimizer = "folding", None, None
        self.round.adapter, self.round.trainables_digest = None, ""
        return [*commands, self._fold_command()]

    def _accept_evaluation(self, task_id: str, evaluation: Evaluation, now: float) -> list[Command]:
        entry = self.open_task(task_id)
        if entry is None or entry.status != "assigned" or entry.kind != "evaluate":
            return []
        entry.status, entry.evaluation = "done", evaluation
        return self._close_if_settled(now)

    def _fail_task(self, task_id: str, failure: Failure, now: float) -> list[Command]:
        entry = self.open_task(task_id)
        if entry is None or entry.status != "assigned":
            return []
        entry.failure = failure
        self.last_failure, self.last_failure_device = failure, entry.device_name
        if entry.kind == "evaluate":
            # A device that cannot measure may still train: its validation rows are others than its train rows.
            if failure.kind in LASTING:
                self.unmeasured[entry.device_id] = failure.message
            return self._settle(task_id, "failed", failure.message, now)
        if failure.kind == "out_of_memory" and entry.kind == "train" and (depths := self._depths_of(entry)):
            self.depths_failed[entry.device_id] = min(depths[-1], self.depths_failed.get(entry.device_id, depths[-1]))
        if failure.kind == "out_of_memory" and entry.kind == "train" and self.plan.pruning is not None and self.round is not None:
            self.spines = arms.ran_short(self.plan.pruning, self.spines, self.round, entry.device_id)
        row = self.failures_in_row.get(entry.device_id, 0) + 1
        self.failures_in_row[entry.device_id] = row
        if failure.kind in LASTING or row >= DEVICE_FAILURES:
            self.excluded[entry.device_id] = failure.message
        if failure.kind == "norm":
            self._note_offence(entry, failure)
        return self._settle(task_id, "failed", failure.message, now)

    def _note_offence(self, entry: TaskEntry, failure: Failure) -> None:
        """Not only in a row: whoever sends good updates in between must not get a bad one through now and then for ever."""
        offences = self.offences.get(entry.device_id, 0) + 1
        self.offences[entry.device_id] = offences
        if offences >= normbound.OFFENCES:
            self.quarantined[entry.device_id] = f"{entry.device_name} after {offences} updates beyond the norm bound"
            self.excluded[entry.device_id] = failure.message

    def _settle(self, task_id: str, status: TaskStatus, reason: str, now: float) -> list[Command]:
        entry = self.open_task(task_id)
        if entry is None or entry.status != "assigned":
            return []
        entry.status, entry.reason = status, reason
        if self.newcomers.pop(task_id, None) is not None:
            return []
        return self._drop_out([entry]) + self._close_if_settled(now)

    def _drop_out(self, entries: Sequence[TaskEntry]) -> list[Command]:
        """Train tasks of a planned round that will not be done by whom the plan says: somebody else may take them over."""
        if self.round is None or self.round.plan is None or self.plan.planning is None or not self.plan.planning.spares:
            return []
        lost = [entry.task_id for entry in entries if entry.kind == "train"]
        if not lost:
            return []
        self.seeking += lost
        return [SeekSpares(self.round.number)]

    def _note_offline(self, device_id: str, now: float) -> list[Command]:
        for entry in self._open_tasks_of(device_id):
            if entry.offline_since_unix_s == 0.0:
                entry.offline_since_unix_s = now
        return []

    def _note_online(self, device_id: str, held: frozenset[str]) -> list[Command]:
        """A task that the device has lost is handed out again under a new lease; one that it still has goes on."""
        commands: list[Command] = []
        for entry in self._open_tasks_of(device_id):
            entry.offline_since_unix_s = 0.0
            if entry.task_id not in held:
                self.lease += 1
                entry.lease = self.lease
                beside = entry.task_id in self.newcomers
                commands.append(self._send_beside(entry) if beside else self._send(entry, self._state_of(entry)))
        return commands

    def _state_of(self, entry: TaskEntry) -> Blob:
        assert self.round is not None
        state = self.round.state if entry.kind == "evaluate" else self.round.start_state
        assert state is not None
        return state

    def _open_tasks_of(self, device_id: str) -> list[TaskEntry]:
        tasks = [*self.newcomers.values(), *(self.round.tasks.values() if self.round is not None else ())]
        return [t for t in tasks if t.device_id == device_id and t.status == "assigned"]

    def _tick(self, now: float) -> list[Command]:
        return self._tick_newcomers(now) + self._tick_round(now)

    def _tick_round(self, now: float) -> list[Command]:
        if self.status == "waiting" and 0 < self.plan.wait_s <= now - self.waiting_since_unix_s:
            return self._end("failed", f"{self.message or 'waits for devices'}; gave up after devices.wait_s = {self.plan.wait_s:g} s", now)
        if self.status == "waiting" and 0 < self.retry_unix_s <= now:
            self.retry_unix_s = 0.0
        if self.round is None or self.round.phase not in ("measuring", "training", "evaluating"):
            return []
        commands: list[Command] = []
        dropped: list[TaskEntry] = []
        over = 0 < self.round.deadline_unix_s <= now
        for entry in list(self.round.tasks.values()):
            if entry.status != "assigned":
                continue
            gone = entry.offline_since_unix_s > 0 and now - entry.offline_since_unix_s >= self.plan.absent_grace_s
            if over or gone:
                entry.status = "missed"
                entry.reason = "not back by the round's deadline" if over else f"offline for more than {self.plan.absent_grace_s:g} s"
                commands.append(WithdrawTask(entry.task_id, entry.device_id, entry.reason))
                dropped.append(entry)
        if not commands:
            return []
        # After the deadline nobody can be in time any more.
        commands += [] if over else self._drop_out(dropped)
        return commands + self._close_if_settled(now)

    def _close_if_settled(self, now: float) -> list[Command]:
        """Close the phase once no task is open any more."""
        assert self.round is not None
        kind = _KINDS[self.round.phase]
        tasks = [task for task in self.round.tasks.values() if task.kind == kind]
        if any(task.status == "assigned" for task in tasks) or self.seeking:
            return []
        if self.round.phase == "measuring":
            return self._close_measuring(now)
        if self.round.phase == "evaluating":
            return self._commit_device_means(tasks, now)
        asked, done, what = len(tasks), len(self.round.trained()), "devices sent an update"
        if self.round.plan is not None:
            # A block counts, whoever has trained it; it may have been given to a second device.
            blocks = self.round.plan.depths()
            asked, what = len(blocks), "blocks were trained"
            done = len({depth for task in self.round.trained() for depth in self._depths_of(task)} & blocks)
        needed = max(1, math.ceil(self.plan.quorum * asked - 1e-9))
        if done < needed:
            return self._give_up_round(f"round {self.round.number}: {done} of {asked} {what}, the quorum is {needed}", now)
        self.round.phase = "folding"
        return [self._fold_command()]

    def _depths_of(self, task: TaskEntry) -> tuple[int, ...]:
        part = self.round.plan.part_of(task.device_id) if self.round is not None and self.round.plan is not None else None
        return part.depths if part is not None else ()

    def _fold_command(self) -> Fold:
        assert self.round is not None and self.round.start_state is not None
        contributions = tuple(
            Contribution(task.device_id, task.update.blob, task.update.samples) for task in self.round.trained() if task.update
        )
        if self.plan.ranking is not None and self.prepared is not None:
            settings = replace(self.plan.ranking, first=sum(self.prepared.ranks.values()))
            self.round.alive = ranking.decided(settings, self.plan.rounds, self.round)
        return Fold(self.round.number, self.round.start_state, self.optimizer, contributions, dict(self.round.alive))

    def _give_up_round(self, reason: str, now: float) -> list[Command]:
        """Too little came of it: it is opened again, a few times."""
        assert self.round is not None
        others = self.round.plan.idle_devices if self.round.plan is not None else [candidate.device_id for candidate in self.held]
        entry, self.round, self.held = self.round, None, ()
        told = [f"{t.device_name}: {t.reason}" for t in entry.tasks.values() if t.status in ("failed", "refused", "missed")]
        if told:
            reason += " (" + "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "") + ")"
        self.attempts += 1
        if any(task.status in ("failed", "missed") for task in entry.tasks.values()):
            self.setbacks += 1
        commands: list[Command] = [AbandonRound(entry, reason)]
        hopeless = all(device_id in self.excluded for device_id in (*(task.device_id for task in entry.tasks.values()), *others))
        if hopeless or self.setbacks >= ROUND_ATTEMPTS:
            return commands + self._end("failed", reason, now)
        self._wait(f"{reason}; waits to open the round again", now)
        return commands

    def _accept_fold(
        self, number: int, outcome: FoldOutcome, candidates: Sequence[Candidate], absent: frozenset[str], now: float
    ) -> list[Command]:
        if self.round is None or self.round.number != number or self.round.phase != "folding":
            return []
        self.round.state, self.round.optimizer = outcome.state, outcome.optimizer
        self.round.adapter, self.round.trainables_digest = outcome.adapter, outcome.trainables_digest
        self.round.update_norm, self.round.fold_metrics = outcome.update_norm, dict(outcome.metrics)
        last = number >= self.plan.rounds
        due = last or number % max(1, self.plan.evaluate_every) == 0
        if self.plan.evaluation == "none" or not due:
            return self._commit({}, 0, now)
        self.round.phase = "evaluating"
        if self.plan.evaluation == "heldout":
            return [EvaluateHeldout(number, outcome.state)]
        usable = [c for c in candidates if c.evaluates and c.device_id not in self.excluded and c.device_id not in self.unmeasured]
        self.round.deadline_unix_s = now + self.plan.deadline_s if self.plan.deadline_s > 0 else 0.0
        assign = self._assign(usable, "evaluate", outcome.state, now) if usable else self._await_measuring(absent, outcome.state, now)
        if assign:
            return assign
        self.message = f"round {number} was not evaluated: no device was ready"
        return self._commit({}, 0, now)

    def _await_measuring(self, absent: frozenset[str], state: Blob, now: float) -> list[Command]:
        """Evaluate tasks for those who trained and are away, as all are after a restart; they get them when they are back, within the
        usual grace."""
        assert self.round is not None
        away = [task for task in self.round.trained() if task.device_id in absent - {*self.excluded, *self.unmeasured}]
        commands = self._assign([Candidate(task.device_id, task.device_name) for task in away], "evaluate", state, now)
        for device in away:
            self._note_offline(device.device_id, now)
        return commands

    def _commit_device_means(self, tasks: Sequence[TaskEntry], now: float) -> list[Command]:
        evaluations = [task.evaluation for task in sorted(tasks, key=lambda t: t.device_id) if task.evaluation is not None]
        rows = sum(e.rows for e in evaluations)
        return self._commit(weighted_means(evaluations), rows, now)

    def _commit(self, metrics: Metrics, rows: int, now: float) -> list[Command]:
        assert self.round is not None and self.round.state is not None
        entry, self.round = self.round, None
        entry.phase, entry.metrics, entry.evaluation_rows, entry.ended_unix_s = "committed", dict(metrics), rows, now
        self.state, self.optimizer = entry.state, entry.optimizer
        if self.plan.ranking is not None:
            self.ranks, self.trainables_digest = ranking.left(entry.alive), entry.trainables_digest
        self.committed, self.attempts, self.setbacks = entry.number, 0, 0
        self._learn(entry)
        if self.plan.pruning is not None:
            self.spines = arms.learn(self.plan.pruning, self.spines, entry)
            if self.plan.pruning.shares:
                self.importance = fleetimportance.mean(entry) or self.importance
            if entry.number < self.plan.rounds - self.plan.pruning.recovery_rounds:
                fleetimportance.drop(entry)
        self._note_norms(entry)
        commands: list[Command] = [CommitRound(entry)]
        stop = self._judge(entry)
        if stop or entry.number >= self.plan.rounds:
            return commands + self._end("completed", stop, now)
        self._wait("", now)
        return commands

    def _judge(self, entry: RoundEntry) -> str:
        """Best round and early stop; a non-empty answer ends the job."""
        value = entry.metrics.get(self.plan.metric)
        if value is None:
            return ""
        sign = -1.0 if self.plan.metric in LOWER_IS_BETTER else 1.0
        if not math.isfinite(value):
            return ""
        gain = math.inf if self.best_value is None or self.best_round == 0 else sign * (value - self.best_value)
        if gain > 0:
            self.best_round, self.best_value = entry.number, value
        self.rounds_without_gain = 0 if gain > self.plan.min_delta else self.rounds_without_gain + 1
        if 0 < self.plan.patience <= self.rounds_without_gain:
            return (
                f"stopped early: {self.plan.metric} has not improved for {self.rounds_without_gain} evaluations; "
                f"best was round {self.best_round}"
            )
        return ""

    def _pause(self) -> list[Command]:
        self.paused = True
        if self.status == "waiting":
            self.status, self.message = "paused", PAUSED
        elif self.status == "queued":
            self.message = PAUSED_IN_LINE
        elif self.status in ("running", "preparing"):
            self.message = PAUSES_LATER
        return []

    def _resume(self, turn: bool, now: float) -> list[Command]:
        self.paused = False
        if self.status == "paused" and not turn:
            self.status, self.message = "queued", RESUMED_IN_LINE
        elif self.status == "paused":
            self._wait("waits for devices", now)
        elif self.message in (PAUSES_LATER, PAUSED_IN_LINE):
            self.message = ""
        return []

    def _restart(self, state_damaged: bool, now: float) -> list[Command]:
        """Devices are not connected yet: open tasks wait for them, past their deadline if need be; what ran on the coordinator
        starts again."""
        for entry in self.newcomers.values():
            entry.offline_since_unix_s = now
        if self.status == "preparing":
            return [Prepare()]
        if self.status == "waiting":
            self.waiting_since_unix_s = now
        if self.round is None:
            return []
        if self.round.phase == "folding":
            return [self._fold_command()]
        if self.round.phase == "measuring" and not self._has_open_tasks():
            # It was about to be planned, over devices that are not connected now.
            return self._go_back_to_waiting(f"round {self.round.number}: the coordinator was restarted before it was planned", now)
        if state_damaged and self.round.phase == "evaluating":
            return self._fold_again()
        if self.round.phase == "evaluating" and self.plan.evaluation == "heldout":
            assert self.round.state is not None
            return [EvaluateHeldout(self.round.number, self.round.state)]
        for entry in self.round.tasks.values():
            if entry.status == "assigned":
                entry.offline_since_unix_s = now
        if self.round.deadline_unix_s > 0:
            # The time that the coordinator was down is not the devices' fault: their results may lie ready.
            self.round.deadline_unix_s = max(self.round.deadline_unix_s, now + self.plan.absent_grace_s)
        return [SeekSpares(self.round.number)] if self.seeking else []

    def _end(self, status: JobStatus, message: str, now: float) -> list[Command]:
        commands: list[Command] = []
        if self.round is not None:
            for entry in self.round.tasks.values():
                if entry.status == "assigned":
                    entry.status, entry.reason = "missed", f"job {status}"
                    commands.append(WithdrawTask(entry.task_id, entry.device_id, f"job {self.plan.job_id} is {status}"))
            commands.append(AbandonRound(self.round, message))
            self.round, self.held, self.seeking = None, (), []
        for entry in self.newcomers.values():
            commands.append(WithdrawTask(entry.task_id, entry.device_id, f"job {self.plan.job_id} is {status}"))
        self.newcomers = {}
        self.status, self.message, self.ended_unix_s = status, message, now
        return [*commands, EndJob(status)]

    def validate(self) -> None:
        """Raise AssertionError where an invariant is broken; called after every event."""
        assert (self.round is not None) == (self.status == "running"), f"status {self.status} with round {self.round}"
        if self.round is not None:
            assert self.round.number == self.committed + 1, (self.round.number, self.committed)
            assert all(key == task.task_id and task.lease <= self.lease for key, task in self.round.tasks.items())
            if self.round.phase == "training":
                assert self.seeking or any(task.status == "assigned" for task in self.round.tasks.values()), "a settled round must close"
            else:
                assert not any(t.status == "assigned" and t.kind == "train" for t in self.round.tasks.values()), "training is over"
        self._validate_planning()

    def _validate_planning(self) -> None:
        entry = self.round
        planned = self.plan.planning is not None
        measuring = entry is not None and entry.phase == "measuring"
        assert planned or not (measuring or self.held or self.seeking or (entry is not None and entry.plan is not None)), "it does not plan"
        assert not self.held or measuring, "devices are held for a plan only"
        assert planned or not self.newcomers, "it measures nobody"
        measured = [task.device_id for task in self.newcomers.values()]
        assert all(task.kind == "measure" and task.status == "assigned" for task in self.newcomers.values()), "what is told is settled"
        others = {c.device_id for c in self.held} | {t.device_id for t in (entry.tasks.values() if entry else ()) if t.status == "assigned"}
        assert len(set(measured)) == len(measured) and not others & set(measured), "a newcomer does nothing else"
        assert not self.seeking or (entry is not None and entry.phase == "training"), "spares are sought while others train only"
        if entry is None or not planned:
            return
        trains = [task for task in entry.tasks.values() if task.kind == "train"]
        if measuring:
            assert entry.plan is None and not trains, "nobody trains before there is a plan"
            return
        assert entry.plan is not None and entry.training_since_unix_s > 0, "a planned round has a plan"
        devices = [part.device_id for part in entry.plan.parts]
        assert len(set(devices)) == len(devices), "each device has one part"
        assert sorted(devices) == sorted(task.device_id for task in trains), "who trains is whom the plan names"
        assert not any(task.kind == "measure" and task.status == "assigned" for task in entry.tasks.values()), "measuring is over"


_KINDS: Mapping[str, TaskKind] = {"measuring": "measure", "training": "train", "evaluating": "evaluate"}


def weighted_means(evaluations: Sequence[Evaluation]) -> Metrics:
    """Each metric's mean over devices, weighted by rows; a device without a metric does not count for it."""
    sums: dict[str, float] = {}
    rows: dict[str, int] = {}
    for evaluation in evaluations:
        for name, value in evaluation.metrics.items():
            if evaluation.rows > 0 and math.isfinite(value):
                sums[name] = sums.get(name, 0.0) + value * evaluation.rows
                rows[name] = rows.get(name, 0) + evaluation.rows
    return {name: sums[name] / rows[name] for name in sums}


def device_shares(entry: RoundEntry) -> Mapping[str, int]:
    """Weight of each device in the round's fold."""
    return {task.device_name: task.update.samples for task in entry.trained() if task.update}

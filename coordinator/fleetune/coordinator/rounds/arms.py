"""FedSpine's choice for each device of a round: how much it prunes and of which rank its LoRA is; pure.

A device has a bandit of its own (`rounds.bandit`), asked when a round opens and rewarded when it is committed. Four things bound what
it may choose: a device whose predicted seconds are far beyond the fleet's mean must prune faster or take a lower rank, as must one whose
memory is short (`rounds.armlimits`); the job's last rounds are for recovery, so that the target must be reached before them; and the first
round is the same cheap arm for everyone, since nothing is known yet; in the job's `warm_rounds` that arm cuts nothing. With
`choice = "fixed"` all devices take one arm.

| symbol | name |
| --- | --- |
| rho_i | `Spine.sparsity` |
| rho_target | `PruneSettings.target` |
| a_i, r_i | `Pruning.pace`, `Pruning.rank` |
| T_i, mean T | `Spine.seconds`, `_Fleet.mean_s` |
| tau | `PruneSettings.tau` |
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fleetune import sparsity
from fleetune.coordinator.domain import Candidate, PruneSettings, Pruning, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds import armlimits, bandit
from fleetune.coordinator.rounds.armlimits import NO_CEILING, Ceiling, Memory
from fleetune.coordinator.rounds.bandit import Arm, Bandit, Box, Costs

STEP_FIXED = 0.3
"""The part of a step's seconds that does not fall with sparsity: embeddings, norms, head, what an operation costs by itself."""

STEPS_MAX = 1e7
STEP_S_MAX = 1e5
"""Of what a device tells of its round; more is a mistake."""

FALL_REFERENCE = 2.0
"""A loss's fall earns all that it can at so many times the round's median fall."""


@dataclass(frozen=True)
class Spine:
    """What a job remembers of one device. Times are of its last counted round; 0 before it."""

    bandit: Bandit
    structure: str = ""
    """Hex of what its model keeps, as `structures.to_bytes` writes it; empty: everything."""
    sparsity: float = 0.0
    rounds: int = 0
    """Committed rounds with an update of it."""
    rank: int = 0
    steps: int = 0
    step_s: float = 0.0
    sent_s: float = 0.0
    seconds: float = 0.0
    """From the task to the last byte of its update."""
    step_sparsity: float = 0.0
    """At which `step_s` was taken."""
    memory: Memory | None = None
    """What its last counted round took; None where it does not tell."""
    ceiling: Ceiling = NO_CEILING

    @property
    def is_timed(self) -> bool:
        return self.seconds > 0 and self.step_s > 0


Spines = Mapping[str, Spine]
"""Device id -> what is known of it."""


def choose(
    settings: PruneSettings, spines: Spines, devices: Sequence[Candidate], number: int, rounds: int, seed: int
) -> tuple[dict[str, Spine], tuple[Pruning, ...]]:
    """The arms of round `number` of `rounds`, in device-id order, and the spines after asking. The same again for the same round."""
    changed, found = dict(spines), list[Pruning]()
    ordered = sorted(devices, key=lambda device: device.device_id)
    timed = [spine for device in ordered if (spine := spines.get(device.device_id)) is not None and spine.is_timed]
    fleet = (
        _Fleet(statistics.fmean(spine.seconds for spine in timed), max(_cheapest_s(settings, spine) for spine in timed)) if timed else None
    )
    for device in ordered:
        spine = spines.get(device.device_id) or Spine(_fresh(settings, seed, device.name))
        spine, arm = _arm(settings, spine, device.device_id, number, rounds, fleet)
        changed[device.device_id] = spine
        step = sparsity.round_of(spine.sparsity, arm.pace, settings.target, settings.steps, settings.tau, settings.step_max)
        note = armlimits.note(spine.memory, spine.ceiling, partial(first_sparsity, settings, spine.sparsity), arm)
        found.append(Pruning(device.device_id, spine.structure, step.before, step.after, arm.pace, arm.rank, note, device.hardware))
    return changed, tuple(found)


def _fresh(settings: PruneSettings, seed: int, name: str) -> Bandit:
    # By name: the same fleet with the same seed gives the same arms, whatever ids its devices got when they joined.
    return Bandit(_bandit_settings(settings), zlib.crc32(f"{seed}/{name}".encode()))


def _bandit_settings(settings: PruneSettings) -> bandit.Settings:
    return bandit.Settings(
        rank_min=settings.rank_min, rank_max=settings.rank_max, discount=settings.discount, exploration=settings.exploration
    )


def _arm(settings: PruneSettings, spine: Spine, device_id: str, number: int, rounds: int, fleet: _Fleet | None) -> tuple[Spine, Arm]:
    least = least_pace(settings, spine.sparsity, number, rounds)
    if number <= settings.warm_rounds:
        # No choice of the bandit, which learns nothing of it.
        return spine, armlimits.bounded(spine.ceiling, spine.bandit.settings, _warm(settings, spine))
    if settings.choice == "fixed":
        height = bandit.height_of(spine.bandit.settings, settings.rank)
        arm = Arm(max(settings.pace, least), settings.rank, max(settings.pace, least), height)
        return spine, armlimits.bounded(spine.ceiling, spine.bandit.settings, arm)
    if spine.rounds == 0:
        arm = bandit.calibration(spine.bandit.settings)
        arm = replace(arm, pace=max(arm.pace, least), x=max(arm.x, least))
        arm = armlimits.bounded(spine.ceiling, spine.bandit.settings, arm)
        return replace(spine, bandit=bandit.give(spine.bandit, device_id, number, arm)), arm
    box = _feasible(settings, spine, least, fleet)
    if box is None:
        arm = bandit.cheapest(spine.bandit.settings)
        return replace(spine, bandit=bandit.give(spine.bandit, device_id, number, arm)), arm
    asked, arm = bandit.ask(spine.bandit, device_id, number, box)
    return replace(spine, bandit=asked), arm


def _warm(settings: PruneSettings, spine: Spine) -> Arm:
    of_bandit = bandit.calibration(spine.bandit.settings)
    rank = settings.rank if settings.choice == "fixed" else of_bandit.rank
    return Arm(0.0, rank, 0.0, bandit.height_of(spine.bandit.settings, rank))


def least_pace(settings: PruneSettings, before: float, number: int, rounds: int) -> float:
    """The pace below which the target would not be reached before the rounds of recovery, were every later round as fast as may be.

    1 where even that is too late.
    """
    gap = settings.target - before
    if gap <= 0:
        return 0.0
    pruning_rounds_left = max(1, rounds - settings.recovery_rounds - number + 1)
    due = gap - (pruning_rounds_left - 1) * settings.step_max
    return min(1.0, max(0.0, due / min(gap, settings.step_max)))


@dataclass(frozen=True)
class _Fleet:
    """Seconds of the last rounds: their mean, and the longest that a device takes with its cheapest arm."""

    mean_s: float
    slowest_cheapest_s: float


def _feasible(settings: PruneSettings, spine: Spine, least: float, fleet: _Fleet | None) -> Box | None:
    """What the device can do in its memory without holding the others up; what is not known of it bounds nothing."""
    limit_s = math.inf
    if fleet is not None and spine.is_timed:
        limit_s = bandit.time_limit_s(_cheapest_s(settings, spine), fleet.mean_s, fleet.slowest_cheapest_s, settings.deadline_s or None)
    sparsity_of = partial(_step_sparsity, settings, spine)
    in_time = bandit.within_limits(costs_of(spine), settings.steps, sparsity_of, limit_s, math.inf)
    allowed = armlimits.limited(spine.memory, spine.ceiling, partial(first_sparsity, settings, spine.sparsity), in_time)
    return bandit.feasible_box(spine.bandit.settings, allowed, least)


def _cheapest_s(settings: PruneSettings, spine: Spine) -> float:
    return bandit.predicted_s(costs_of(spine), settings.steps, _step_sparsity(settings, spine, 1.0), settings.rank_min)


def _step_sparsity(settings: PruneSettings, spine: Spine, pace: float) -> float:
    """At which the steps of a round run, which are taken with what is left after each cut."""
    step = sparsity.round_of(spine.sparsity, pace, settings.target, settings.steps, settings.tau, settings.step_max)
    return statistics.fmean(step.sparsity(event) for event in range(1, step.events + 1))


def first_sparsity(settings: PruneSettings, before: float, pace: float) -> float:
    """At which the first steps of a round run, which take the most memory."""
    return sparsity.round_of(before, pace, settings.target, settings.steps, settings.tau, settings.step_max).sparsity(1)


def costs_of(spine: Spine) -> Costs:
    """What the device's rounds take in time, by its last one; its memory is `armlimits`'."""
    kept = 1.0 - spine.step_sparsity
    moved = max(1e-9, spine.rank * (1.0 - spine.sparsity))
    return Costs(
        step_s=spine.step_s / (STEP_FIXED + (1.0 - STEP_FIXED) * kept),
        step_fixed=STEP_FIXED,
        step_s_per_rank=0.0,
        overhead_s=max(0.0, spine.seconds - spine.sent_s - spine.steps * spine.step_s),
        bytes_per_rank=spine.sent_s / moved,
        down_bytes_per_s=math.inf,
        up_bytes_per_s=1.0,
        memory_bytes=0.0,
        memory_prunable_bytes=0.0,
        memory_per_rank=0.0,
    )


def measured(settings: PruneSettings, spine: Spine | None, update: Update | None, device_id: str) -> Pruning:
    """What a device measures on: what it has left after its update of this round, or after its last one; all of it before the first."""
    source = update or spine
    structure, reached = (source.structure, source.sparsity) if source is not None else ("", 0.0)
    return Pruning(device_id, structure, reached, reached, 0.0, settings.rank_max)


def ran_short(settings: PruneSettings, spines: Spines, entry: RoundEntry, device_id: str) -> dict[str, Spine]:
    """The spines after a device has run out of memory in the open round: its arms are smaller from now on, also in this round once more."""
    spine, pruning = spines.get(device_id), entry.pruning_of(device_id)
    if spine is None or pruning is None:
        return dict(spines)
    told = bandit.tell(spine.bandit, device_id, entry.number, None)
    ceiling = armlimits.lowered(spine.ceiling, pruning.rank, settings.rank_min)
    return {**spines, device_id: replace(spine, bandit=told, ceiling=ceiling)}


def learn(settings: PruneSettings, spines: Spines, entry: RoundEntry) -> dict[str, Spine]:
    """The spines after a committed round. A device without an update in it keeps its structure, and its bandit learns nothing."""
    changed = dict(spines)
    done = {task.device_id: task for task in entry.trained()}
    results = {device_id: result for device_id, task in done.items() if (result := _result(entry, task)) is not None}
    reference = FALL_REFERENCE * max(1e-9, _median([max(0.0, _fall(result)) for result in results.values()]))
    norm = _median([result.update_norm for result in results.values()])
    mean_s = statistics.fmean(result.seconds for result in results.values()) if results else 0.0
    for pruning in entry.prunings:
        spine = changed.get(pruning.device_id)
        if spine is None:
            continue
        result, task = results.get(pruning.device_id), done.get(pruning.device_id)
        reward = bandit.reward(result, reference, settings.step_max, norm, mean_s) if result is not None else None
        spine = replace(spine, bandit=bandit.tell(spine.bandit, pruning.device_id, entry.number, reward))
        changed[pruning.device_id] = _after(settings, spine, pruning, task.update) if task and task.update else spine
    return changed


def _after(settings: PruneSettings, spine: Spine, pruning: Pruning, update: Update) -> Spine:
    told = update.metrics
    # A device's first round begins with steps that gather importance, before anything is cut.
    first = first_sparsity(settings, pruning.sparsity_before, pruning.pace) if spine.rounds else pruning.sparsity_before
    return replace(
        spine,
        structure=update.structure,
        sparsity=update.sparsity,
        rounds=spine.rounds + 1,
        rank=pruning.rank,
        steps=int(_sober(told, "steps", settings.steps, STEPS_MAX)),
        step_s=_sober(told, "step_s", 0.0, STEP_S_MAX),
        sent_s=update.sent_s,
        seconds=update.ready_s + update.sent_s,
        step_sparsity=update.sparsity,
        memory=armlimits.told(told, first, pruning.rank),
    )


def _result(entry: RoundEntry, task: TaskEntry) -> bandit.Result | None:
    """What its round brought; None where it was not told, as after a restart, when nobody has seen its times."""
    update = task.update
    pruning = entry.pruning_of(task.device_id)
    if update is None or pruning is None or update.ready_s <= 0:
        return None
    told = update.metrics
    if not {"loss_before", "loss_after", "update_norm"} <= told.keys():
        return None
    gain = update.sparsity - pruning.sparsity_before
    return bandit.Result(told["loss_before"], told["loss_after"], gain, told["update_norm"], update.ready_s + update.sent_s)


def _sober(told: Mapping[str, float], name: str, otherwise: float, most: float) -> float:
    """A figure that a device tells of itself; `otherwise` where it cannot be: it may say anything, NaN and negative times included."""
    value = told.get(name, otherwise)
    return value if 0.0 <= value <= most else otherwise


def _fall(result: bandit.Result) -> float:
    fall = (result.loss_before - result.loss_after) / max(result.loss_before, 1e-6)
    return fall if math.isfinite(fall) else 0.0


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else 0.0

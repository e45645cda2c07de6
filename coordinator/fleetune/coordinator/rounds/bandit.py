"""Which pruning pace and which LoRA rank a device gets next: a bandit over a plane of arms that is cut finer where it was tried.

FedSpine (arXiv:2501.02438) names the idea: an online bandit whose continuous arms are partitioned by a tree, with an upper confidence
bound that weighs what is recent more, rewarded for the loss's fall, pruning progress and the time beside the fleet's. Its text was not
at hand; the formulas here are ours.

An arm is a point of the unit square: x = pruning pace, y = log2 of the rank. A *leaf* is a box of it with a discounted count N and sum
of rewards. The next arm is drawn uniformly from the leaf with the greatest

    sum / N + exploration * sqrt(ln(total N + 1) / N)          (a leaf never tried: before all others)

after each box was clipped to what the device can do (`feasible`). A reward cuts its leaf in two along its longer side, at the arm,
both halves inheriting the history. Everything is a value: state in, state out; draws come from a hash of seed and count, so that the
same calls give the same arms on every machine, before and after a restart.

| symbol | name |
| --- | --- |
| lambda | `Settings.discount`, per round |
| beta | `Settings.exploration` |
| theta | `Settings.side_min`: a box that is not longer is not cut |
| (a, r) | `Arm.pace`, `Arm.rank` |
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

FORMAT = 1
CALIBRATION_PACE = 0.25
CALIBRATION_RANK = 8
SLOWEST = 1.3
"""No arm whose predicted time is beyond this many times the fleet's mean: the slowest device makes the round."""

MEMORY_SHARE = 0.8
"""Of the device's memory that an arm's predicted peak may take."""

_WEIGHTS = (0.6, 0.2, 0.2)
_LAG = 1.5
_LOSS_MIN = 1e-6


@dataclass(frozen=True)
class Settings:
    """Of a job's bandits. Rewards lie in [0, 1]. The history that counts is about 1 / (1 - discount) rounds long: more leaves than
    `leaves_max` could not be told apart by it."""

    rank_min: int = 2
    rank_max: int = 32
    discount: float = 0.98
    exploration: float = 0.1
    side_min: float = 0.25
    leaves_max: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.rank_min <= self.rank_max:
            raise ValueError(f"ranks from {self.rank_min} to {self.rank_max} are none")
        if not 0.0 < self.discount <= 1.0 or self.exploration < 0.0 or self.leaves_max < 1:
            raise ValueError("discount lies in (0, 1], exploration is not negative, and there is at least one leaf")


@dataclass(frozen=True)
class Box:
    """From (x0, y0) to (x1, y1), ends included."""

    x0: float = 0.0
    y0: float = 0.0
    x1: float = 1.0
    y1: float = 1.0

    def clipped(self, other: Box) -> Box | None:
        """What both cover; None where nothing is."""
        both = Box(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1))
        return both if both.x0 <= both.x1 and both.y0 <= both.y1 else None

    def holds(self, x: float, y: float) -> bool:
        return self.x0 <= x <= self.x1 and self.y0 <= y <= self.y1


@dataclass(frozen=True)
class Leaf:
    """`count` and `total` as of round `seen`; they fade by the discount with each round since."""

    box: Box
    count: float = 0.0
    total: float = 0.0
    seen: int = 0

    def faded(self, round_number: int, discount: float) -> tuple[float, float]:
        weight = discount ** max(0, round_number - self.seen)
        return self.count * weight, self.total * weight


@dataclass(frozen=True)
class Arm:
    """What a device is asked for in a round; `x`, `y` is where it was drawn, for the answer."""

    pace: float
    rank: int
    x: float
    y: float


@dataclass(frozen=True)
class Pending:
    """An arm that was given out and not yet answered."""

    device: str
    round: int
    arm: Arm


@dataclass(frozen=True)
class Bandit:
    """The whole state of one tree. Usually one device's; devices of a class may share one, and then get different leaves in a round."""

    settings: Settings
    seed: int
    draws: int = 0
    leaves: tuple[Leaf, ...] = (Leaf(Box()),)
    pending: tuple[Pending, ...] = ()


def ask(bandit: Bandit, device: str, round_number: int, feasible: Box | None = None) -> tuple[Bandit, Arm]:
    """The device's arm for the round; the same again where it was asked before and nothing was told.

    `feasible` is what the device can do (see `feasible_box`); None: the device cannot do anything that is allowed, or nothing is known of
    it, and the caller should have used `cheapest` or `calibration`: then the whole square is open.
    """
    for waiting in bandit.pending:
        if (waiting.device, waiting.round) == (device, round_number):
            return bandit, waiting.arm
    open_leaves = [(leaf, box) for leaf in bandit.leaves if (box := leaf.box.clipped(feasible or Box())) is not None]
    x, y = _drawn(bandit, open_leaves, round_number)
    settings = bandit.settings
    arm = Arm(x, rank_of(settings, y), x, y)
    # An answer to an earlier round will not come any more.
    others = tuple(waiting for waiting in bandit.pending if waiting.device != device)
    return replace(bandit, draws=bandit.draws + 3, pending=(*others, Pending(device, round_number, arm))), arm


def _drawn(bandit: Bandit, open_leaves: Sequence[tuple[Leaf, Box]], round_number: int) -> tuple[float, float]:
    settings = bandit.settings
    total = sum(leaf.faded(round_number, settings.discount)[0] for leaf in bandit.leaves)
    # Siblings that share the tree would all try the same leaf in one round: one that is being tried comes after all others.
    tried = [sum(leaf.box.holds(w.arm.x, w.arm.y) for w in bandit.pending if w.round == round_number) for leaf, _ in open_leaves]
    bounds = [_bound(leaf, total, round_number, settings) for leaf, _ in open_leaves]
    ties = [_uniform(bandit.seed, bandit.draws, place) for place in range(len(open_leaves))]
    place = max(range(len(open_leaves)), key=lambda index: (-tried[index], bounds[index], ties[index]))
    box = open_leaves[place][1]
    along, up = (_uniform(bandit.seed, bandit.draws + offset, 0) for offset in (1, 2))
    return box.x0 + along * (box.x1 - box.x0), box.y0 + up * (box.y1 - box.y0)


def _bound(leaf: Leaf, total: float, round_number: int, settings: Settings) -> float:
    count, rewards = leaf.faded(round_number, settings.discount)
    if leaf.count == 0.0:
        return math.inf
    return rewards / count + settings.exploration * math.sqrt(math.log(total + 1.0) / count)


def tell(bandit: Bandit, device: str, round_number: int, reward: float | None) -> Bandit:
    """The state after the device's answer of the round. None (it dropped out), a reward that is not finite, or an answer nobody waits
    for change no leaf."""
    found = next((waiting for waiting in bandit.pending if (waiting.device, waiting.round) == (device, round_number)), None)
    if found is None:
        return bandit
    rest = tuple(waiting for waiting in bandit.pending if waiting is not found)
    if reward is None or not math.isfinite(reward):
        return replace(bandit, pending=rest)
    arm = found.arm
    index = next(place for place, leaf in enumerate(bandit.leaves) if leaf.box.holds(arm.x, arm.y))
    leaf = bandit.leaves[index]
    # An answer may come after those of later rounds where a tree is shared; it counts as of the latest.
    seen = max(round_number, leaf.seen)
    count, total = leaf.faded(seen, bandit.settings.discount)
    updated = Leaf(leaf.box, count + 1.0, total + min(1.0, max(0.0, reward)), seen)
    halves = _split(updated, arm, bandit.settings) if len(bandit.leaves) < bandit.settings.leaves_max else (updated,)
    return replace(bandit, pending=rest, leaves=(*bandit.leaves[:index], *halves, *bandit.leaves[index + 1 :]))


def _split(leaf: Leaf, arm: Arm, settings: Settings) -> tuple[Leaf, ...]:
    box = leaf.box
    wide, high = box.x1 - box.x0, box.y1 - box.y0
    if max(wide, high) <= settings.side_min:
        return (leaf,)
    # At the arm, but not so near an end that one half would be a sliver.
    if wide >= high:
        cut = min(max(arm.x, box.x0 + 0.25 * wide), box.x1 - 0.25 * wide)
        return replace(leaf, box=replace(box, x1=cut)), replace(leaf, box=replace(box, x0=cut))
    cut = min(max(arm.y, box.y0 + 0.25 * high), box.y1 - 0.25 * high)
    return replace(leaf, box=replace(box, y1=cut)), replace(leaf, box=replace(box, y0=cut))


def best(bandit: Bandit, round_number: int) -> Leaf | None:
    """The leaf with the greatest mean reward, for people to see; None before the first reward."""
    tried = [leaf for leaf in bandit.leaves if leaf.count > 0.0]
    return max(tried, key=lambda leaf: leaf.total / leaf.count, default=None)


# -------------------------------------------------------------------------------------------------------------------- arms


def rank_of(settings: Settings, y: float) -> int:
    """The rank at height y of the square.

    >>> [rank_of(Settings(rank_min=4, rank_max=64), y) for y in (0.0, 0.5, 1.0)]
    [4, 16, 64]
    """
    low, high = math.log2(settings.rank_min), math.log2(settings.rank_max)
    wanted = math.floor(math.pow(2.0, low + y * (high - low)) + 0.5)
    return min(settings.rank_max, max(settings.rank_min, wanted))


def height_of(settings: Settings, rank: int) -> float:
    """The inverse of `rank_of`, for ranks from rank_min to rank_max."""
    low, high = math.log2(settings.rank_min), math.log2(settings.rank_max)
    return 0.0 if high == low else (math.log2(rank) - low) / (high - low)


def calibration(settings: Settings) -> Arm:
    """The cheap arm that every device gets in its first round, whose times calibrate the predictions."""
    rank = min(settings.rank_max, max(settings.rank_min, CALIBRATION_RANK))
    return Arm(CALIBRATION_PACE, rank, CALIBRATION_PACE, height_of(settings, rank))


def cheapest(settings: Settings) -> Arm:
    """For a device that can do nothing within the limits: prune as fast as allowed, least rank."""
    return Arm(1.0, settings.rank_min, 1.0, 0.0)


def give(bandit: Bandit, device: str, round_number: int, arm: Arm) -> Bandit:
    """Notes an arm that was not asked for, so that its reward counts, too."""
    others = tuple(waiting for waiting in bandit.pending if waiting.device != device)
    return replace(bandit, pending=(*others, Pending(device, round_number, arm)))


# ------------------------------------------------------------------------------------------------------------- feasibility


@dataclass(frozen=True)
class Costs:
    """What one device's rounds take, from its own measured rounds and for the job's model.

    Seconds of a local step at no sparsity are `step_s`, of which the share `step_fixed` does not fall with sparsity (embeddings, head,
    launches). A unit of rank adds `step_s_per_rank` to a step, `bytes_per_rank` to each transfer and `memory_per_rank` to the peak.
    """

    step_s: float
    step_fixed: float
    step_s_per_rank: float
    overhead_s: float
    bytes_per_rank: float
    down_bytes_per_s: float
    up_bytes_per_s: float
    memory_bytes: float
    memory_prunable_bytes: float
    memory_per_rank: float


def predicted_s(costs: Costs, steps: int, sparsity: float, rank: int) -> float:
    """Seconds from the task to the last byte of the update."""
    kept = 1.0 - sparsity
    step_s = costs.step_s * (costs.step_fixed + (1.0 - costs.step_fixed) * kept) + costs.step_s_per_rank * rank * kept
    moved = costs.bytes_per_rank * rank * kept
    return costs.overhead_s + steps * step_s + moved / costs.down_bytes_per_s + moved / costs.up_bytes_per_s


def predicted_bytes(costs: Costs, sparsity: float, rank: int) -> float:
    """Peak memory of the round."""
    kept = 1.0 - sparsity
    return costs.memory_bytes - costs.memory_prunable_bytes * sparsity + costs.memory_per_rank * rank * kept


def feasible_box(settings: Settings, allowed: Callable[[float, int], bool], pace_min: float = 0.0) -> Box | None:
    """The arms that `allowed(pace, rank)` takes, as a box; None where it takes none.

    What is allowed at a pace and a rank has to be allowed at a higher pace and at a lower rank, too: pruning makes a device faster. The
    box is then cornered at the least pace at which the least rank is allowed (never below `pace_min`), and at the greatest rank that is
    allowed at that pace.
    """
    if not allowed(1.0, settings.rank_min):
        return None
    low, high = pace_min, 1.0
    if not allowed(low, settings.rank_min):
        for _ in range(20):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if allowed(middle, settings.rank_min) else (middle, high)
        low = high
    ranks = range(settings.rank_min, settings.rank_max + 1)
    rank = max(rank for rank in ranks if rank == settings.rank_min or allowed(low, rank))
    # Heights up to half a rank beyond are still rounded to that rank; a hair less, for the rounding of logarithms.
    top = 1.0 if rank == settings.rank_max else min(1.0, max(0.0, height_of(settings, rank)))
    return Box(low, 0.0, 1.0, top)


def time_limit_s(own_cheapest_s: float, mean_s: float, slowest_cheapest_s: float, deadline_s: float | None = None) -> float:
    """How long a device's round may take: 1.3 of the fleet's mean. One that cannot do that with its cheapest arm may take as long as the
    slowest device of the fleet with its own (`slowest_cheapest_s`): the round will last as long anyway."""
    limit_s = SLOWEST * mean_s
    if own_cheapest_s > limit_s:
        limit_s = max(own_cheapest_s, slowest_cheapest_s)
    return limit_s if deadline_s is None else min(limit_s, deadline_s)


def within_limits(
    costs: Costs, steps: int, sparsity_of: Callable[[float], float], limit_s: float, memory_bytes: float
) -> Callable[[float, int], bool]:
    """The guard: predicted time within the limit, predicted peak within 0.8 of the device's memory.

    `sparsity_of(pace)` is the sparsity at which the round's steps run.
    """

    def allowed(pace: float, rank: int) -> bool:
        sparsity = sparsity_of(pace)
        in_time = predicted_s(costs, steps, sparsity, rank) <= limit_s
        return in_time and predicted_bytes(costs, sparsity, rank) <= MEMORY_SHARE * memory_bytes

    return allowed


# ------------------------------------------------------------------------------------------------------------------ reward


@dataclass(frozen=True)
class Result:
    """What a device's round brought: losses of its probe before and after, sparsity gained, norm of its adapter's update, seconds."""

    loss_before: float
    loss_after: float
    sparsity_gain: float
    update_norm: float
    seconds: float


def reward(result: Result, gain_reference: float, step_max: float, median_norm: float, mean_s: float) -> float:
    """In [0, 1]: 0.6 for the loss's fall (1 where its share reaches `gain_reference`), 0.2 for sparsity, 0.2 for the update's norm beside
    the fleet's median, times exp(-1.5 lag), where lag is how much longer than the fleet's mean the device took. 0 for what is not finite.
    """
    figures = (result.loss_before, result.loss_after, result.sparsity_gain, result.update_norm, result.seconds, mean_s, median_norm)
    if not all(map(math.isfinite, figures)):
        return 0.0
    fall = (result.loss_before - result.loss_after) / max(result.loss_before, _LOSS_MIN)
    parts = (
        _unit(fall / gain_reference) if gain_reference > 0.0 else 0.0,
        _unit(result.sparsity_gain / step_max) if step_max > 0.0 else 0.0,
        _unit(result.update_norm / median_norm) if median_norm > 0.0 else 0.0,
    )
    quality = math.fsum(weight * part for weight, part in zip(_WEIGHTS, parts, strict=True))
    lag = max(0.0, result.seconds - mean_s) / mean_s if mean_s > 0.0 else 0.0
    return quality * math.exp(-_LAG * lag)


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))


# ------------------------------------------------------------------------------------------------------------------- state


def to_dict(bandit: Bandit) -> dict[str, object]:
    """The state as what JSON knows; floats survive exactly."""
    return {
        "format": FORMAT,
        "settings": dict(vars(bandit.settings)),
        "seed": bandit.seed,
        "draws": bandit.draws,
        "leaves": [[*_corners(leaf.box), leaf.count, leaf.total, leaf.seen] for leaf in bandit.leaves],
        "pending": [[entry.device, entry.round, entry.arm.pace, entry.arm.rank, entry.arm.x, entry.arm.y] for entry in bandit.pending],
    }


def from_dict(value: Mapping[str, object]) -> Bandit:
    """The inverse; ValueError for a state of another format."""
    if value.get("format") != FORMAT:
        raise ValueError(f"the bandit's state has the format {value.get('format')!r}, {FORMAT} is known")
    leaves = cast("list[list[float]]", value["leaves"])
    pending = cast("list[tuple[str, int, float, int, float, float]]", value["pending"])
    return Bandit(
        settings=Settings(**cast("dict[str, float]", value["settings"])),  # type: ignore[arg-type]  # whole numbers are whole in JSON
        seed=cast("int", value["seed"]),
        draws=cast("int", value["draws"]),
        leaves=tuple(Leaf(Box(*row[:4]), row[4], row[5], int(row[6])) for row in leaves),
        pending=tuple(Pending(device, number, Arm(pace, rank, x, y)) for device, number, pace, rank, x, y in pending),
    )


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.x0, box.y0, box.x1, box.y1


def _uniform(seed: int, draw: int, place: int) -> float:
    """A number in [0, 1) that depends on nothing else, not even on numpy's version."""
    digest = hashlib.blake2b(f"{seed} {draw} {place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)

"""How fast a model is pruned: a device's sparsity round by round, the cubic steps inside a round, and how much each group keeps.

| symbol | name |
| --- | --- |
| rho_target | `target`, the sparsity at which pruning ends |
| rho^{t-1} | `before` |
| a | `pace`, 0 to 1: the share of the remaining gap that a round closes |
| Delta rho_max | `step_max` |
| tau | `tau`, local steps after each prune event |
| E | `events` of a round |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fleetune.architectures import Group, Layout
from fleetune.structures import Keep

STEP_MAX = 0.10
TAU = 20
NEURONS_MULTIPLE = 8
CRUMB = 0.3
"""Of what a round may cut: where less than this would be left to the target it goes, too. Heads are cut whole anyway, and a pace below 1
would take ever smaller steps towards the target."""

CLUSTERS_MIN = 4
"""Of grouped queries: with fewer key/value heads, cutting whole clusters would be too coarse, so query heads go from each of them."""


@dataclass(frozen=True)
class Round:
    """A device's pruning in one round: `events` times something is cut, each followed by `tau` steps, from `before` to `after`."""

    before: float
    after: float
    events: int
    tau: int = TAU

    @property
    def steps(self) -> int:
        return self.events * self.tau

    def at(self, step: int) -> float | None:
        """The sparsity to cut to just before local step `step` (from 0); None where nothing is due."""
        if step % self.tau or step >= self.steps:
            return None
        return self.sparsity(step // self.tau + 1)

    def sparsity(self, event: int) -> float:
        """After event 1..events: fast at first, slow at last, `after` in the end."""
        if event >= self.events:
            return self.after
        return self.before + (self.after - self.before) * (1.0 - (1.0 - event / self.events) ** 3)


def round_of(before: float, pace: float, target: float, steps: int, tau: int = TAU, step_max: float = STEP_MAX) -> Round:
    """The pruning of a round of about `steps` local steps: never beyond the target, never more than `step_max` at once, never back.

    A crumb that would be left goes, too.

    >>> round_of(0.2, 0.5, 0.5, steps=60).after
    0.25
    """
    _check("pace", pace, 0.0, 1.0)
    _check("target", target, 0.0, 0.95)
    gap = max(0.0, min(target - before, step_max))
    after = before + pace * gap
    if pace > 0.0 and target - before <= step_max and target - after < CRUMB * step_max:
        after = max(before, target)
    return Round(before, after, max(1, steps // tau), tau)


def keeps(layout: Layout, sparsity: float) -> tuple[Keep, ...]:
    """How much of each group to keep, the same share everywhere: at least a head, neurons in multiples of 8; never rises with sparsity."""
    _check("sparsity", sparsity, 0.0, 1.0)
    return tuple(_keep(group, sparsity) for group in layout.groups)


def _keep(group: Group, sparsity: float) -> Keep:
    share = 1.0 - sparsity
    if group.kind == "neurons":
        wanted = NEURONS_MULTIPLE * _rounded(group.units * share / NEURONS_MULTIPLE)
        # A width that is no multiple itself stays as it is until something is cut.
        return Keep(group.units if sparsity <= 0.0 else min(group.units, max(NEURONS_MULTIPLE, wanted)), 1)
    if group.kv_heads >= CLUSTERS_MIN or group.heads_per_kv == 1:
        return Keep(max(1, _rounded(group.kv_heads * share)), group.heads_per_kv)
    return Keep(group.kv_heads, max(1, _rounded(group.heads_per_kv * share)))


def _rounded(value: float) -> int:
    """Half up: Python's own rounds half to even, which is no steady fall. A hair up, for 12 * (1 - 0.25) is not 9 in binary everywhere."""
    return math.floor(value + 0.5 + 1e-9)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, {low} to {high} is allowed")

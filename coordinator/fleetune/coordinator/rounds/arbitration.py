"""How many ranks a round may have, and which triplets of which modules they are: the coordinator's part of FedARA.

FedARA (arXiv:2501.14406) lets devices score their triplets and a server arbitrate one mask for all; its text was not at hand, so the two
rules below are ours: by vote, or by mean score. The budget falls along a cubic, as in AdaLoRA (Zhang et al. 2023). A triplet that was
dropped never comes back. A device that did not score a triplet (it held fewer) has no say in it, rather than a zero.

| symbol | name |
| --- | --- |
| b_0, b_T | `Budget.first`, `Budget.last`: triplets of all modules together |
| t_w, t_f | `Budget.warm_rounds`, `Budget.final_rounds` |
| p_i | weights of the devices |
| T_h | `threshold` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

THRESHOLD = 0.5
WARM_SHARE = 0.1
FINAL_SHARE = 0.3


@dataclass(frozen=True)
class Budget:
    """Triplets by round: `first` in the warm-up, `last` in the final rounds, a cubic fall between."""

    first: int
    last: int
    rounds: int
    warm_rounds: int
    final_rounds: int

    def __post_init__(self) -> None:
        if not 0 <= self.last <= self.first or self.rounds < 1 or self.warm_rounds < 0 or self.final_rounds < 0:
            raise ValueError(f"no budget: {self.first} to {self.last} triplets in {self.rounds} rounds")

    def at(self, round_number: int) -> int:
        """Triplets that may be alive after round 1..rounds. Never rises.

        >>> [Budget(100, 20, 10, 1, 3).at(number) for number in (1, 4, 7, 8, 10)]
        [100, 30, 20, 20, 20]
        """
        if round_number <= self.warm_rounds:
            return self.first
        falling = self.rounds - self.warm_rounds - self.final_rounds
        if falling <= 0 or round_number >= self.rounds - self.final_rounds:
            return self.last
        left = 1.0 - (round_number - self.warm_rounds) / falling
        return self.last + math.floor((self.first - self.last) * left**3)


def budget(modules: int, rank_first: int, rank_last: int, rounds: int) -> Budget:
    """The usual one: from `rank_first` to `rank_last` ranks a module on the mean, a tenth of the rounds before and three after the fall."""
    return Budget(modules * rank_first, modules * rank_last, rounds, math.ceil(WARM_SHARE * rounds), math.ceil(FINAL_SHARE * rounds))


@dataclass(frozen=True)
class Scored:
    """A device's scores by module, one for each triplet that was handed out; NaN for a triplet that it did not hold. `weight` > 0."""

    weight: float
    scores: Mapping[str, Sequence[float]]


Alive = dict[str, tuple[bool, ...]]


def by_score(ranks: Mapping[str, int], devices: Sequence[Scored], wanted: int) -> Alive:
    """Keeps the `wanted` triplets with the greatest mean score over the devices that scored them; all where there are no more.

    `ranks` are the triplets of each module now. Ties go by module name and place. A triplet that nobody scored counts as least.
    """
    return _alive(ranks, _ordered(_means(ranks, devices))[: max(0, wanted)])


def by_vote(ranks: Mapping[str, int], devices: Sequence[Scored], wanted: int, threshold: float = THRESHOLD) -> Alive:
    """Each device votes for its own best `wanted` triplets; those with at least `threshold` of the votes that were cast come first, by mean
    score, then all others by mean score, until there are `wanted`."""
    means = _means(ranks, devices)
    cast: dict[tuple[str, int], float] = dict.fromkeys(means, 0.0)
    given: dict[tuple[str, int], float] = dict.fromkeys(means, 0.0)
    for device in devices:
        own = _own(ranks, device)
        for triplet in own:
            cast[triplet] += device.weight
        for triplet in _ordered(own)[: max(0, wanted)]:
            given[triplet] += device.weight
    # A hair below, as weights that sum to a half in decimals may not in binary.
    elected = {triplet for triplet in means if cast[triplet] and given[triplet] >= (threshold - 1e-9) * cast[triplet]}
    order = sorted(_ordered(means), key=lambda triplet: triplet not in elected)
    return _alive(ranks, order[: max(0, wanted)])


def remaining(alive: Alive) -> dict[str, int]:
    """Ranks of the modules that stay; a module without any is not named: it is no longer sent nor computed."""
    return {name: sum(mask) for name, mask in alive.items() if any(mask)}


def payload_bytes(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], element_bytes: int) -> int:
    """Bytes of a state or an update in one direction, for weights of shape (outputs, inputs)."""
    return element_bytes * sum(rank * (sum(shapes[name]) + 1) for name, rank in ranks.items())


def _own(ranks: Mapping[str, int], device: Scored) -> dict[tuple[str, int], float]:
    found: dict[tuple[str, int], float] = {}
    for name, rank in ranks.items():
        values = device.scores.get(name, ())
        if values and len(values) != rank:
            raise ValueError(f"{name} has {rank} triplets, a device scored {len(values)}")
        found |= {(name, place): value for place, value in enumerate(values) if math.isfinite(value)}
    return found


def _means(ranks: Mapping[str, int], devices: Sequence[Scored]) -> dict[tuple[str, int], float]:
    sums: dict[tuple[str, int], list[tuple[float, float]]] = {(name, place): [] for name, rank in ranks.items() for place in range(rank)}
    for device in devices:
        for triplet, value in _own(ranks, device).items():
            sums[triplet].append((device.weight * value, device.weight))
    # Exactly rounded sums, so that the order in which devices answered tells nothing.
    return {
        triplet: math.fsum(part for part, _ in parts) / math.fsum(weight for _, weight in parts) if parts else -math.inf
        for triplet, parts in sums.items()
    }


def _ordered(scores: Mapping[tuple[str, int], float]) -> list[tuple[str, int]]:
    return sorted(scores, key=lambda triplet: (-scores[triplet], triplet))


def _alive(ranks: Mapping[str, int], kept: Sequence[tuple[str, int]]) -> Alive:
    chosen = set(kept)
    return {name: tuple((name, place) in chosen for place in range(rank)) for name, rank in ranks.items()}

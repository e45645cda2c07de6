"""Who gets which rows: IID or Dirichlet by label, seeded, every row to exactly one device, no device empty."""

# Why Dirichlet: real devices see unequal amounts of unequal classes. For each label, the devices' shares are one draw from
# Dirichlet(alpha, ..., alpha) (Hsu, Qi, Brown 2019, "Measuring the effects of non-identical data distribution"): a small alpha
# gives most of a label to a few devices, a large one goes towards IID.

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

Shares = Mapping[Hashable, Sequence[float]]
"""Label to the part of it that each device gets; the parts of a label sum to 1."""


def iid(count: int, devices: int, seed: int) -> list[list[int]]:
    """Row numbers 0..count-1 shuffled and dealt like cards: sizes differ by one at the most. Sorted within a device."""
    _check(count, devices)
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return [sorted(order[device::devices]) for device in range(devices)]


def dirichlet_shares(labels: Sequence[Hashable], devices: int, alpha: float, seed: int) -> Shares:
    """One draw of Dirichlet(alpha) over the devices for each label, in the labels' order of first appearance."""
    if alpha <= 0:
        raise ValueError(f"alpha {alpha} must be above 0")
    rng = random.Random(seed)
    return {label: _dirichlet(devices, alpha, rng) for label in dict.fromkeys(labels)}


def by_shares(labels: Sequence[Hashable], shares: Shares, devices: int, seed: int) -> list[list[int]]:
    """Row numbers of each device so that it gets its share of every label, in whole rows.

    A label's rows are counted out by largest remainder, so that they sum exactly. Then, while a device has no row at all, it is
    given one by the device with the most rows, out of that device's most frequent label: no agent stands idle, and nobody's mix
    changes noticeably. Train and validation rows dealt by the same shares have the same mix on a device.
    """
    _check(len(labels), devices)
    rng = random.Random(seed)
    dealt: list[list[int]] = [[] for _ in range(devices)]
    for label in dict.fromkeys(labels):
        rows = [row for row, other in enumerate(labels) if other == label]
        rng.shuffle(rows)
        start = 0
        for device, count in enumerate(largest_remainder(len(rows), shares.get(label, [1 / devices] * devices))):
            dealt[device] += rows[start : start + count]
            start += count
    for device in range(devices):
        if not dealt[device]:
            _give_one(dealt, device, labels)
    return [sorted(rows) for rows in dealt]


def largest_remainder(count: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `count` and differ from count * share by less than one; ties go to the first."""
    exact = [count * share for share in shares]
    whole = [int(part) for part in exact]
    missing = count - sum(whole)
    by_remainder = sorted(range(len(shares)), key=lambda index: (whole[index] - exact[index], index))
    for index in by_remainder[:missing]:
        whole[index] += 1
    return whole


def _dirichlet(devices: int, alpha: float, rng: random.Random) -> list[float]:
    draws = [rng.gammavariate(alpha, 1.0) for _ in range(devices)]
    total = sum(draws)
    if total <= 0.0:
        # With a tiny alpha every gamma draw may underflow; the limit of the distribution is one device that gets all.
        chosen = rng.randrange(devices)
        return [1.0 if device == chosen else 0.0 for device in range(devices)]
    return [draw / total for draw in draws]


def _give_one(dealt: list[list[int]], device: int, labels: Sequence[Hashable]) -> None:
    richest = max(range(len(dealt)), key=lambda other: len(dealt[other]))
    label = Counter(labels[row] for row in dealt[richest]).most_common(1)[0][0]
    row = next(row for row in reversed(dealt[richest]) if labels[row] == label)
    dealt[richest].remove(row)
    dealt[device].append(row)


def _check(count: int, devices: int) -> None:
    if devices < 1:
        raise ValueError(f"{devices} devices: at least 1 is needed")
    if count < devices:
        raise ValueError(f"{count} rows for {devices} devices: every device needs at least one")

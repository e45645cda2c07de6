"""How fast those who send just now may send, so that together they keep to what a planned round's uploads share. Pure.

A plan gives each device a share b of a resource of `total` units, bandwidth or airtime, as if all sent at the same time. They do not: some
are not ready yet, some are done, some have died. With `hard` sharing nobody takes what is free then, as in the paper. With `weights` those
who send get the whole of it in proportion to their shares, each no more than its own link carries; the more that one cannot use, the more
the others get. No device is ever slower than with `hard`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Sharing = Literal["weights", "hard"]

RAISE_FROM = 1.05
"""A rate that grows by less is not told: where many send, each that is done would have all others told."""


@dataclass(frozen=True)
class Claim:
    """One device's part of the shared uplink: units by the plan, what a unit carries for it, and what its own link carries."""

    share: float
    bits_per_unit: float
    own_bits_per_s: float = math.inf


def rates(claims: Mapping[str, Claim], total: float, sharing: Sharing) -> dict[str, float]:
    """Bits per second of each device of `claims`, all of which send just now. They take `total` units together at the most."""
    if sharing == "hard":
        return {device: min(claim.share * claim.bits_per_unit, claim.own_bits_per_s) for device, claim in claims.items()}
    found: dict[str, float] = {}
    # First those whose own link is the tightest for their share: what they leave is for the rest.
    waiting = sorted(claims.items(), key=lambda item: (item[1].own_bits_per_s / (item[1].share * item[1].bits_per_unit), item[0]))
    # Summed from the back: a difference of nearly equal sums could come out below what is left.
    lefts = list(itertools.accumulate(claim.share for _, claim in reversed(waiting)))
    free = total
    for (device, claim), left in zip(waiting, reversed(lefts), strict=True):
        units = min(free * claim.share / left, claim.own_bits_per_s / claim.bits_per_unit)
        found[device] = min(units * claim.bits_per_unit, claim.own_bits_per_s)
        free = max(0.0, free - units)
    return found


class UplinkShares:
    """Of one round: who sends, and what each was told last. Whoever sends goes by any name of its own, such as its task's."""

    def __init__(self, total: float, sharing: Sharing) -> None:
        self._total = total
        self._sharing: Sharing = sharing
        self._sending: dict[str, Claim] = {}
        self._told: dict[str, float] = {}

    @property
    def sending(self) -> Iterable[str]:
        return self._sending.keys()

    @property
    def told(self) -> Mapping[str, float]:
        """Bits per second, of those who send."""
        return self._told

    def began(self, sender: str, claim: Claim) -> None:
        """It sends from now on."""
        self._sending[sender] = claim
        self._told.pop(sender, None)

    def ended(self, sender: str) -> None:
        """It is done, or its stream was cut. Nothing happens where it was not sending."""
        self._sending.pop(sender, None)
        self._told.pop(sender, None)

    def changes(self) -> dict[str, float]:
        """The rates to be told now, bits per second, those that fall first; taken for told."""
        before = dict(self._told)
        # A newcomer may still go by a rate of before its stream was cut: it is told in any case.
        changes = {
            sender: rate
            for sender, rate in rates(self._sending, self._total, self._sharing).items()
            if sender not in before or rate < before[sender] or rate > before[sender] * RAISE_FROM
        }
        self._told.update(changes)
        return dict(sorted(changes.items(), key=lambda item: (item[1] >= before.get(item[0], 0.0), item[0])))

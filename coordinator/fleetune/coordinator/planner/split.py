"""The exact split of the uplink between the pairs of one matching: the least round latency that its shares can give.

With enough to go round, all pairs finish together: sum over pairs of `share_needed(D, T - t)` = B fixes T. It is solved for
x = T - max t, which loses no digits where uploads are short beside the computing, by Newton from the left: the sum falls and is convex
in x, so steps never overshoot. A pair that is bound by its own cap, or that has nothing to send, can raise T; then a part of B stays free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from fleetune.coordinator.planner.links import send_s, share_needed, share_slope
from fleetune.coordinator.planner.problem import Fleet, Floats, Ints

_STEPS_MAX = 2000
_ROUND_DOWN = 1.0 - 1e-15
"""Shares are scaled down by this much where they would sum to more than the total by rounding."""


@dataclass(frozen=True, eq=False)
class Split:
    """Shares and finishing times (L,), each in the order of the blocks, and the round's latency, which is the last finish."""

    round_s: float
    shares: Floats
    finish_s: Floats


@dataclass(frozen=True, eq=False)
class Pairs:
    """The facts of the chosen pairs, each (n,)."""

    ready_s: Floats
    payload_bits: Floats
    bits_per_unit: Floats
    snr_hz: Floats
    max_share: Floats

    def need(self, slack_s: Floats) -> Floats:
        """Least shares that send each payload in `slack_s`."""
        return share_needed(self.payload_bits, slack_s, self.bits_per_unit, self.snr_hz)

    def send_s(self, shares: Floats) -> Floats:
        """Seconds of each upload with these shares."""
        return send_s(self.payload_bits, shares, self.bits_per_unit, self.snr_hz)


def pairs_of(fleet: Fleet, device_of: Ints) -> Pairs:
    """Block l trained by device device_of[l]."""
    return Pairs(
        fleet.ready_s[device_of, np.arange(len(fleet.blocks))],
        fleet.payload_bits,
        fleet.bits_per_unit[device_of],
        fleet.snr_hz[device_of],
        fleet.max_share[device_of],
    )


def best_split(fleet: Fleet, device_of: Ints) -> Split:
    """The least latency of a matching, and shares that reach it; infinite where a pair can never finish."""
    return split_pairs(pairs_of(fleet, device_of), fleet.total)


def split_pairs(pairs: Pairs, total: float) -> Split:
    """The same for any pairs; one device may stand in several, as if it were several."""
    count = pairs.ready_s.size
    if not count:
        return Split(0.0, np.zeros(0), np.zeros(0))
    sends = pairs.payload_bits > 0
    if not sends.any():
        return Split(float(pairs.ready_s.max()), np.zeros(count), np.array(pairs.ready_s))
    latest_s = float(pairs.ready_s[sends].max())
    lead_s = latest_s - pairs.ready_s
    # Each alone with everything it may use: no split does better. Its own cap counts here for good.
    alone_s = pairs.send_s(np.minimum(pairs.max_share, total)) - lead_s
    lowest_s = float(alone_s[sends].max())
    if not math.isfinite(lowest_s):
        return Split(math.inf, np.zeros(count), np.full(count, np.inf))
    idle = ~sends
    floor_s = max(lowest_s, float((-lead_s[idle]).max())) if idle.any() else lowest_s
    after_s = _shared(pairs, lead_s, total, floor_s)
    shares = np.minimum(pairs.need(after_s + lead_s), np.minimum(pairs.max_share, total))
    used = math.fsum(cast("Sequence[float]", shares.tolist()))
    if used > total * _ROUND_DOWN:
        shares *= total * _ROUND_DOWN / used
    finish_s = pairs.ready_s + pairs.send_s(shares)
    return Split(float(finish_s.max()), shares, finish_s)


def equal_split(fleet: Fleet, device_of: Ints) -> Split:
    """Every pair has the same share of the total, or its cap where that is less."""
    pairs = pairs_of(fleet, device_of)
    shares = np.minimum(fleet.total / max(device_of.size, 1), pairs.max_share)
    finish_s = pairs.ready_s + pairs.send_s(shares)
    return Split(float(finish_s.max(initial=0.0)), shares, finish_s)


def equal_times(fleet: Fleet) -> Floats:
    """When each device would finish each block (K, L) if it had an equal share; infinite where it cannot."""
    shares = np.minimum(fleet.total / max(len(fleet.blocks), 1), fleet.max_share)[:, None]
    times = fleet.ready_s + send_s(fleet.payload_bits[None, :], shares, fleet.bits_per_unit[:, None], fleet.snr_hz[:, None])
    return np.where(fleet.usable, times, np.inf)


def _shared(pairs: Pairs, lead_s: Floats, total: float, from_s: float) -> float:
    """The least x >= from_s at which the needs sum to no more than `total`; at `from_s` each need alone is no more than that.

    Next to the most that its power allows, a radio's need changes by more than can be told within one digit of x. Where Newton's step is
    too short to count, a least step is taken therefore, which doubles each time: x ends a few digits late, never early.
    """
    x, least = from_s, 2.0**-53
    for _ in range(_STEPS_MAX):
        slack_s = x + lead_s
        shares = np.minimum(pairs.need(slack_s), total)
        excess = float(shares.sum()) - total
        if excess <= 0:
            break
        slope = float(share_slope(pairs.payload_bits, slack_s, shares, pairs.bits_per_unit, pairs.snr_hz).sum())
        step = -excess / slope if slope < 0 else 0.0
        if not step > least * x:
            least *= 2.0
            step = least * x
        x += step
    return x

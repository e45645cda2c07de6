"""What a share of the uplink carries, and the least share that sends a payload in time.

A link is linear (b units carry b s bit/s) or power-limited (b Hz carry b log2(1 + p/b) bit/s, Shannon, p = P g / N0 in Hz). All
functions take arrays that broadcast against each other.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from fleetune.coordinator.planner.problem import Bools, Floats

LN2 = float(np.log(2.0))

_NEWTON_STEPS = 8
_SERIES_BELOW = 1e-5


def rate_bits_per_s(share: Floats, bits_per_unit: Floats, snr_hz: Floats) -> Floats:
    """Bits a second that `share` carries; `snr_hz` is NaN where the link is linear."""
    with np.errstate(all="ignore"):
        linear = share * bits_per_unit
        radio = ~np.isnan(snr_hz)
        if not radio.any():
            return linear
        # p ln(1 + p/b) b/p: as b grows without bound it goes to p / ln 2, as b goes to 0 to 0.
        limited = np.where(np.isinf(share), snr_hz, share * np.log1p(snr_hz / share)) / LN2
        return cast("Floats", np.where(radio, np.where(share > 0, limited, 0.0), linear))


def send_s(bits: Floats, share: Floats, bits_per_unit: Floats, snr_hz: Floats) -> Floats:
    """Seconds that `bits` take with `share`; infinite where nothing is carried, 0 where nothing is to be sent."""
    with np.errstate(all="ignore"):
        return np.where(bits > 0, bits / rate_bits_per_s(share, bits_per_unit, snr_hz), 0.0)


def share_needed(bits: Floats, slack_s: Floats, bits_per_unit: Floats, snr_hz: Floats) -> Floats:
    """The least share that sends `bits` within `slack_s`; infinite where no share does."""
    with np.errstate(all="ignore"):
        rate = bits / slack_s
        need = rate / bits_per_unit
        radio = ~np.isnan(snr_hz)
        if radio.any():
            everywhere: Bools = np.broadcast_to(radio, need.shape)
            radio_rate = np.broadcast_to(rate, need.shape)[everywhere]
            radio_snr = np.broadcast_to(snr_hz, need.shape)[everywhere]
            need[everywhere] = _radio_share(radio_rate, radio_snr)
        in_time = np.where(bits > 0, slack_s > 0, slack_s >= 0)
        return np.where(in_time, np.where(bits > 0, np.where(np.isnan(need), np.inf, need), 0.0), np.inf)


def share_slope(bits: Floats, slack_s: Floats, share: Floats, bits_per_unit: Floats, snr_hz: Floats) -> Floats:
    """How fast `share_needed` falls with time, d share / d slack, at `share` = the need at `slack_s`; negative."""
    with np.errstate(all="ignore"):
        ratio = snr_hz / share
        rising = np.where(np.isnan(snr_hz), bits_per_unit, rate_slope(ratio))
        return np.where(bits > 0, -bits / (slack_s * slack_s * rising), 0.0)


def rate_slope(ratio: Floats) -> Floats:
    """d rate / d share of a power-limited link where p/b = `ratio`: log2(1 + u) - u / ((1 + u) ln 2), by its series where u is small."""
    series = ratio * ratio * (0.5 - ratio * (2.0 / 3.0))
    return np.where(ratio > 1e-4, np.log1p(ratio) - ratio / (1.0 + ratio), series) / LN2


def _radio_share(rate: Floats, snr_hz: Floats) -> Floats:
    """Solves b log2(1 + p/b) = rate. With c = rate ln 2 / p and u = p/b: ln(1 + u) = c u, which has a root u > 0 only for c < 1.

    With y = c (1 + u): y - ln y = c - ln c, so y = -W_{-1}(-c e^{-c}), by Newton from 1 + sqrt(2 v) + v, v = c - ln c - 1, which is
    never below the root (Chatzigeorgiou 2013), where the function is convex and rising: it falls to the root without overshoot.
    Where c is near 1, the root is small and is taken from its series instead.
    """
    c = rate * LN2 / snr_hz
    missing = 1.0 - c
    # Each form where it loses the fewest digits.
    v = np.where(missing > 0.5, c - np.log(c) - 1.0, np.where(missing > 1e-3, -np.log1p(-missing) - missing, _tail(missing)))
    z = np.sqrt(2.0 * v) + v
    for _ in range(_NEWTON_STEPS):
        z = z - (z - np.log1p(z) - v) * (1.0 + z) / z
    u = (z + missing) / c
    near = 2.0 * missing + missing * missing * (8.0 / 3.0 + missing * (28.0 / 9.0))
    u = np.where(missing > _SERIES_BELOW, u, near)
    return np.where(rate > 0, np.where(missing > 0, snr_hz / u, np.inf), 0.0)


def _tail(e: Floats) -> Floats:
    """-ln(1 - e) - e without cancellation, for small e."""
    return e * e * (0.5 + e * (1.0 / 3.0 + e * (0.25 + e * (0.2 + e / 6.0))))

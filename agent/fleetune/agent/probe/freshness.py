"""Keeping measured figures true: real round times correct them, and rules say when to measure again. Decides from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

NEWEST_WEIGHT = 0.3
"""Weight of the newest round in the moving average."""

RATIOS_KEPT = 20
AGE_S_MAX = 7 * 86_400.0
DRIFT_MAX = 1.5
"""Rounds this many times slower or faster than measured say that something has changed: another clock rate, another load, another board."""

DRIFT_ROUNDS_MIN = 5


@dataclass(frozen=True)
class RoundTimes:
    """Observed over predicted seconds of the rounds since the measuring, the newest last."""

    average: float = 1.0
    ratios: tuple[float, ...] = ()

    def observed(self, predicted_s: float, actual_s: float) -> RoundTimes:
        """With one more round. Times that are not finite and above 0 change nothing: a clock was set, or nothing was computed."""
        if not (math.isfinite(predicted_s) and math.isfinite(actual_s) and predicted_s > 0 and actual_s > 0):
            return self
        ratio = actual_s / predicted_s
        # The first round replaces the guess that the measuring was right.
        average = ratio if not self.ratios else (1 - NEWEST_WEIGHT) * self.average + NEWEST_WEIGHT * ratio
        return replace(self, average=average, ratios=(*self.ratios, ratio)[-RATIOS_KEPT:])

    @property
    def margin(self) -> float:
        """What to reckon with above the average: the 90th percentile of the ratios seen over their average, never below 1."""
        if not self.ratios:
            return 1.0
        return max(1.0, percentile(self.ratios, 0.9) / self.average)

    def corrected_s(self, seconds: float, *, cautious: bool = False) -> float:
        """A measured time as rounds have shown it to be; `cautious` adds the margin."""
        return seconds * self.average * (self.margin if cautious else 1.0)


def stale(measured_unix_s: float, now_unix_s: float, times: RoundTimes, age_s_max: float = AGE_S_MAX) -> str:
    """Why the figures should be measured again; empty while they hold. What they are the key of (model, torch, device) is not looked at."""
    age_s = now_unix_s - measured_unix_s
    if age_s < 0:
        return "measured in the future: the clock was set"
    if age_s > age_s_max:
        return f"measured {age_s / 86_400:.0f} days ago"
    if len(times.ratios) >= DRIFT_ROUNDS_MIN and not 1 / DRIFT_MAX <= times.average <= DRIFT_MAX:
        return f"rounds take {times.average:.2g} times what was measured"
    return ""


def settled(times: RoundTimes) -> RoundTimes:
    """Drift against what rounds usually take, not against what was measured: rows shorter than the measured ones are no drift.

    For figures that every round corrects, and that measuring again would give as they were.
    """
    if not times.ratios:
        return times
    usual = percentile(times.ratios, 0.5)
    return RoundTimes(times.average / usual, tuple(ratio / usual for ratio in times.ratios))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of `values` do not exceed, linear between neighbours; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

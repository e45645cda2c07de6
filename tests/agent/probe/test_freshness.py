"""Measured figures against what rounds show."""

from __future__ import annotations

import math

import pytest

from fleetune.agent.probe import freshness
from fleetune.agent.probe.freshness import RoundTimes


def after(*ratios: float) -> RoundTimes:
    times = RoundTimes()
    for ratio in ratios:
        times = times.observed(1.0, ratio)
    return times


def test_the_first_round_replaces_the_guess_and_later_ones_are_averaged() -> None:
    assert after(2.0).average == 2.0
    assert after(2.0, 1.0).average == pytest.approx(1.7)


def test_the_margin_is_what_nine_rounds_in_ten_stay_below() -> None:
    steady, jumpy = after(*[1.0] * 20), after(*[1.0, 1.0, 1.0, 1.0, 3.0] * 4, *[1.0] * 10)
    assert steady.margin == 1.0
    assert steady.corrected_s(2.0, cautious=True) == pytest.approx(2.0)
    assert jumpy.corrected_s(1.0, cautious=True) == pytest.approx(freshness.percentile(jumpy.ratios, 0.9))


def test_the_margin_is_never_below_one() -> None:
    assert after(1.0, 1.0, 9.0).margin >= 1.0


@pytest.mark.parametrize(("predicted", "actual"), [(0.0, 1.0), (1.0, 0.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -1.0)])
def test_times_that_cannot_be_change_nothing(predicted: float, actual: float) -> None:
    assert after(2.0).observed(predicted, actual) == after(2.0)


def test_only_the_latest_rounds_are_kept() -> None:
    assert len(after(*[1.0] * 50).ratios) == freshness.RATIOS_KEPT


def test_young_figures_that_rounds_confirm_are_fresh() -> None:
    assert freshness.stale(1000.0, 2000.0, after(*[1.1] * 9)) == ""


def test_old_figures_are_stale() -> None:
    assert "8 days ago" in freshness.stale(0.0, 8 * 86_400.0, RoundTimes())


def test_figures_from_the_future_are_stale() -> None:
    assert "clock was set" in freshness.stale(2000.0, 1000.0, RoundTimes())


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_rounds_that_drift_away_make_figures_stale_but_not_at_once(ratio: float) -> None:
    assert freshness.stale(0.0, 1.0, after(*[ratio] * 4)) == ""
    assert f"{ratio:.2g} times" in freshness.stale(0.0, 1.0, after(*[ratio] * 5))


def test_percentiles_lie_between_neighbours() -> None:
    assert freshness.percentile([3, 1, 2], 0.5) == 2
    assert freshness.percentile([1, 2], 0.9) == pytest.approx(1.9)
    assert math.isnan(freshness.percentile([], 0.5))

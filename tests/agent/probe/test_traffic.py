"""The link, from transfers that happen anyway."""

from __future__ import annotations

import math

import pytest

from fleetune.agent.probe.traffic import BYTES_MIN, Goodput, RoundTrip

MIB = 1 << 20


def test_before_a_transfer_nothing_is_known() -> None:
    assert (Goodput().bytes_per_s, Goodput().slow_bytes_per_s, RoundTrip().least_s, RoundTrip().median_s) == (None, None, None, None)


def test_rates_are_averaged_with_the_newest_weighing_most() -> None:
    goodput = Goodput()
    goodput.add(MIB, 1.0)
    goodput.add(2 * MIB, 1.0)
    assert goodput.bytes_per_s == pytest.approx(1.3 * MIB)
    assert goodput.slow_bytes_per_s == pytest.approx(1.1 * MIB)


@pytest.mark.parametrize(("size_bytes", "seconds"), [(BYTES_MIN - 1, 1.0), (MIB, 0.0), (MIB, -1.0), (MIB, math.nan)])
def test_small_transfers_and_impossible_times_are_left_out(size_bytes: int, seconds: float) -> None:
    goodput = Goodput()
    goodput.add(size_bytes, seconds)
    assert goodput.samples == 0


def test_a_transfer_held_back_by_its_own_limit_does_not_make_the_link_slower() -> None:
    goodput = Goodput()
    goodput.add(10 * MIB, 1.0)
    goodput.add(MIB, 1.0, limit_bytes_per_s=MIB)
    assert goodput.bytes_per_s == 10 * MIB


def test_a_transfer_far_below_its_limit_shows_a_slow_link() -> None:
    goodput = Goodput()
    goodput.add(10 * MIB, 1.0)
    goodput.add(MIB, 1.0, limit_bytes_per_s=8 * MIB)
    assert goodput.bytes_per_s == pytest.approx(7.3 * MIB)


def test_the_smallest_round_trip_is_the_way_and_the_median_has_the_waiting() -> None:
    trip = RoundTrip()
    for seconds in (0.05, 0.02, 0.4, math.nan):
        trip.add(seconds)
    assert (trip.least_s, trip.median_s) == (0.02, 0.05)

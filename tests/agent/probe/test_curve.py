"""From a few measured depths to all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.agent.probe import curve
from fleetune.errors import DataError

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@given(VALUES)
def test_the_isotonic_fit_never_falls_and_keeps_the_sum(values: list[float]) -> None:
    fitted = curve.isotonic(values)
    assert all(early <= late + 1e-6 for early, late in itertools.pairwise(fitted))
    assert sum(fitted) == pytest.approx(sum(values), abs=1e-3)


@given(VALUES)
def test_what_rises_already_is_left_alone(values: list[float]) -> None:
    ordered = sorted(values)
    assert curve.isotonic(ordered) == ordered


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_no_rising_sequence_of_whole_numbers_is_nearer(values: list[int]) -> None:
    fitted = curve.isotonic(values)
    distance = sum((fit - value) ** 2 for fit, value in zip(fitted, values, strict=True))
    rising = itertools.combinations_with_replacement(range(7), len(values))
    assert all(distance <= sum((x - y) ** 2 for x, y in zip(other, values, strict=True)) + 1e-9 for other in rising)


def test_violators_are_pooled_to_their_weighted_mean() -> None:
    assert curve.isotonic([1, 4, 2, 5]) == [1, 3, 3, 5]
    assert curve.isotonic([4, 2], [3, 1]) == [3.5, 3.5]
    assert curve.isotonic([]) == []


def test_weights_of_another_number_are_refused() -> None:
    with pytest.raises(DataError, match="1 weights stand beside 2 values"):
        curve.isotonic([1, 2], [1])


def test_between_and_beyond_measured_depths_the_line_goes_on() -> None:
    assert curve.piecewise({2: 20.0, 4: 40.0}, 5) == [10, 20, 30, 40, 50]
    assert curve.piecewise({1: 5.0, 2: 20.0, 4: 40.0}, 4) == [5, 20, 30, 40]
    assert curve.piecewise({3: 7.0}, 4) == [7, 7, 7, 7]


def test_a_line_never_goes_below_nothing() -> None:
    assert curve.piecewise({3: 1.0, 4: 11.0}, 4)[:2] == [0, 0]


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {5: 1.0}])
def test_depths_that_the_model_does_not_have_are_refused(points: dict[int, float]) -> None:
    with pytest.raises(DataError):
        curve.piecewise(points, 4)


def test_the_filled_curve_is_monotone_though_the_measuring_was_not() -> None:
    assert curve.filled({1: 3.0, 2: 1.0, 4: 5.0}, 4) == [2, 2, 3, 5]


def test_the_affine_fit_tells_how_well_it_fits() -> None:
    assert curve.affine({1: 3.0, 2: 5.0, 3: 7.0}) == pytest.approx((1, 2, 1))
    assert curve.affine({2: 3.0}) == (3, 0, 1)
    assert 0 < curve.affine({1: 0.0, 2: 3.0, 3: 2.0})[2] < 1


@pytest.mark.parametrize(("depths", "chosen"), [(1, [1]), (3, [1, 2, 3]), (7, [1, 2, 4, 7]), (25, [1, 2, 14, 25])])
def test_both_ends_the_first_layer_and_a_middle_are_measured(depths: int, chosen: list[int]) -> None:
    assert curve.chosen_depths(depths) == chosen

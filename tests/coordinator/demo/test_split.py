"""How the demo deals rows to devices."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.demo import split

LABELS = ["on"] * 60 + ["off"] * 30 + ["dim"] * 10


def dealt_once(dealt: list[list[int]], count: int) -> bool:
    return sorted(row for rows in dealt for row in rows) == list(range(count))


@given(st.integers(1, 12), st.integers(0, 300), st.integers(0, 5))
def test_iid_deals_every_row_once_and_evenly(devices: int, extra: int, seed: int) -> None:
    dealt = split.iid(devices + extra, devices, seed)
    sizes = [len(rows) for rows in dealt]
    assert dealt_once(dealt, devices + extra)
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=8, max_size=200), st.integers(1, 8), st.floats(0.001, 100), st.integers(0, 5))
def test_dirichlet_deals_every_row_once_and_leaves_no_device_empty(labels: list[str], devices: int, alpha: float, seed: int) -> None:
    shares = split.dirichlet_shares(labels, devices, alpha, seed)
    dealt = split.by_shares(labels, shares, devices, seed)
    assert dealt_once(dealt, len(labels))
    assert all(dealt)


@given(st.integers(0, 1000), st.lists(st.floats(0.001, 1), min_size=1, max_size=9))
def test_largest_remainder_sums_and_stays_within_one(count: int, weights: list[float]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = split.largest_remainder(count, shares)
    assert sum(counts) == count
    assert all(abs(whole - count * share) < 1 + 1e-9 for whole, share in zip(counts, shares, strict=True))


def test_largest_remainder_solved_by_hand() -> None:
    assert split.largest_remainder(10, [0.55, 0.25, 0.2]) == [6, 2, 2]


def test_the_same_seed_deals_the_same_rows_and_another_does_not() -> None:
    def deal(seed: int) -> list[list[int]]:
        return split.by_shares(LABELS, split.dirichlet_shares(LABELS, 4, 0.5, seed), 4, seed)

    assert deal(7) == deal(7)
    assert deal(7) != deal(8)


def test_a_small_alpha_is_more_unequal_than_a_large_one() -> None:
    def largest_share(alpha: float) -> float:
        shares = split.dirichlet_shares(LABELS, 4, alpha, 0)
        return max(max(parts) for parts in shares.values())

    assert largest_share(0.05) > 0.9
    assert largest_share(1000.0) < 0.3


def test_an_alpha_so_small_that_every_draw_is_zero_gives_a_label_to_one_device() -> None:
    shares = split.dirichlet_shares(["a"], 5, 1e-320, 0)
    assert sorted(shares["a"]) == [0, 0, 0, 0, 1]


def test_a_device_without_a_row_is_given_one_of_the_richest_ones_most_frequent_label() -> None:
    labels = ["a", "a", "a", "b"]
    dealt = split.by_shares(labels, {"a": [1, 0], "b": [1, 0]}, 2, 0)
    assert Counter(labels[row] for row in dealt[1]) == {"a": 1}


def test_validation_rows_follow_the_shares_of_the_train_rows() -> None:
    shares = split.dirichlet_shares(LABELS, 3, 0.3, 3)
    train, validation = split.by_shares(LABELS * 10, shares, 3, 3), split.by_shares(LABELS, shares, 3, 4)
    for device in range(3):
        assert len(train[device]) == pytest.approx(10 * len(validation[device]), abs=15)


def test_a_label_that_only_the_validation_rows_have_is_dealt_evenly() -> None:
    assert [len(rows) for rows in split.by_shares(["new"] * 6, {}, 3, 0)] == [2, 2, 2]


@pytest.mark.parametrize(("count", "devices"), [(2, 3), (0, 1), (5, 0)])
def test_fewer_rows_than_devices_are_refused(count: int, devices: int) -> None:
    with pytest.raises(ValueError, match=str(devices)):
        split.iid(count, devices, 0)

"""Means of pairs of unlike rank, scale and structure equal their dense counterparts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator.lora.factors import DOUBLE, Factors, Part
from fleetune.coordinator.lora.means import FactorMean, ProductMean, ProductSum
from fleetune.errors import NotFiniteError

ROWS, COLUMNS = 48, 32
# The annotations say float64, as a fold has it.
SINGLE = cast("np.dtype[np.float64]", np.dtype(np.float32))
Dense = npt.NDArray[np.float64]


def part(rng: np.random.Generator, device: int, rank: int, shape: tuple[int, int] = (ROWS, COLUMNS), alpha: float = 16.0) -> Part:
    rows, columns = shape
    factors = Factors(rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns)), alpha / rank)
    return Part(f"d{device:02}", float(rng.integers(1, 500)), factors)


def parts_of(seed: int, ranks: Sequence[int], shape: tuple[int, int] = (ROWS, COLUMNS)) -> list[Part]:
    rng = np.random.default_rng(seed)
    return [part(rng, index, rank, shape) for index, rank in enumerate(ranks)]


def dense_mean(parts: Sequence[Part]) -> Dense:
    total = sum(part.weight for part in parts)
    mean: Dense = np.sum([part.weight / total * part.factors.scale * (part.factors.left @ part.factors.right) for part in parts], axis=0)
    return mean


def mean_of(parts: Sequence[Part], shape: tuple[int, int] = (ROWS, COLUMNS), dtype: np.dtype[np.float64] = DOUBLE) -> ProductSum:
    mean = ProductMean(*shape, dtype)
    for item in parts:
        mean.add(item)
    return mean.result()


def in_single(factors: Factors) -> Factors:
    return Factors(factors.left.astype(SINGLE), factors.right.astype(SINGLE), factors.scale)


def through_half(factors: Factors) -> Factors:
    left, right = (matrix.astype(np.float16).astype(np.float64) for matrix in (factors.left, factors.right))
    return Factors(left, right, factors.scale)


def apart(one: Dense, other: Dense) -> float:
    return float(np.linalg.norm(one - other)) / float(np.linalg.norm(other))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 64), min_size=1, max_size=9), st.tuples(st.integers(3, 90), st.integers(3, 90)))
def test_the_mean_of_products_is_the_dense_weighted_mean(seed: int, ranks: list[int], shape: tuple[int, int]) -> None:
    parts = parts_of(seed, ranks, shape)
    assert apart(mean_of(parts, shape).dense(), dense_mean(parts)) <= 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 64), min_size=1, max_size=6))
def test_in_single_precision_it_is_that_to_a_millionth(seed: int, ranks: list[int]) -> None:
    parts = parts_of(seed, ranks, (384, 96))
    single = [replace(p, factors=in_single(p.factors)) for p in parts]
    assert apart(mean_of(single, (384, 96), SINGLE).dense(), dense_mean(parts)) <= 1e-6


def test_after_a_half_precision_wire_it_is_that_to_two_thousandths() -> None:
    parts = parts_of(3, [4, 64, 16])
    half = [replace(p, factors=through_half(p.factors)) for p in parts]
    assert apart(mean_of(half).dense(), dense_mean(parts)) <= 2e-3


@pytest.mark.parametrize("ranks", [[4, 3], [8, 16, 7], [8, 16, 8], [40, 8], [64, 64, 64]])
def test_a_full_rank_pair_is_the_mean_itself(ranks: list[int]) -> None:
    parts = parts_of(5, ranks)
    found = mean_of(parts).truncated(COLUMNS, 2.0)
    assert apart(found.factors.dense(), dense_mean(parts)) <= 1e-12
    assert found.error <= 1e-10 * found.norm
    assert found.norm == pytest.approx(np.linalg.norm(dense_mean(parts)))


@pytest.mark.parametrize("ranks", [[4, 3, 9], [8, 16, 8], [64, 1]])
def test_truncation_is_that_of_the_dense_svd_and_its_error_is_eckart_young_s(ranks: list[int]) -> None:
    parts = parts_of(7, ranks)
    left, values, right = np.linalg.svd(dense_mean(parts))
    found = mean_of(parts).truncated(5, 0.25)
    assert apart(found.factors.dense(), (left[:, :5] * values[:5]) @ right[:5]) <= 1e-12
    assert found.error == pytest.approx(np.sqrt(np.sum(values[5:] ** 2)))
    assert np.linalg.norm(found.factors.dense() - dense_mean(parts)) == pytest.approx(found.error)


def test_the_first_directions_of_a_truncated_pair_are_the_best_of_that_rank() -> None:
    parts = parts_of(9, [8, 16, 4])
    left, values, right = np.linalg.svd(dense_mean(parts))
    pair = mean_of(parts).truncated(16, 0.5).factors
    for rank in range(1, 16):
        assert apart(pair.leading(rank, 3.0).dense(), (left[:, :rank] * values[:rank]) @ right[:rank]) <= 1e-10


def test_signs_do_not_depend_on_those_of_the_parts() -> None:
    parts = parts_of(11, [3, 5])
    flipped = [replace(p, factors=Factors(-p.factors.left, -p.factors.right, p.factors.scale)) for p in parts]
    one, other = mean_of(parts).truncated(4, 1.0).factors, mean_of(flipped).truncated(4, 1.0).factors
    assert np.allclose(one.left, other.left) and np.allclose(one.right, other.right)


def test_directions_that_carry_nothing_begin_anew_from_the_spare_rows() -> None:
    spare = np.random.default_rng(1).standard_normal((8, COLUMNS))
    pair = mean_of(parts_of(13, [2, 3])).truncated(8, 2.0, spare).factors
    assert not pair.left[:, 5:].any()
    assert np.array_equal(pair.right[5:], spare[5:])
    assert pair.left[:, :5].any(axis=0).all()


def test_nothing_at_all_truncates_to_spare_rows() -> None:
    zero = Part("a", 1.0, Factors(np.zeros((ROWS, 4)), np.ones((4, COLUMNS)), 2.0))
    pair = mean_of([zero]).truncated(4, 2.0, np.ones((4, COLUMNS)))
    assert not pair.factors.left.any() and pair.factors.right.all() and pair.error == 0.0


def test_scales_travel_with_their_parts() -> None:
    small, large = parts_of(15, [4, 64])  # alpha 16 both: scales 4 and 0.25
    small, large = replace(small, weight=1.0), replace(large, weight=1.0)
    probe = np.random.default_rng(2).standard_normal(COLUMNS)
    outputs = [p.factors.scale * (p.factors.left @ (p.factors.right @ probe)) for p in (small, large)]
    assert np.allclose(mean_of([small, large]).truncated(COLUMNS, 0.5).factors.dense() @ probe, np.mean(outputs, axis=0))
    forgotten = [replace(p, factors=replace(p.factors, scale=1.0)) for p in (small, large)]
    assert not np.allclose(mean_of(forgotten).dense() @ probe, np.mean(outputs, axis=0), rtol=0.1)


def test_a_device_that_is_left_out_leaves_a_federation_without_it() -> None:
    four = parts_of(17, [4, 8, 2, 6])
    three = four[:2] + four[3:]
    assert apart(mean_of(three).dense(), dense_mean(three)) <= 1e-12
    assert sum(p.weight for p in three) < sum(p.weight for p in four)


def test_memory_is_that_of_the_pair_however_many_devices_there_are() -> None:
    total = ProductSum(ROWS, COLUMNS)
    for item in parts_of(19, [8] * 100):
        total.add(item.factors.left, item.factors.right)
        left, right = total.stack()
        assert left.shape[1] == right.shape[0] < COLUMNS
    assert total.is_dense


def test_what_is_not_finite_is_refused() -> None:
    total = ProductSum(4, 4)
    total.add(np.full((4, 1), np.inf), np.ones((1, 4)))
    with np.errstate(invalid="ignore"), pytest.raises(NotFiniteError, match=r"NaN or Inf|decomposed"):
        total.truncated(2, 1.0)


def test_the_distance_to_a_pair_is_the_norm_of_the_difference() -> None:
    parts, other = parts_of(21, [3, 4]), parts_of(22, [5])[0].factors
    for ranks in ([3, 4], [30, 20]):
        parts = parts_of(21, ranks)
        assert mean_of(parts).distance(other) == pytest.approx(np.linalg.norm(dense_mean(parts) - other.dense()))


Kept = tuple[list[int] | None, list[int] | None]


def pruned(base: Part, kept: Kept) -> Part:
    rows, columns = (None if index is None else np.array(sorted(index), np.int64) for index in kept)
    left, right = base.factors.left, base.factors.right
    factors = Factors(left if rows is None else left[rows], right if columns is None else right[:, columns], base.factors.scale)
    return replace(base, factors=factors, rows=rows, columns=columns)


def looped(parts: Sequence[Part], old: Factors, shape: tuple[int, int]) -> Dense:
    """Element by element: the mean over the devices that have it, else what it was."""
    found, before = np.empty(shape), old.dense()
    full = [
        (range(shape[0]) if p.rows is None else p.rows.tolist(), range(shape[1]) if p.columns is None else p.columns.tolist())
        for p in parts
    ]
    for row, column in itertools.product(range(shape[0]), range(shape[1])):
        held = [(p, r.index(row), c.index(column)) for p, (r, c) in zip(parts, full, strict=True) if row in r and column in c]
        total = sum(p.weight for p, _, _ in held)
        values = [p.weight * p.factors.scale * float(p.factors.left[r] @ p.factors.right[:, c]) for p, r, c in held]
        found[row, column] = sum(values) / total if held else before[row, column]
    return found


SIDES = st.sampled_from(["all", "rows", "columns", "both"])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**32), st.lists(st.tuples(SIDES, st.integers(1, 4)), min_size=1, max_size=4))
def test_pruned_devices_count_for_what_they_kept(data: st.DataObject, seed: int, devices: list[tuple[str, int]]) -> None:
    shape = (9, 7)
    parts: list[Part] = []
    for item, (side, _) in zip(parts_of(seed, [rank for _, rank in devices], shape), devices, strict=True):
        rows = data.draw(st.lists(st.integers(0, 8), unique=True)) if side in ("rows", "both") else None
        columns = data.draw(st.lists(st.integers(0, 6), unique=True)) if side in ("columns", "both") else None
        parts.append(pruned(item, (rows, columns)))
    old = parts_of(seed + 1, [3], shape)[0].factors
    mean = ProductMean(*shape)
    for item in parts:
        mean.add(item)
    assert np.allclose(mean.result(old).dense(), looped(parts, old, shape), atol=1e-9)


def test_devices_pruned_on_one_side_stay_a_stack() -> None:
    mean = ProductMean(ROWS, COLUMNS)
    for item, rows in zip(parts_of(23, [4, 4]), ([0, 1, 2], [2, 3]), strict=True):
        mean.add(pruned(item, (rows, None)))
    assert not mean.result(parts_of(24, [4])[0].factors).is_dense


def test_slicing_the_mean_and_scattering_it_again_changes_nothing() -> None:
    old = parts_of(25, [4])[0].factors
    mean = ProductMean(ROWS, COLUMNS)
    for index, rows in enumerate(([0, 1, 2, 5], [2, 3, 5])):
        mean.add(pruned(Part(f"d{index}", 2.0 + index, old), (rows, None)))
    assert apart(mean.result(old).dense(), old.dense()) <= 1e-12


def test_zero_padding_shrinks_by_the_coverage_and_the_product_by_its_square() -> None:
    whole = parts_of(27, [64])[0].factors
    ranks, weights = [64, 32, 16, 8, 4], [0.1, 0.2, 0.3, 0.25, 0.15]
    means = {coverage: FactorMean(ROWS, COLUMNS, 64, whole.scale, coverage) for coverage in (False, True)}
    for mean, (rank, weight) in itertools.product(means.values(), zip(ranks, weights, strict=True)):
        mean.add(whole.leading(rank), weight)
    padded, covered = means[False].result(), means[True].result()
    assert np.allclose(padded.right[63], 0.1 * whole.right[63]) and np.allclose(padded.left[:, 63], 0.1 * whole.left[:, 63])
    shrunk = np.outer(padded.left[:, 63], padded.right[63])
    assert np.allclose(shrunk, 0.01 * np.outer(whole.left[:, 63], whole.right[63]))
    assert apart(covered.dense(), whole.dense()) <= 1e-12


def test_a_direction_that_nobody_has_stays_what_it_was() -> None:
    old, item = parts_of(29, [8, 3])
    mean = FactorMean(ROWS, COLUMNS, 8, old.factors.scale, coverage=True)
    mean.add(item.factors, 5.0)
    found = mean.result(old.factors)
    assert np.array_equal(found.right[3:], old.factors.right[3:]) and np.array_equal(found.left[:, 3:], old.factors.left[:, 3:])
    assert np.allclose(found.leading(3).dense(), item.factors.dense())

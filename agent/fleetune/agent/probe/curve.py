"""From a few measured depths to all of them: piecewise linear in between, then made monotone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fleetune.errors import DataError

POINTS = 4
"""Depths that are measured of a model that has more."""


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The non-decreasing sequence with the least weighted squared distance from `values` (pool adjacent violators).

    `weights` are above 0, one per value; without them all count alike. Raises DataError where their number differs.
    """
    if weights is not None and len(weights) != len(values):
        raise DataError(f"{len(weights)} weights stand beside {len(values)} values.", "Give one weight per value.")
    pools: list[tuple[float, float, int]] = []
    for index, value in enumerate(values):
        mean, weight, count = float(value), 1.0 if weights is None else float(weights[index]), 1
        while pools and pools[-1][0] > mean:
            earlier_mean, earlier_weight, earlier_count = pools.pop()
            mean = (earlier_mean * earlier_weight + mean * weight) / (earlier_weight + weight)
            weight += earlier_weight
            count += earlier_count
        pools.append((mean, weight, count))
    return [mean for mean, _, count in pools for _ in range(count)]


def piecewise(points: Mapping[int, float], depths: int) -> list[float]:
    """Values at depths 1 to `depths`: linear between measured ones, and the nearest slope beyond them, never below 0.

    One point alone is a constant. Raises DataError without a point or with one outside of the depths.
    """
    known = sorted(points)
    if not known or known[0] < 1 or known[-1] > depths:
        raise DataError(f"Depths {known} were measured of a model with {depths}.", "Measure at least one depth from 1 up to that.")
    if len(known) == 1:
        return [points[known[0]]] * depths
    values: list[float] = []
    for depth in range(1, depths + 1):
        right = next((index for index in range(1, len(known)) if known[index] >= depth), len(known) - 1)
        low, high = known[right - 1], known[right]
        slope = (points[high] - points[low]) / (high - low)
        values.append(max(0.0, points[low] + slope * (depth - low)))
    return values


def filled(points: Mapping[int, float], depths: int) -> list[float]:
    """`piecewise`, then monotone: what a planner may rely on."""
    return isotonic(piecewise(points, depths))


def affine(points: Mapping[int, float]) -> tuple[float, float, float]:
    """(value at depth 0, slope per depth, share of the variance explained) of the least-squares line; slope 0 for one point."""
    count = len(points)
    if count == 0:
        raise DataError("No depth was measured.", "Measure at least one.")
    mean_x = sum(points) / count
    mean_y = sum(points.values()) / count
    spread_x = sum((x - mean_x) ** 2 for x in points)
    spread_y = sum((y - mean_y) ** 2 for y in points.values())
    if spread_x == 0:
        return mean_y, 0.0, 1.0
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points.items()) / spread_x
    intercept = mean_y - slope * mean_x
    rest = sum((y - intercept - slope * x) ** 2 for x, y in points.items())
    return intercept, slope, 1.0 if spread_y == 0 else 1.0 - rest / spread_y


def chosen_depths(depths: int, wanted: int = POINTS) -> list[int]:
    """Depths to measure: both ends, the one above the head, and evenly between."""
    if depths <= wanted:
        return list(range(1, depths + 1))
    # The head differs from the layers, so the layers' line begins at depth 2.
    return sorted({1, *(round(2 + (depths - 2) * step / (wanted - 2)) for step in range(wanted - 1))})

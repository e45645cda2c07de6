"""The ways to make one pair of many, by name, and what each asks of devices.

    exact      the mean of the products, cut to r_max by a factored SVD (stacks as in FLoRA, redistribution as in FlexLoRA)
    flexlora   FlexLoRA: the same of what was sent alone, committed with A orthonormal and the singular values in B
    fedit      the means of A and of B, each direction over the devices that have it
    zero-pad   HetLoRA: the same with zeros for the others, devices weighted by the norm of their product instead of their rows
    ffa        FFA-LoRA: A stays as it was made, B alone is trained; exact, as all share A
    rolora     RoLoRA: B in odd rounds, A in even ones; exact, as the other matrix is shared

A device of rank r_i is given the first r_i directions of the pair and knows nothing of the others. In the exact mean it stands for its own
product *and* those others as they were: what nobody was asked about is no zero. With equal ranks this is the mean of s B A as the papers
have it. FlexLoRA and HetLoRA count them as zeros, as their papers do, so that each round shrinks them by the weight of the devices
that did not have them.

Two more ways change the frozen weights; here is their algebra alone: `flora_stack` and `fedex`. `fedsa`, which a job may name, needs no
rule: devices send A alone, whose mean is that of any tensor.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fleetune.coordinator.lora.factors import Factors, Matrix, Part, product_norm
from fleetune.coordinator.lora.means import ROW_NORM, FactorMean, ProductMean, ProductSum, Truncated

Aggregation = Literal["exact", "fedit", "zero-pad", "flexlora", "ffa", "rolora"]
Trained = Literal["both", "left", "right"]
"""Which matrices of a pair devices train: left is B."""

NORM_CLIP = 3.0
"""A device's weight by norm is at most this many times the median: or one that diverges would be the mean."""


@dataclass(frozen=True)
class Rule:
    """`products` averages products and truncates; otherwise matrices are averaged, of whole modules only.

    `keeps_tail`: a device stands for the directions that it was not given, too. `row_norm` is that of A's rows after truncation.
    """

    products: bool
    by_norm: bool = False
    coverage: bool = False
    row_norm: float = ROW_NORM
    keeps_tail: bool = False


RULES: Mapping[Aggregation, Rule] = {
    "exact": Rule(products=True, keeps_tail=True),
    "flexlora": Rule(products=True, row_norm=1.0),
    "fedit": Rule(products=False, coverage=True),
    "zero-pad": Rule(products=False, by_norm=True),
    "ffa": Rule(products=False, keeps_tail=True),
    "rolora": Rule(products=False, keeps_tail=True),
}


def trained(aggregation: Aggregation, round_number: int) -> Trained:
    """What devices train in a round. B first: with B zero, A has no gradient."""
    if aggregation == "ffa" or (aggregation == "rolora" and round_number % 2 == 1):
        return "left"
    return "right" if aggregation == "rolora" else "both"


@dataclass(frozen=True)
class LoraFold:
    """How a job's pairs are folded in one round. `rank` and `scale` are the global pair's; `narrower` allows devices a lower rank."""

    aggregation: Aggregation
    rank: int
    scale: float
    round_number: int = 1
    narrower: bool = False

    @property
    def trained(self) -> Trained:
        return trained(self.aggregation, self.round_number)


@dataclass(frozen=True)
class Merged:
    """The committed pair, and how far its product is from the exact mean; both errors are Frobenius norms, as is the mean's `norm`."""

    factors: Factors
    norm: float
    aggregation_error: float
    truncation_error: float | None
    """Of the truncation alone; None where nothing is truncated."""


class PairFold:
    """One pair's fold. Parts are added in device order; `weights` replaces their own by device id."""

    def __init__(self, aggregation: Aggregation, old: Factors, weights: Mapping[str, float] | None = None) -> None:
        """`old` is the pair that the round began with, of rank r_max and the job's scale."""
        self._rule = RULES[aggregation]
        self._aggregation: Aggregation = aggregation
        self._old = old
        self._weights = weights
        rows, columns, dtype = old.left.shape[0], old.right.shape[1], old.left.dtype
        self._exact = ProductMean(rows, columns, dtype)
        self._absent = np.zeros(old.rank, dtype)
        """By direction: the weight of the devices that were not given it."""
        self._mean = None if self._rule.products else FactorMean(rows, columns, old.rank, old.scale, self._rule.coverage, dtype)

    def add(self, part: Part) -> None:
        weight = part.weight if self._weights is None else self._weights[part.device_id]
        self._exact.add(part)
        if self._mean is not None:
            self._mean.add(part.factors, weight)
        if part.rows is None and part.columns is None:
            self._absent[part.factors.rank :] += part.weight
        elif self._rule.keeps_tail:
            own = np.zeros_like(self._absent)
            own[part.factors.rank :] = part.weight
            self._exact.carry(self._old, own, part.rows, part.columns)

    def result(self, trained: Trained = "both") -> Merged:
        """The pair, once. `trained` is what devices were asked for; the other matrix stays the old one."""
        old, rule = self._old, self._rule
        of_sent = self._exact.result(old) if rule.products and not rule.keeps_tail else None
        self._exact.carry(old, self._absent)
        exact = self._exact.result(old)
        if self._mean is None:
            found = (of_sent or exact).truncated(old.rank, old.scale, old.right, rule.row_norm)
            if of_sent is None:
                return Merged(found.factors, found.norm, found.error, found.error)
            return Merged(found.factors, exact.norm(), exact.distance(found.factors), found.error)
        if rule.keeps_tail:
            self._mean.carry(old, self._absent)
        mean = self._mean.result(old)
        left = old.left if trained == "right" else mean.left
        right = old.right if trained == "left" else mean.right
        factors = Factors(left, right, mean.scale)
        return Merged(factors, exact.norm(), exact.distance(factors), None)


def difference(one: Factors, other: Factors) -> float:
    """Frobenius norm of one product less the other."""
    return product_norm(
        np.hstack([one.left * one.scale, other.left * -other.scale]),
        np.vstack([one.right, other.right]),
    )


def norm_weights(norms: Mapping[str, float]) -> Mapping[str, float]:
    """HetLoRA's weights from the devices' norms of s B A: proportional, none above NORM_CLIP times the median, summing to 1."""
    limit = NORM_CLIP * statistics.median(norms.values())
    clipped = {device: min(norm, limit) for device, norm in norms.items()}
    total = sum(clipped[device] for device in sorted(clipped))
    if total <= 0:
        return dict.fromkeys(clipped, 1.0 / len(clipped))
    return {device: norm / total for device, norm in clipped.items()}


def _shares(parts: Sequence[Part]) -> list[float]:
    total = sum(part.weight for part in parts)
    return [part.weight / total for part in parts]


def flora_stack(parts: Sequence[Part]) -> Factors:
    """FLoRA: the stack whose product is the exact mean; p_i stands on A only, and the scale is 1. Devices merge it into their weights."""
    rights = [part.factors.right * (share * part.factors.scale) for part, share in zip(parts, _shares(parts), strict=True)]
    return Factors(np.hstack([part.factors.left for part in parts]), np.vstack(rights), 1.0)


@dataclass(frozen=True)
class Fedex:
    """FedEx-LoRA: FedIT's pair, and what is to be added to the frozen weight (d x k, the orientation of torch.nn.Linear) to be exact."""

    factors: Factors
    residual: Factors


def fedex(parts: Sequence[Part]) -> Fedex:
    """Of parts of one rank and scale. The residual is sum p_i s (B_i - mean B)(A_i - mean A), of rank (K - 1) r at the most, since the
    p_i (B_i - mean B) sum up to 0: the last device's is written in those of the others."""
    shares = _shares(parts)
    scale = parts[0].factors.scale
    if any(part.factors.rank != parts[0].factors.rank or part.factors.scale != scale for part in parts):
        raise ValueError("FedEx averages matrices: all devices need the same rank and scale")
    left = sum((part.factors.left * share for part, share in zip(parts, shares, strict=True)), np.zeros_like(parts[0].factors.left))
    right = sum((part.factors.right * share for part, share in zip(parts, shares, strict=True)), np.zeros_like(parts[0].factors.right))
    last = parts[-1].factors.right
    lefts = [np.zeros((left.shape[0], 0), left.dtype), *((p.factors.left - left) * s for p, s in zip(parts[:-1], shares, strict=False))]
    rights = [np.zeros((0, right.shape[1]), right.dtype), *(p.factors.right - last for p in parts[:-1])]
    return Fedex(Factors(left, right, scale), Factors(np.hstack(lefts), np.vstack(rights), scale))


def fedsa(parts: Sequence[Part]) -> Matrix:
    """FedSA-LoRA: the mean of A, which is all that a device sends; its B and its head never leave it."""
    shares = _shares(parts)
    return sum((part.factors.right * share for part, share in zip(parts, shares, strict=True)), np.zeros_like(parts[0].factors.right))


def truncated_residual(residual: Factors, rank: int) -> Truncated:
    """FedEx's inexact variant: the residual's best `rank` directions."""
    found = ProductSum(residual.left.shape[0], residual.right.shape[1], residual.left.dtype)
    found.add(residual.left * residual.scale, residual.right)
    return found.truncated(rank, 1.0)

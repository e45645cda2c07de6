"""The ways to make one pair of many, by name, and what each asks of devices.

    exact      the mean of the products, cut to r_max by a factored SVD (stacks as in FLoRA, redistribution as in FlexLoRA)
    flexlora   FlexLoRA: the same of what was sent alone, committed with A orthonormal and the singular values in B
    fedit      the means of A and of B, each direction over the devices that have it
    zero-pad   HetLoRA: the same with zeros for the others, devices weighted by the norm of their product instead of their rows
    ffa        FFA-LoRA: A stays as it was made, B alone is trained; exact, as all share A
    rolora     RoLoRA: B in odd rounds, A in even ones; exact, as the other matrix is shared
    flora      FLoRA: the exact mean becomes part of the weights, and a fresh pair begins beside it
    fedex      FedEx-LoRA: FedIT's pair, and what it is wrong by becomes part of the weights

A device of rank r_i is given the first r_i directions of the pair and knows nothing of the others. In the exact mean it stands for its own
product *and* those others as they were: what nobody was asked about is no zero. With equal ranks this is the mean of s B A as the papers
have it. FlexLoRA and HetLoRA count them as zeros, as their papers do, so that each round shrinks them by the weight of the devices
that did not have them.

`flora` and `fedex` change the frozen weights in their papers. Here the weights stay as they are: the state's pair has `residual_rank` more
directions than devices train, the *rest*, which hold what the papers add to the weights, cut to that rank; devices add them to their
weights for the time of a round. So a device that has missed rounds has the same base as all, and a state is an adapter as any other.

`fedsa`, which a job may name, needs no rule: devices send A alone, whose mean is that of any tensor.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fleetune.coordinator.lora.factors import Factors, Matrix, Part, product_norm
from fleetune.coordinator.lora.means import ROW_NORM, FactorMean, ProductMean, ProductSum

Aggregation = Literal["exact", "fedit", "zero-pad", "flexlora", "ffa", "rolora", "flora", "fedex"]
Trained = Literal["both", "left", "right"]
"""Which matrices of a pair devices train: left is B."""

NORM_CLIP = 3.0
"""A device's weight by norm is at most this many times the median: or one that diverges would be the mean."""


@dataclass(frozen=True)
class Rule:
    """`products` averages products and truncates; otherwise matrices are averaged, of whole modules only.

    `keeps_tail`: a device stands for the directions that it was not given, too. `row_norm` is that of A's rows after truncation.
    `has_rest`: the state has directions that no device trains; with `products` the trained ones begin anew.
    """

    products: bool
    by_norm: bool = False
    coverage: bool = False
    row_norm: float = ROW_NORM
    keeps_tail: bool = False
    has_rest: bool = False


RULES: Mapping[Aggregation, Rule] = {
    "exact": Rule(products=True, keeps_tail=True),
    "flexlora": Rule(products=True, row_norm=1.0),
    "fedit": Rule(products=False, coverage=True),
    "zero-pad": Rule(products=False, by_norm=True),
    "ffa": Rule(products=False, keeps_tail=True),
    "rolora": Rule(products=False, keeps_tail=True),
    "flora": Rule(products=True, keeps_tail=True, has_rest=True),
    "fedex": Rule(products=False, keeps_tail=True, has_rest=True),
}


def trained(aggregation: Aggregation, round_number: int) -> Trained:
    """What devices train in a round. B first: with B zero, A has no gradient."""
    if aggregation == "ffa" or (aggregation == "rolora" and round_number % 2 == 1):
        return "left"
    return "right" if aggregation == "rolora" else "both"


@dataclass(frozen=True)
class LoraFold:
    """How a job's pairs are folded in one round. `rank` and `scale` are the global pair's; `narrower` allows devices a lower rank. The last
    `residual_rank` of its directions are the rest; `seed` is that of fresh ones."""

    aggregation: Aggregation
    rank: int
    scale: float
    round_number: int = 1
    narrower: bool = False
    residual_rank: int = 0
    seed: int = 0

    @property
    def trained_rank(self) -> int:
        """The highest that a device trains."""
        return self.rank - self.residual_rank

    def fresh(self, name: str, columns: int) -> Matrix | None:
        """The trained rows of A, named `name`, where they begin anew in this round: uniform within 1/sqrt(k), as PEFT makes them.

        Of Philox's raw bits, which are the same everywhere: a fold that is done again gives the same bytes.
        """
        rule = RULES[self.aggregation]
        if not (rule.has_rest and rule.products):
            return None
        key = hashlib.sha256(f"{self.seed}/{self.round_number}/{name}".encode()).digest()[:16]
        raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(self.trained_rank * columns)
        uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.reshape((2.0 * uniform - 1.0) / math.sqrt(columns), (self.trained_rank, columns))

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

    def __init__(
        self,
        aggregation: Aggregation,
        old: Factors,
        weights: Mapping[str, float] | None = None,
        residual_rank: int = 0,
        fresh: Matrix | None = None,
    ) -> None:
        """`old` is the pair that the round began with, of rank r_max and the job's scale; its last `residual_rank` directions are the rest,
        for rules that have one. `fresh` are the rows of A that the others go on with, for rules by which they begin anew."""
        self._rule = RULES[aggregation]
        self._aggregation: Aggregation = aggregation
        self._old = old
        self._weights = weights
        self._residual_rank = residual_rank
        self._fresh = fresh
        rows, columns, dtype = old.left.shape[0], old.right.shape[1], old.left.dtype
        self._exact = ProductMean(rows, columns, dtype)
        self._absent = np.zeros(old.rank, dtype)
        """By direction: the weight of the devices that were not given it."""
        self._mean = (
            None if self._rule.products else FactorMean(rows, columns, old.rank - residual_rank, old.scale, self._rule.coverage, dtype)
        )

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
        if rule.has_rest:
            return self._beside_rest(exact)
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

    def _beside_rest(self, exact: ProductSum) -> Merged:
        """The pair that devices go on with, and the rest of the exact mean, as far as its rank goes."""
        old, norm = self._old, exact.norm()
        if self._mean is not None:
            pair = self._mean.result()
            exact.add(pair.left * -pair.scale, pair.right)
        else:
            assert self._fresh is not None, "a rule by which pairs begin anew is given new ones"
            pair = Factors(np.zeros((old.left.shape[0], len(self._fresh)), old.left.dtype), self._fresh, old.scale)
        rest = exact.truncated(self._residual_rank, old.scale, old.right[pair.rank :])
        factors = Factors(np.hstack([pair.left, rest.factors.left]), np.vstack([pair.right, rest.factors.right]), old.scale)
        return Merged(factors, norm, rest.error, rest.error)


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

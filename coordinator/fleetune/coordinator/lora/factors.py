"""A LoRA pair as the two matrices that it is, its part of a round, and the symbols of this package.

symbol           name                   shape, meaning
W                (the frozen weight)    d x k: d rows (outputs), k columns (inputs)
A, B             right, left            r x k, d x r
r                rank
s                scale                  what the product is multiplied by: alpha / r of the one who trained it, never inferred
dW = s B A       Factors.dense()        d x k, formed in tests and where the ranks together reach min(d, k)
p_i              Part.weight            rows that device i saw; divided by the sum over the devices that sent the pair
R_i, C_i         Part.rows, columns     kept rows and columns of a pruned device, indices into the full d and k
c                (coverage)             c_row = sum of p_i over the devices that kept the row; likewise columns
r_max            rank of the committed  the job's `lora.rank`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
"""float64 in a fold; the arithmetic keeps float32 where it is given that."""

Indices = npt.NDArray[np.integer[Any]]  # of any width
DOUBLE = np.dtype(np.float64)


@dataclass(frozen=True)
class Factors:
    """`left` is d x r, `right` is r x k, both of one float type; the adapter adds `scale` times their product to the weight."""

    left: Matrix
    right: Matrix
    scale: float

    @property
    def rank(self) -> int:
        return len(self.right)

    def dense(self) -> Matrix:
        """The whole d x k product."""
        return np.multiply(self.left @ self.right, self.scale)

    def norm(self) -> float:
        """Frobenius norm of the product, which is not formed: tr((BᵀB)(AAᵀ)) is its square."""
        return abs(self.scale) * product_norm(self.left, self.right)

    def leading(self, rank: int, scale: float | None = None) -> Factors:
        """The first `rank` directions, with `scale` moved out of the left matrix: the best of that rank where the pair is ordered."""
        kept = self.scale if scale is None else scale
        left = self.left[:, :rank]
        return Factors(left if kept == self.scale else left * (self.scale / kept), self.right[:rank], kept)

    def padded(self, rank: int) -> Factors:
        """With zeros up to `rank`."""
        missing = rank - self.rank
        return Factors(np.pad(self.left, ((0, 0), (0, missing))), np.pad(self.right, ((0, missing), (0, 0))), self.scale)


@dataclass(frozen=True)
class Part:
    """What one device sent of one pair. A pruned device's matrices have only its kept rows (of `left`) and columns (of `right`)."""

    device_id: str
    weight: float
    factors: Factors
    rows: Indices | None = None
    columns: Indices | None = None


def product_norm(left: Matrix, right: Matrix) -> float:
    """Frobenius norm of left @ right by way of two r x r matrices; exact to about 1e-8 of the larger terms that cancel."""
    square = float(np.sum((np.transpose(left) @ left) * (right @ np.transpose(right))))
    return math.sqrt(max(square, 0.0))

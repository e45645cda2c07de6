"""Weighted means of many pairs, taken in one device after the other: of their products, exactly, and of their matrices.

A sum of products is kept as a stack, [w1 s1 B1, w2 s2 B2, ...] and [A1; A2; ...], whose product it is. Where the ranks together reach
min(d, k) a stack is no shorter than the matrix itself: then it is multiplied out, once, and goes on as one d x k matrix to which further
stacks are added. So memory is bounded by the pair's own size, whatever the number of devices, and nothing is rounded away on the way.

Pruned devices keep some rows or columns only. A row is averaged over those that kept it, c_row; in a transformer a module is pruned on one
side, so this is a diagonal factor and the stack stays one. Only where devices are pruned on both sides is a d x k matrix of coverages
needed. What nobody kept stays what it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fleetune.coordinator.lora.factors import DOUBLE, Factors, Indices, Matrix, Part, product_norm
from fleetune.errors import NotFiniteError

ROW_NORM = 1 / math.sqrt(3)
"""Length of a row of A as PEFT makes it: uniform within 1/sqrt(k). Committed pairs keep it, so that every round's steps act on B alike."""

NEGLIGIBLE = 16.0
"""Singular values below this many units of rounding of the largest carry nothing."""


@dataclass(frozen=True)
class Truncated:
    """A pair of a bounded rank, best in the Frobenius norm, its directions ordered by what they carry; `error` is the norm of the rest."""

    factors: Factors
    error: float
    norm: float
    """Of the whole."""


class ProductSum:
    """A sum of products left @ right, of shape (rows, columns)."""

    def __init__(self, rows: int, columns: int, dtype: np.dtype[np.float64] = DOUBLE) -> None:
        self.shape = (rows, columns)
        self._lefts: list[Matrix] = []
        self._rights: list[Matrix] = []
        self._rank = 0
        self._dense: Matrix | None = None
        self._dtype = dtype

    @classmethod
    def of(cls, dense: Matrix) -> ProductSum:
        """A matrix as it is."""
        found = cls(dense.shape[0], dense.shape[1], dense.dtype)
        found._dense = dense
        return found

    def add(self, left: Matrix, right: Matrix) -> None:
        """Takes references; neither may change afterwards."""
        if left.shape[1] != right.shape[0] or (left.shape[0], right.shape[1]) != self.shape:
            raise ValueError(f"a product of {left.shape} and {right.shape} is not {self.shape}")
        self._lefts.append(left)
        self._rights.append(right)
        self._rank += right.shape[0]
        if self._rank >= min(self.shape):
            self._multiply_out()

    @property
    def is_dense(self) -> bool:
        return self._dense is not None

    def stack(self) -> tuple[Matrix, Matrix]:
        """What has not been multiplied out."""
        if not self._lefts:
            return np.zeros((self.shape[0], 0), self._dtype), np.zeros((0, self.shape[1]), self._dtype)
        if len(self._lefts) > 1:
            self._lefts, self._rights = [np.hstack(self._lefts)], [np.vstack(self._rights)]
        return self._lefts[0], self._rights[0]

    def scaled(self, rows: Matrix | None = None, columns: Matrix | None = None) -> ProductSum:
        """The sum with its rows or columns multiplied by these."""
        found = ProductSum(*self.shape, self._dtype)
        left, right = self.stack()
        found._lefts = [left if rows is None else left * rows[:, None]]
        found._rights = [right if columns is None else right * columns[None, :]]
        found._rank = self._rank
        if self._dense is not None:
            dense = self._dense if rows is None else self._dense * rows[:, None]
            found._dense = dense if columns is None else dense * columns[None, :]
        return found

    def dense(self) -> Matrix:
        left, right = self.stack()
        product = left @ right
        return product if self._dense is None else self._dense + product

    def norm(self) -> float:
        if self._dense is None:
            return product_norm(*self.stack())
        return float(np.linalg.norm(self.dense()))

    def distance(self, factors: Factors) -> float:
        """Frobenius norm of this sum less the pair's product."""
        if self._dense is None:
            left, right = self.stack()
            return product_norm(np.hstack([left, factors.left * -factors.scale]), np.vstack([right, factors.right]))
        return float(np.linalg.norm(self.dense() - factors.dense()))

    def truncated(self, rank: int, scale: float, spare: Matrix | None = None, row_norm: float = ROW_NORM) -> Truncated:
        """The best pair of at most `rank`, by QR of the stacks and the SVD of what is left between them.

        `spare` (rank x k) are rows for the directions that carry nothing: they begin anew beside zeros in B, or neither matrix of them
        would ever get a gradient. Raises NotFiniteError where the sum is not finite.
        """
        values, right = self._decomposed(rank)
        if not np.isfinite(values).all():
            raise NotFiniteError("The mean of the updates holds NaN or Inf.", "Check every update before it is folded.")
        kept = min(rank, int(np.count_nonzero(values > values[:1] * np.finfo(self._dtype).eps * NEGLIGIBLE)))
        # The sign of a singular pair is the library's whim: its largest element is made positive.
        largest = np.argmax(np.abs(right[:kept]), axis=1)
        right = right[:kept] * np.where(right[np.arange(kept), largest] < 0, -1.0, 1.0)[:, None].astype(self._dtype)
        out_left = np.zeros((self.shape[0], rank), self._dtype)
        out_right = np.zeros((rank, self.shape[1]), self._dtype)
        # U S is the sum times V: that is cheaper than the left vectors themselves, and no less exact.
        out_left[:, :kept] = self._times(np.transpose(right)) / (scale * row_norm)
        out_right[:kept] = right * row_norm
        if spare is not None:
            out_right[kept:] = spare[kept:rank]
        return Truncated(Factors(out_left, out_right, scale), float(np.linalg.norm(values[kept:])), float(np.linalg.norm(values)))

    def _decomposed(self, rank: int) -> tuple[Matrix, Matrix]:
        """All singular values, and the first `rank` right vectors as rows."""
        try:
            if self._dense is not None:
                _, values, right_vectors = np.linalg.svd(self.dense(), full_matrices=False)
                return values, right_vectors[:rank]
            left, right = self.stack()
            left_rest = np.linalg.qr(left, mode="r")
            right_basis, right_rest = np.linalg.qr(np.transpose(right))
            _, values, inner = np.linalg.svd(left_rest @ np.transpose(right_rest), full_matrices=False)
            return values, inner[:rank] @ np.transpose(right_basis)
        except np.linalg.LinAlgError as error:
            raise NotFiniteError("The mean of the updates cannot be decomposed.", "Check every update before it is folded.") from error

    def _times(self, columns: Matrix) -> Matrix:
        left, right = self.stack()
        product = left @ (right @ columns)
        return product if self._dense is None else self._dense @ columns + product

    def _multiply_out(self) -> None:
        left, right = self.stack()
        product = left @ right
        self._dense = product if self._dense is None else np.add(self._dense, product, out=self._dense)
        self._lefts, self._rights, self._rank = [], [], 0


class ProductMean:
    """The exact mean of products, each element over the devices that kept its row and column. Owned by one fold; parts come in order."""

    def __init__(self, rows: int, columns: int, dtype: np.dtype[np.float64] = DOUBLE) -> None:
        self._sum = ProductSum(rows, columns, dtype)
        self._dtype = dtype
        self._row_weight = np.zeros(rows, self._dtype)
        """Of parts with all columns."""
        self._column_weight = np.zeros(columns, self._dtype)
        """Of parts with all rows but not all columns."""
        self._both: Matrix | None = None
        """Of parts that lack some of either, by element."""
        self._uneven_rows = self._uneven_columns = False

    def add(self, part: Part) -> None:
        """In device order: the same parts give the same bytes."""
        factors, weight = part.factors, part.weight
        rows, columns = self._sum.shape
        left, right = factors.left * (weight * factors.scale), factors.right
        if part.rows is not None:
            left = _scattered(left, part.rows, rows, 0)
        if part.columns is not None:
            right = _scattered(right, part.columns, columns, 1)
        self._sum.add(left, right)
        if part.rows is not None and part.columns is not None:
            if self._both is None:
                self._both = np.zeros(self._sum.shape, self._dtype)
            self._both[np.ix_(part.rows, part.columns)] += weight
        elif part.columns is not None:
            self._column_weight[part.columns] += weight
            self._uneven_columns = True
        else:
            self._row_weight[slice(None) if part.rows is None else part.rows] += weight
            self._uneven_rows = self._uneven_rows or part.rows is not None

    def carry(self, factors: Factors, weights: Matrix, rows: Indices | None = None, columns: Indices | None = None) -> None:
        """Adds each direction of a whole pair by its weight, at the kept rows and columns of parts that count already."""
        if not weights.any():
            return
        left, right = factors.left * (weights * factors.scale), factors.right
        if rows is not None:
            left = _scattered(left[rows], rows, self._sum.shape[0], 0)
        if columns is not None:
            right = _scattered(right[:, columns], columns, self._sum.shape[1], 1)
        self._sum.add(left, right)

    def result(self, old: Factors | None = None) -> ProductSum:
        """The mean; elements that nobody kept are those of `old`, or 0."""
        if self._both is not None or (self._uneven_rows and self._uneven_columns):
            return self._by_element(old)
        if self._uneven_columns:
            # The parts that have all columns have all rows, too.
            coverage = self._column_weight + self._row_weight[0]
            mean = self._sum.scaled(columns=_inverse(coverage))
            if old is not None and (coverage == 0).any():
                mean.add(old.left * old.scale, old.right * (coverage == 0)[None, :])
            return mean
        mean = self._sum.scaled(rows=_inverse(self._row_weight))
        if old is not None and (self._row_weight == 0).any():
            mean.add(old.left * old.scale * (self._row_weight == 0)[:, None], old.right)
        return mean

    def _by_element(self, old: Factors | None) -> ProductSum:
        coverage = self._row_weight[:, None] + self._column_weight[None, :]
        if self._both is not None:
            coverage += self._both
        dense = self._sum.dense() * _inverse(coverage)
        if old is not None:
            dense = np.where(coverage == 0, old.dense(), dense)
        return ProductSum.of(dense)


class FactorMean:
    """The mean of the matrices each by itself, all brought to one scale and one rank: cheap, and not the mean of the products.

    With `coverage` a direction is averaged over the devices that have it, as nobody else knows anything about it; without, the others
    count as zeros, which shrinks it by c in each matrix and by c squared in the product.
    """

    def __init__(self, rows: int, columns: int, rank: int, scale: float, coverage: bool, dtype: np.dtype[np.float64] = DOUBLE) -> None:
        self._left = np.zeros((rows, rank), dtype)
        self._right = np.zeros((rank, columns), dtype)
        self._scale = scale
        self._coverage = coverage
        self._weights = np.zeros(rank, dtype)
        self._total = 0.0

    def add(self, factors: Factors, weight: float) -> None:
        rank = factors.rank
        self._left[:, :rank] += factors.left * (weight * factors.scale / self._scale)
        self._right[:rank] += factors.right * weight
        self._weights[:rank] += weight
        self._total += weight

    def carry(self, factors: Factors, weights: Matrix) -> None:
        """Adds each direction of a pair by its weight, beside parts that count already."""
        self._left += factors.left * (weights * (factors.scale / self._scale))
        self._right += factors.right * weights[:, None]

    def result(self, old: Factors | None = None) -> Factors:
        """The mean; directions that nobody has are those of `old`, or 0."""
        if not self._coverage:
            return Factors(self._left / self._total, self._right / self._total, self._scale)
        inverse = _inverse(self._weights)
        left, right = self._left * inverse[None, :], self._right * inverse[:, None]
        if old is not None:
            left[:, self._weights == 0] = old.left[:, self._weights == 0]
            right[self._weights == 0] = old.right[self._weights == 0]
        return Factors(left, right, self._scale)


def _scattered(values: Matrix, kept: Indices, length: int, axis: int) -> Matrix:
    shape = (length, values.shape[1]) if axis == 0 else (values.shape[0], length)
    full = np.zeros(shape, values.dtype)
    full[(kept, slice(None)) if axis == 0 else (slice(None), kept)] = values
    return full


def _inverse(coverage: Matrix) -> Matrix:
    """1 / c, and 0 where c is 0."""
    return np.divide(1.0, coverage, out=np.zeros_like(coverage), where=coverage > 0)

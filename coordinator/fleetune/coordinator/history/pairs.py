"""Folds of LoRA pairs computed once more, each pair written out whole: slow, in plain numpy, and not shared with the coordinator's own.

What a device had, kept and trained of a pair is put into the whole matrices, and the mean is taken element by element over the devices that
have an element. Where a rule averages products, the state's pair must be the best of its rank, to float32's precision: which best pair it
is, singular values leave open. Where it averages matrices, they must be these, to the same precision.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fleetune import architectures, structures
from fleetune.architectures import Layout
from fleetune.coordinator.history.tensorfiles import Values, matrix
from fleetune.wire import codec

Places = npt.NDArray[np.integer]

BY_PRODUCTS = frozenset({"exact", "flexlora"})
WITH_REST = frozenset({"flora", "fedex"})

TOLERANCE = 1e-5
"""Of the norm of a mean of products."""

CLIP = 3.0
"""Times the median of the devices' norms, for `zero-pad`."""


@dataclass(frozen=True)
class PairRule:
    """How a job's pairs are folded in a round."""

    aggregation: str
    scale: float
    round_number: int
    layout: Layout | None = None
    """Of a model whose devices prune it."""
    residual_rank: int = 0
    """How many of the last directions no device trains, for `flora` and `fedex`."""
    seed: int = 0


@dataclass(frozen=True)
class _Own:
    """A device's pair: its matrices, and where their rows and columns lie in the whole ones."""

    index: int
    left: Values
    right: Values
    rows: Places
    columns: Places
    scale: float

    @property
    def rank(self) -> int:
        return len(self.right)


@dataclass(frozen=True)
class _Round:
    """The files of a round."""

    start: Path
    base: codec.TensorTable
    updates: Sequence[Path]
    tables: Sequence[codec.TensorTable]
    rule: PairRule

    def old(self, name: str) -> Values:
        return matrix(self.start, self.base, name)

    def devices(self, left: str, right: str) -> Iterator[_Own]:
        """Of those that sent any of the pair."""
        old_left, old_right = self.old(left), self.old(right)
        for index, (path, table) in enumerate(zip(self.updates, self.tables, strict=True)):
            if left not in table.by_name and right not in table.by_name:
                continue
            rank = table.by_name[right].shape[0] if right in table.by_name else table.by_name[left].shape[1]
            scale = float(table.metadata.get("fleetune.lora_scale", self.rule.scale))
            rows, columns = self._kept(table, left, len(old_left), 0), self._kept(table, right, old_right.shape[1], 1)
            own_left = old_left[rows][:, :rank] * (self.rule.scale / scale)
            own_right = old_right[:rank][:, columns]
            whole = table.metadata.get("fleetune.update") == "state"
            if left in table.by_name:
                own_left = matrix(path, table, left) + (0.0 if whole else own_left)
            if right in table.by_name:
                own_right = matrix(path, table, right) + (0.0 if whole else own_right)
            yield _Own(index, own_left, own_right, rows, columns, scale)

    def _kept(self, table: codec.TensorTable, name: str, length: int, axis: int) -> Places:
        layout = self.rule.layout
        cut = architectures.tensor_cut(layout, name) if layout is not None else None
        if layout is None or cut is None or cut.axis != axis:
            return np.arange(length)
        structure = structures.from_bytes(layout, bytes.fromhex(table.metadata["fleetune.structure"]))
        return np.array(structures.kept_elements(layout, structure, cut))


def names(base: codec.TensorTable) -> list[tuple[str, str]]:
    """(B, A) of every pair."""
    found = [(name.replace("lora_A", "lora_B"), name) for name in base.names if ".lora_A." in name or name.endswith(".lora_embedding_A")]
    return [pair for pair in found if pair[0] in base.by_name]


def unlike(start: Path, end: Path, result: codec.TensorTable, updates: Sequence[Path], weights: Sequence[int], rule: PairRule) -> list[str]:
    """Names of the matrices of `end` that are not what the rule makes of `start` and the updates."""
    files = _Round(start, codec.read_table(start), updates, [codec.read_table(path) for path in updates], rule)
    shares: Sequence[float] = _norm_shares(files) if rule.aggregation == "zero-pad" else weights
    wrong: list[str] = []
    for left, right in names(files.base):
        found = matrix(end, result, left), matrix(end, result, right)
        devices = list(files.devices(left, right))
        if not devices:
            same = all(np.array_equal(files.old(name), matrix(end, result, name)) for name in (left, right))
        elif rule.aggregation in WITH_REST:
            same = _is_with_rest(files, devices, weights, (left, right), found, result)
        elif rule.aggregation in BY_PRODUCTS:
            same = _is_best(_mean_product(files, devices, weights, left, right), found, rule.scale)
        else:
            expected = _mean_matrices(files, devices, shares, left, right)
            both = zip((left, right), expected, found, strict=True)
            same = all(_is_near(wanted, there, result.by_name[name].dtype) for name, wanted, there in both)
        wrong += [] if same else [right, left]
    return wrong


def _mean_product(files: _Round, devices: Sequence[_Own], weights: Sequence[int], left: str, right: str) -> Values:
    """d x k: each element's mean over the devices that have it; as it was where none does."""
    old_left, old_right, scale = files.old(left), files.old(right), files.rule.scale
    total = np.zeros((len(old_left), old_right.shape[1]))
    coverage = np.zeros_like(total)
    for own in devices:
        product = own.scale * (own.left @ own.right)
        if files.rule.aggregation != "flexlora":  # it stands for the directions that it was not given, as they were
            product += scale * (old_left[own.rows][:, own.rank :] @ old_right[own.rank :][:, own.columns])
        there = np.ix_(own.rows, own.columns)
        total[there] += weights[own.index] * product
        coverage[there] += weights[own.index]
    return np.where(coverage > 0, total / np.where(coverage > 0, coverage, 1.0), scale * (old_left @ old_right))


def _is_best(mean: Values, found: tuple[Values, Values], scale: float, beside: Values | None = None) -> bool:
    """Whether the pair is as near to the mean as any of its rank; to what of the mean is not in `beside`, if there is that."""
    wanted = mean if beside is None else mean - beside
    singular = np.linalg.svd(wanted, compute_uv=False)
    # Equal singular values leave the best pair open, but not how far the best are from the mean.
    error, best = float(np.linalg.norm(wanted - scale * (found[0] @ found[1]))), float(np.linalg.norm(singular[len(found[1]) :]))
    return error <= best + TOLERANCE * float(np.linalg.norm(mean))


def _is_with_rest(
    files: _Round,
    devices: Sequence[_Own],
    weights: Sequence[int],
    names: tuple[str, str],
    found: tuple[Values, Values],
    result: codec.TensorTable,
) -> bool:
    """Whether the first directions are what devices go on with, and the others the best for what these do not say of the mean."""
    rank, scale = len(found[1]) - files.rule.residual_rank, files.rule.scale
    left, right = found[0][:, :rank], found[1][:rank]
    if files.rule.aggregation == "flora":
        wanted = np.zeros_like(left), _fresh(files.rule, names[1], right)
    else:
        mean_left, mean_right = _mean_matrices(files, devices, weights, *names)
        wanted = mean_left[:, :rank], mean_right[:rank]
    both = zip(names, wanted, (left, right), strict=True)
    if not all(_is_near(expected, there, result.by_name[name].dtype) for name, expected, there in both):
        return False
    mean = _mean_product(files, devices, weights, *names)
    return _is_best(mean, (found[0][:, rank:], found[1][rank:]), scale, scale * (left @ right))


def _fresh(rule: PairRule, name: str, like: Values) -> Values:
    """A's rows at the begin of a round of FLoRA's: by name, round and seed, within 1/sqrt(k)."""
    digest = hashlib.sha256(f"{rule.seed}/{rule.round_number}/{name}".encode()).digest()
    drawn = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(like.shape)
    return (2.0 * drawn - 1.0) / math.sqrt(like.shape[1])


def _is_near(expected: Values, found: Values, dtype: str) -> bool:
    part = 1e-6 if dtype in ("F32", "F64") else 2.0**-7
    return np.allclose(expected, found, rtol=part, atol=part * float(np.abs(expected).max()))


def _mean_matrices(files: _Round, devices: Sequence[_Own], shares: Sequence[float], left: str, right: str) -> tuple[Values, Values]:
    """(B, A) as the rules have them that average each by itself."""
    old_left, old_right = files.old(left), files.old(right)
    aggregation = files.rule.aggregation
    total_left, total_right = np.zeros_like(old_left), np.zeros_like(old_right)
    coverage = np.zeros(len(old_right))
    for own in devices:
        share = shares[own.index]
        whole_left, whole_right = np.zeros_like(old_left), np.zeros_like(old_right)
        if aggregation in ("ffa", "rolora"):
            whole_left, whole_right = np.array(old_left), np.array(old_right)
        whole_left[:, : own.rank], whole_right[: own.rank] = own.left * (own.scale / files.rule.scale), own.right
        total_left += share * whole_left
        total_right += share * whole_right
        coverage[: own.rank if aggregation == "fedit" else None] += share
    there = coverage > 0
    divisor = np.where(there, coverage, 1.0)
    mean_left = np.where(there[None, :], total_left / divisor[None, :], old_left)
    mean_right = np.where(there[:, None], total_right / divisor[:, None], old_right)
    if aggregation == "ffa" or (aggregation == "rolora" and files.rule.round_number % 2 == 1):
        return mean_left, old_right
    return (old_left, mean_right) if aggregation == "rolora" else (mean_left, mean_right)


def _norm_shares(files: _Round) -> list[float]:
    """By the norm of each device's products, none above a multiple of the median."""
    squares: Mapping[int, list[float]] = {index: [0.0] for index in range(len(files.updates))}
    for left, right in names(files.base):
        for own in files.devices(left, right):
            squares[own.index].append(float(np.sum((own.scale * (own.left @ own.right)) ** 2)))
    norms = [float(np.sqrt(sum(squares[index]))) for index in range(len(files.updates))]
    clipped = [min(norm, CLIP * statistics.median(norms)) for norm in norms]
    return clipped if sum(clipped) > 0 else [1.0] * len(norms)

"""The fold of a round whose updates are LoRA pairs, of unlike ranks and scales if need be; everything else in the state is a plain mean.

An update holds, for each pair that its device trained, how the first r_i directions of the global pair have moved: the global pair is
ordered by what its directions carry, so its first r_i are the best of that rank, and every device fetches the same state. The device's own
matrices are put together again from the state and its update; then `lora.rules` makes one pair of all, and tells how far it is from the
exact mean of the products. Where the rule is a mean of the matrices and all ranks are the state's own, the plain fold makes the bytes.

One pair of one device is in memory at a time, beside the pair's own sums. Order, durability and errors are those of `aggregate.fold`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from fleetune.architectures import Layout
from fleetune.coordinator.lora import rules
from fleetune.coordinator.lora.factors import Factors, Indices, Matrix, Part
from fleetune.coordinator.lora.rules import LoraFold, Merged, PairFold
from fleetune.coordinator.rounds import aggregate, contributions, slabs, structured
from fleetune.coordinator.rounds.aggregate import FoldPlan, FoldResult
from fleetune.coordinator.rounds.contributions import Input, Inputs, Mean, span_of
from fleetune.coordinator.rounds.lorapairs import Leeway, Pair, pairs_of, scale_of
from fleetune.coordinator.rounds.slabs import Floats
from fleetune.errors import NotFiniteError
from fleetune.wire.codec import TensorSpec

AGGREGATION_ERROR = "aggregation_error"
TRUNCATION_ERROR = "truncation_error"


def fold(plan: FoldPlan, rule: LoraFold) -> FoldResult:
    """As `aggregate.fold`, and `metrics` tell both errors of all pairs together, by the norm of the exact mean."""
    with threadpool_limits(1, "blas"), contextlib.ExitStack() as stack, np.errstate(over="ignore", invalid="ignore"):
        # One thread: sums that are split among threads depend on their number, and small matrices are slower by them on a busy machine.
        inputs = contributions.open_inputs(plan.base_state, plan.contributions, stack, leeway=Leeway(rule.trained_rank, plan.layout))
        folding = _LoraFolding(inputs, rule, max(1, plan.slab_bytes // 32), plan.layout)
        if folding.is_plain():
            result = aggregate.fold(plan)
            folding.look()
            return replace(result, metrics=folding.metrics())
        out = stack.enter_context(slabs.Output(plan.out_state))
        out.write(inputs.base_header)
        squares = folding.run(out)
        out.make_durable()
        out.publish()
        return FoldResult(out.digest(), out.size_bytes, None, 0, inputs.coverage(), math.sqrt(squares), folding.metrics())


class _LoraFolding:
    def __init__(self, inputs: Inputs, rule: LoraFold, elements: int, layout: Layout | None) -> None:
        self._inputs = inputs
        self._rule = rule
        self._layout = layout
        self._structures = [structured.structure_of(table, layout) for table in inputs.layouts] if layout is not None else []
        self._mean = Mean(inputs, elements)
        self._old = np.empty(elements, np.float64)
        self._pairs = pairs_of(inputs.base)
        self._scales = [scale_of(table, rule.scale) for table in inputs.layouts]
        self._weights = self._norm_weights() if rules.RULES[rule.aggregation].by_norm else None
        self._squares = {"mean": 0.0, AGGREGATION_ERROR: 0.0}

    def is_plain(self) -> bool:
        """Whether the rule is the plain mean of each tensor by itself."""
        if self._rule.aggregation != "fedit":
            return False
        ranks = {pair.rank_in(table) for pair in self._each_pair() for table in self._inputs.layouts if pair.held_by(table)}
        return ranks <= {self._rule.rank} and set(self._scales) <= {self._rule.scale}

    def look(self) -> None:
        """Only the errors."""
        for pair in self._each_pair():
            self._merged(pair)

    def run(self, out: slabs.Output) -> float:
        """Writes the whole state; returns the square of how far the model has moved, pairs counted by their products."""
        squares = 0.0
        waiting: dict[str, Matrix] = {}
        for spec in self._inputs.base.in_file_order:
            pair = self._pairs.get(spec.name)
            if pair is None or not self._holders(pair):
                squares += self._plain(spec, out)
                continue
            if spec.name not in waiting:
                old, merged = self._merged(pair)
                waiting[pair.left], waiting[pair.right] = merged.factors.left, merged.factors.right
                squares += rules.difference(merged.factors, old) ** 2
            self._write(waiting.pop(spec.name), spec, out)
        if not math.isfinite(squares):
            raise NotFiniteError("The mean of the updates holds NaN or Inf.", "Check every update before it is folded.")
        return squares

    def metrics(self) -> Mapping[str, float]:
        """Empty where nothing was sent of any pair."""
        norm = self._squares["mean"]
        found = {name: math.sqrt(square / norm) for name, square in self._squares.items() if name != "mean" and norm > 0}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _each_pair(self) -> Iterator[Pair]:
        seen: set[str] = set()
        for pair in self._pairs.values():
            if pair.left not in seen:
                seen.add(pair.left)
                yield pair

    def _holders(self, pair: Pair) -> list[Input]:
        return [part for part in self._inputs.inputs if pair.held_by(self._inputs.layouts[part.layout])]

    def _merged(self, pair: Pair) -> tuple[Factors, Merged]:
        """The pair as it was, and as the rule makes it."""
        old = self._old_pair(pair)
        rule = self._rule
        folding = PairFold(rule.aggregation, old, self._weights, rule.residual_rank, rule.fresh(pair.right, old.right.shape[1]))
        holders = self._holders(pair)
        if not holders:
            return old, Merged(old, 0.0, 0.0, None)
        for part in holders:
            rows, columns = self._kept(pair, part)
            folding.add(Part(part.source.device_id, float(part.source.weight), self._part(pair, part, old), rows, columns))
        merged = folding.result(rule.trained)
        self._squares["mean"] += merged.norm**2
        self._squares[AGGREGATION_ERROR] += merged.aggregation_error**2
        if merged.truncation_error is not None:
            self._squares[TRUNCATION_ERROR] = self._squares.get(TRUNCATION_ERROR, 0.0) + merged.truncation_error**2
        return old, merged

    def _norm_weights(self) -> Mapping[str, float]:
        """By device, over all of its pairs."""
        squares = dict.fromkeys((part.source.device_id for part in self._inputs.inputs), 0.0)
        for pair in self._each_pair():
            old = self._old_pair(pair)
            for part in self._holders(pair):
                squares[part.source.device_id] += self._part(pair, part, old).norm() ** 2
        return rules.norm_weights({device: math.sqrt(square) for device, square in squares.items()}) if squares else {}

    def _old_pair(self, pair: Pair) -> Factors:
        base = self._inputs.base
        left, right = (self._old_tensor(base.by_name[name]) for name in (pair.left, pair.right))
        return Factors(left, right, self._rule.scale)

    def _old_tensor(self, spec: TensorSpec) -> Floats:
        values = np.empty(spec.elements, np.float64)
        raw = memoryview(bytearray(spec.size_bytes))
        slabs.widen(slabs.read(self._inputs.base_fd, raw, self._inputs.base.data_start + spec.begin), spec.dtype, values)
        return np.reshape(values, spec.shape)

    def _part(self, pair: Pair, part: Input, old: Factors) -> Factors:
        """A device's own matrices: what it began with, and how that has moved. A matrix that it did not send has not moved."""
        table = self._inputs.layouts[part.layout]
        start = old.leading(pair.rank_in(table), self._scales[part.layout])
        rows, columns = self._kept(pair, part)
        start = Factors(
            start.left if rows is None else start.left[rows], start.right if columns is None else start.right[:, columns], start.scale
        )
        found = {pair.left: start.left, pair.right: start.right}
        for name in (pair.left, pair.right):
            spec = table.by_name.get(name)
            if spec is not None:
                raw = part.read(memoryview(bytearray(spec.size_bytes)), table.data_start + spec.begin)
                values = np.empty(spec.elements, np.float64)
                slabs.widen(raw, spec.dtype, values)
                sent = np.reshape(values, spec.shape)
                found[name] = sent if self._inputs.kind == "state" else np.add(sent, found[name], out=sent)
        return Factors(found[pair.left], found[pair.right], start.scale)

    def _kept(self, pair: Pair, part: Input) -> tuple[Indices | None, Indices | None]:
        """Rows and columns that a device has left of a pair; None for all of them."""
        if self._layout is None:
            return None, None
        return structured.pair_kept(self._layout, self._structures[part.layout], pair.left, pair.right)

    def _plain(self, spec: TensorSpec, out: slabs.Output) -> float:
        """A tensor of no pair, or of one that nobody sent: its mean, as everywhere."""
        if spec.elements == 0:
            return 0.0
        span = span_of(spec, self._inputs.base, self._inputs.layouts)
        holders = self._inputs.holders(span)
        weight = sum(part.source.weight for part in holders)
        squares = 0.0
        for start in range(0, span.elements, self._mean.elements):
            count = min(self._mean.elements, span.elements - start)
            if not holders:
                out.write(self._mean.copied(span, start, count))
                continue
            total = self._mean.of(span, holders, weight, start, count)
            old = self._mean.old(span, start, self._old[:count])
            new = total if self._inputs.kind == "state" else np.add(total, old, out=total)
            squares += float(np.square(new - old).sum())
            out.write(slabs.narrow(new, span.dtype, self._mean.raw))
        return squares

    def _write(self, values: Matrix, spec: TensorSpec, out: slabs.Output) -> None:
        if not np.isfinite(values).all():
            raise NotFiniteError("The mean of the updates holds NaN or Inf.", "Check every update before it is folded.")
        flat = np.ravel(values)
        for start in range(0, flat.size, self._mean.elements):
            out.write(slabs.narrow(flat[start : start + self._mean.elements], spec.dtype, self._mean.raw))

"""Checking an update and folding the accepted ones into the next global state, slab by slab.

Over the contributions i that hold a tensor, with whole weights w_i and W = sum w_i:

    delta updates:  new = old + (sum w_i d_i) / W        state updates:  new = (sum w_i x_i) / W

and what nobody holds keeps its bytes. Sums are float64 in device-id order whatever the order of arrival, bf16 and fp16 are widened
exactly, the result is rounded once to the old tensor's dtype: the same set of updates gives the same bytes.

Tensors that lie next to each other in the base and in every contribution are folded as one span, so a state of many small tensors costs
few calls. A slab of each contribution at a time is read into the same buffers, which fit into a core's L2 cache: memory does not depend
on the size of the state nor on the number of contributions. The output is hashed while it is written, aside, and renamed at the end.

Gradients are no change of the state yet: `stepping` takes the optimiser's step along their mean.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fleetune.architectures import Layout
from fleetune.coordinator.rounds import contributions, slabs
from fleetune.coordinator.rounds.contributions import KIND_KEY, Contribution, Input, Inputs, Kind, Mean, Span, check_update, spans
from fleetune.coordinator.rounds.lorapairs import NO_LEEWAY, Leeway
from fleetune.coordinator.rounds.moments import Moments
from fleetune.coordinator.rounds.optimizers import AdamW, ServerOptimizer
from fleetune.coordinator.rounds.slabs import Floats
from fleetune.coordinator.rounds.stepping import Stepping
from fleetune.coordinator.rounds.structured import STRUCTURE_KEY, importance_of
from fleetune.errors import NotFiniteError, WireError
from fleetune.wire import codec
from fleetune.wire.codec import TensorTable

__all__ = ["KIND_KEY", "SLAB_BYTES", "Contribution", "FoldPlan", "FoldResult", "NotFiniteUpdateError", "UpdateFacts", "fold", "inspect"]

# All buffers of a fold together; half of it is in use per contribution, which fits a 1 MiB L2 beside what the system needs.
SLAB_BYTES = 1 << 20


@dataclass(frozen=True)
class UpdateFacts:
    """What an update file holds; `norm` is the Euclidean norm over all its elements."""

    kind: Kind
    names: tuple[str, ...]
    dtype: str
    norm: float
    finite: bool
    structure: str = ""
    """Hex of what the device's model has left; empty where devices do not prune."""
    sparsity: float = 0.0
    importance: str = ""
    """Of its heads and neurons, where it tells."""


@dataclass(frozen=True)
class FoldPlan:
    """What to fold, and where the results go. Paths of results are replaced when all is written."""

    base_state: Path
    contributions: tuple[Contribution, ...]
    out_state: Path
    # AdamW for gradients, and only for them.
    server: ServerOptimizer | AdamW | None = None
    # The moments after the last round; None before the first.
    optimizer_state: Path | None = None
    out_optimizer_state: Path | None = None
    slab_bytes: int = SLAB_BYTES
    # Of the model, where devices prune it: an update then has its device's rows and columns only.
    layout: Layout | None = None


@dataclass(frozen=True)
class FoldResult:
    """The new state.

    `coverage` is each tensor's total weight, 0 where nobody held it; `update_norm` that of the weighted mean delta or gradient.
    """

    digest: str
    size_bytes: int
    optimizer_digest: str | None
    optimizer_size_bytes: int
    coverage: Mapping[str, int]
    update_norm: float
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """What the fold has to tell of itself, for people."""


class NotFiniteUpdateError(WireError):
    """An update holds NaN or Inf: the device's training diverged."""


def inspect(path: Path, expected: TensorTable, slab_bytes: int = SLAB_BYTES, leeway: Leeway = NO_LEEWAY) -> UpdateFacts:
    """Facts of an update file whose every tensor must be one of `expected`, of its shape, but for the leeway, in one wire dtype and
    finite.

    WireError names the tensor, what was found and what was expected; NaN and Inf are NotFiniteUpdateErrors, so `finite` is true of what
    returns. The file may be renamed meanwhile.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        table = _table(fd)
        kind = check_update(table, expected, leeway)
        dtype = table.specs[0].dtype
        width = codec.ITEM_BYTES[dtype]
        elements = max(1, slab_bytes // (width + 8))
        raw = memoryview(bytearray(elements * width))
        wide = np.empty(elements, np.float64)
        total = (table.file_size - table.data_start) // width
        squares = 0.0
        for start in range(0, total, elements):
            count = min(elements, total - start)
            values = wide[:count]
            with np.errstate(invalid="ignore"):  # a NaN is told below; numpy would warn of some kinds of it
                slabs.widen(slabs.read(fd, raw[: count * width], table.data_start + start * width), dtype, values)
                square = _squares(values, out=values)
            if not math.isfinite(square):
                # Squares of float32 sum up far below float64's limit: the slab itself holds NaN or Inf.
                with np.errstate(invalid="ignore"):
                    slabs.widen(raw[: count * width], dtype, values)
                where = _first_not_finite(table, start, values)
                raise NotFiniteUpdateError(where, "The device's training diverged: lower its learning rate.")
            squares += square
        structure, importance = ("", "") if leeway.layout is None else (table.metadata[STRUCTURE_KEY], importance_of(table, leeway.layout))
        return UpdateFacts(kind, table.names, dtype, math.sqrt(squares), True, structure, importance=importance)
    finally:
        os.close(fd)


def fold(plan: FoldPlan) -> FoldResult:
    """Fold the plan's contributions; its result files are whole and fsynced when this returns, and absent or as before when it raises.

    The folder's own fsync is for the caller. WireError for an unsound contribution or base, NotFiniteError for a result that overflows,
    DiskFullError. Blocks; numpy and hashing release the interpreter lock.
    """
    stepping = isinstance(plan.server, AdamW)
    with contextlib.ExitStack() as stack, np.errstate(over="ignore", invalid="ignore"):
        inputs = contributions.open_inputs(plan.base_state, plan.contributions, stack, "gradient" if stepping else "delta")
        if stepping != (inputs.kind == "gradient"):
            raise WireError(
                f"The updates of the round hold {inputs.kind}s; the job's server optimiser is for {'gradients' if stepping else 'others'}."
            )
        elements = max(1, plan.slab_bytes // 32)
        coverage = inputs.coverage()
        moments = _moments(plan, inputs, coverage, elements, stack)
        out = stack.enter_context(slabs.Output(plan.out_state))
        out.write(inputs.base_header)
        if isinstance(plan.server, AdamW):
            assert moments is not None
            squares = Stepping(plan.server, inputs, moments, out, elements).run()
        else:
            squares = _Folding(plan.server, inputs, moments, out, elements).run()
        written = [out] if moments is None else [moments.out, out]
        for output in written:
            output.make_durable()
        for output in written:
            output.publish()
        return FoldResult(
            digest=out.digest(),
            size_bytes=out.size_bytes,
            optimizer_digest=moments.out.digest() if moments is not None else None,
            optimizer_size_bytes=moments.out.size_bytes if moments is not None else 0,
            coverage=coverage,
            update_norm=math.sqrt(squares),
        )


def _moments(plan: FoldPlan, inputs: Inputs, coverage: Mapping[str, int], elements: int, stack: contextlib.ExitStack) -> Moments | None:
    if plan.server is None:
        return None
    if plan.out_optimizer_state is None:
        raise ValueError("a fold with a server optimiser needs out_optimizer_state")
    return Moments(plan.server, inputs.base, coverage, plan.optimizer_state, plan.out_optimizer_state, elements, stack)


class _Folding:
    """One pass over the state. Per element it holds what `Mean` does, and 8 old; with moments 8 to 16 more, and 4 to 8 raw."""

    def __init__(self, server: ServerOptimizer | None, inputs: Inputs, moments: Moments | None, out: slabs.Output, elements: int) -> None:
        self._server = server
        self._inputs = inputs
        self._moments = moments
        self._out = out
        self._elements = elements
        self._mean = Mean(inputs, elements)
        self._old = np.empty(elements, np.float64)

    def run(self) -> float:
        """Writes the whole state; returns the squared norm of the mean delta."""
        squares = 0.0
        for span in spans(self._inputs.base, self._inputs.layouts):
            holders = self._inputs.holders(span)
            weight = sum(part.source.weight for part in holders)
            for start in range(0, span.elements, self._elements):
                count = min(self._elements, span.elements - start)
                if holders:
                    squares += self._covered(span, holders, weight, start, count)
                else:
                    self._untouched(span, start, count)
        return squares

    def _untouched(self, span: Span, start: int, count: int) -> None:
        self._out.write(self._mean.copied(span, start, count))
        if self._moments is not None and span.dtype in slabs.FLOATS:
            self._moments.leave(count)

    def _covered(self, span: Span, holders: Sequence[Input], weight: int, start: int, count: int) -> float:
        total = self._mean.of(span, holders, weight, start, count)
        wide = self._mean.wide[:count]
        old = self._mean.old(span, start, self._old[:count])
        delta, scratch = total, wide
        if self._inputs.kind == "state":
            delta, scratch = np.subtract(total, old, out=wide), total
        square = _squares(delta, out=np.frombuffer(self._mean.raw, np.float64)[:count])
        if not math.isfinite(square):
            raise NotFiniteError("The mean of the updates holds NaN or Inf.", "Check every update before it is folded.")
        if self._server is not None and self._moments is not None:
            moments = self._moments.read(count)
            self._server.step(delta, moments, scratch)
            self._moments.write(moments)
        # The mean state itself, not old + (mean - old), which would round once more.
        new = total if self._moments is None and self._inputs.kind == "state" else np.add(old, delta, out=old)
        self._out.write(slabs.narrow(new, span.dtype, self._mean.raw))
        return square


def _table(fd: int) -> TensorTable:
    return codec.parse_header(codec.read_header(fd), os.fstat(fd).st_size)


def _squares(values: Floats, out: Floats) -> float:
    """Sum of the squares, which are left in `out`."""
    # Not np.dot: its BLAS splits the sum among threads. Not np.einsum: it takes three times as long.
    return float(np.multiply(values, values, out=out).sum())


def _first_not_finite(table: TensorTable, start: int, values: Floats) -> str:
    where = start + int(np.flatnonzero(~np.isfinite(values))[0])
    width = codec.ITEM_BYTES[table.specs[0].dtype]
    for spec in table.in_file_order:
        if spec.begin <= where * width < spec.end:
            return f"Tensor {spec.name!r} holds {values[where - start]} at element {where - spec.begin // width} of {spec.elements}."
    raise AssertionError("the element lies in no tensor")

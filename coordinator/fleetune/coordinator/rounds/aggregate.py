"""Checking an update and folding the accepted ones into the next global state, slab by slab.

Over the contributions i that hold a tensor, with whole weights w_i and W = sum w_i:

    delta updates:  new = old + (sum w_i d_i) / W        state updates:  new = (sum w_i x_i) / W

and what nobody holds keeps its bytes. Sums are float64 in device-id order whatever the order of arrival, bf16 and fp16 are widened
exactly, the result is rounded once to the old tensor's dtype: the same set of updates gives the same bytes.

Tensors that lie next to each other in the base and in every contribution are folded as one span, so a state of many small tensors costs
few calls. A slab of each contribution at a time is read into the same buffers, which fit into a core's L2 cache: memory does not depend
on the size of the state nor on the number of contributions. The output is hashed while it is written, aside, and renamed at the end.

The moments of a server optimiser lie in a tensor file of their own under the same names, one more axis at the end (m, then v), float32:
they are read and written in the same order as the state.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from fleetune.coordinator.rounds import slabs
from fleetune.coordinator.rounds.optimizers import ServerOptimizer
from fleetune.coordinator.rounds.slabs import Floats
from fleetune.errors import NotFiniteError, WireError
from fleetune.wire import codec, digests
from fleetune.wire.codec import TensorSpec, TensorTable

Kind = Literal["delta", "state"]
KIND_KEY = "fleetune.update"
_KINDS: Mapping[str, Kind] = {"delta": "delta", "state": "state"}
OPTIMIZER_KEY = "fleetune.optimizer"
# All buffers of a fold together; half of it is in use per contribution, which fits a 1 MiB L2 beside what the system needs.
SLAB_BYTES = 1 << 20
# Files kept open during a fold; those beyond are opened for each slab.
OPEN_FILES = 64
# Sums of integers in float64 stay exact below this.
MAX_TOTAL_WEIGHT = 2**53

_UPDATE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class UpdateFacts:
    """What an update file holds; `norm` is the Euclidean norm over all its elements."""

    kind: Kind
    names: tuple[str, ...]
    dtype: str
    norm: float
    finite: bool


@dataclass(frozen=True)
class Contribution:
    """One accepted update; `weight` is a whole number above 0 (samples seen)."""

    device_id: str
    path: Path
    weight: int


@dataclass(frozen=True)
class FoldPlan:
    """What to fold, and where the results go. Paths of results are replaced when all is written."""

    base_state: Path
    contributions: tuple[Contribution, ...]
    out_state: Path
    server: ServerOptimizer | None = None
    # The moments after the last round; None before the first.
    optimizer_state: Path | None = None
    out_optimizer_state: Path | None = None
    slab_bytes: int = SLAB_BYTES


@dataclass(frozen=True)
class FoldResult:
    """The new state. `coverage` is each tensor's total weight, 0 where nobody held it; `update_norm` that of the weighted mean delta."""

    digest: str
    size_bytes: int
    optimizer_digest: str | None
    optimizer_size_bytes: int
    coverage: Mapping[str, int]
    update_norm: float


class NotFiniteUpdateError(WireError):
    """An update holds NaN or Inf: the device's training diverged."""


def inspect(path: Path, expected: TensorTable, slab_bytes: int = SLAB_BYTES) -> UpdateFacts:
    """Facts of an update file whose every tensor must be one of `expected`, of its shape, in one wire dtype and finite.

    WireError names the tensor, what was found and what was expected; NaN and Inf are NotFiniteUpdateErrors, so `finite` is true of what
    returns. The file may be renamed meanwhile.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        table = _table(fd)
        kind = _check_update(table, expected)
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
        return UpdateFacts(kind, table.names, dtype, math.sqrt(squares), True)
    finally:
        os.close(fd)


def fold(plan: FoldPlan) -> FoldResult:
    """Fold the plan's contributions; its result files are whole and fsynced when this returns, and absent or as before when it raises.

    The folder's own fsync is for the caller. WireError for an unsound contribution or base, NotFiniteError for a result that overflows,
    DiskFullError. Blocks; numpy and hashing release the interpreter lock.
    """
    with contextlib.ExitStack() as stack, np.errstate(over="ignore", invalid="ignore"):
        inputs = _open_inputs(plan, stack)
        moments = _Moments(plan, inputs.base, stack) if plan.server is not None else None
        out = stack.enter_context(slabs.Output(plan.out_state))
        out.write(inputs.base_header)
        squares = _Folding(plan, inputs, moments, out).run()
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
            coverage=inputs.coverage(),
            update_norm=math.sqrt(squares),
        )


# --- What is folded -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Input:
    """One contribution as the loop sees it: `layout` is the index of its table among the distinct ones."""

    source: Contribution
    layout: int
    fd: int | None

    def read(self, into: memoryview, offset: int) -> memoryview:
        if self.fd is not None:
            return slabs.read(self.fd, into, offset)
        fd = os.open(self.source.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return slabs.read(fd, into, offset)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class _Span:
    """Adjacent tensors of one dtype that the same layouts hold, adjacent there, too; `offsets` has one file offset (or None) per layout."""

    dtype: str
    offset: int
    elements: int
    offsets: tuple[int | None, ...]


@dataclass(frozen=True)
class _Inputs:
    base_fd: int
    base_header: bytes
    base: TensorTable
    kind: Kind
    layouts: tuple[TensorTable, ...]
    # In device-id order.
    inputs: tuple[_Input, ...]
    # Total weight of each layout's inputs.
    weights: tuple[int, ...]

    def coverage(self) -> dict[str, int]:
        return {
            name: sum(weight for table, weight in zip(self.layouts, self.weights, strict=True) if name in table.by_name)
            for name in self.base.names
        }


def _open_inputs(plan: FoldPlan, stack: contextlib.ExitStack) -> _Inputs:
    contributions = sorted(plan.contributions, key=lambda contribution: contribution.device_id)
    _check_contributions(contributions)
    base_fd = _opened(plan.base_state, stack)
    base_header = codec.read_header(base_fd)
    base = codec.parse_header(base_header, os.fstat(base_fd).st_size)
    # Devices of one method send one layout: equal headers share one table, or memory would grow with the number of devices.
    seen: dict[tuple[str, int], int] = {}
    layouts: list[TensorTable] = []
    weights: list[int] = []
    inputs: list[_Input] = []
    kinds: set[Kind] = set()
    for contribution in contributions:
        keep = len(inputs) < OPEN_FILES
        with contextlib.ExitStack() as once:
            fd = _opened(contribution.path, stack if keep else once)
            header = codec.read_header(fd)
            file_size = os.fstat(fd).st_size
            identity = (digests.of_bytes(header), file_size)
            if identity not in seen:
                try:
                    table = codec.parse_header(header, file_size)
                    kinds.add(_check_update(table, base))
                except WireError as error:
                    raise WireError(f"The update of device {contribution.device_id!r}: {error.message}", error.remedy) from error
                seen[identity] = len(layouts)
                layouts.append(table)
                weights.append(0)
        layout = seen[identity]
        weights[layout] += contribution.weight
        inputs.append(_Input(contribution, layout, fd if keep else None))
    if len(kinds) > 1:
        raise WireError("Some updates of the round hold deltas and some hold states; all must be of one kind.")
    kind = kinds.pop() if kinds else "delta"
    return _Inputs(base_fd, base_header, base, kind, tuple(layouts), tuple(inputs), tuple(weights))


def _check_contributions(contributions: Sequence[Contribution]) -> None:
    total = 0
    for index, contribution in enumerate(contributions):
        if contribution.weight <= 0:
            raise WireError(f"Device {contribution.device_id!r} has the weight {contribution.weight}; a whole number above 0 is needed.")
        if index and contributions[index - 1].device_id == contribution.device_id:
            raise WireError(f"Device {contribution.device_id!r} contributes twice; one update a device is folded.")
        total += contribution.weight
    if total >= MAX_TOTAL_WEIGHT:
        raise WireError(f"The weights of the round sum up to {total}; less than 2**53 is allowed.")


def _check_update(table: TensorTable, expected: TensorTable) -> Kind:
    kind = _KINDS.get(table.metadata.get(KIND_KEY, ""))
    if kind is None:
        raise WireError(f"An update's metadata say {KIND_KEY} = {table.metadata.get(KIND_KEY, '')[:40]!r}; 'delta' or 'state' is needed.")
    if not table.specs:
        raise WireError("An update holds no tensors; at least one is needed.")
    dtype = table.specs[0].dtype
    for spec in table.specs:
        known = expected.by_name.get(spec.name)
        if known is None:
            raise WireError(f"An update holds a tensor {spec.name!r}; the state has none of that name.")
        if spec.shape != known.shape:
            raise WireError(f"Tensor {spec.name!r} has the shape {list(spec.shape)}; {list(known.shape)} is expected.")
        if spec.dtype not in _UPDATE_DTYPES or known.dtype not in slabs.FLOATS:
            raise WireError(f"Tensor {spec.name!r} came as {spec.dtype} for {known.dtype}; {', '.join(_UPDATE_DTYPES)} are allowed.")
        if spec.dtype != dtype:
            raise WireError(f"Tensor {spec.name!r} came as {spec.dtype}, others as {dtype}; one dtype an update is allowed.")
    return kind


def _spans(base: TensorTable, layouts: Sequence[TensorTable]) -> Iterator[_Span]:
    run: _Span | None = None
    for spec in base.in_file_order:
        if spec.elements == 0:
            continue
        span = _span_of(spec, base, layouts)
        if run is not None and _follows(run, span, layouts):
            run = _Span(run.dtype, run.offset, run.elements + span.elements, run.offsets)
        else:
            if run is not None:
                yield run
            run = span
    if run is not None:
        yield run


def _span_of(spec: TensorSpec, base: TensorTable, layouts: Sequence[TensorTable]) -> _Span:
    held = [table.by_name.get(spec.name) for table in layouts]
    offsets = tuple(None if part is None else table.data_start + part.begin for part, table in zip(held, layouts, strict=True))
    return _Span(spec.dtype, base.data_start + spec.begin, spec.elements, offsets)


def _follows(run: _Span, span: _Span, layouts: Sequence[TensorTable]) -> bool:
    if run.dtype != span.dtype:
        return False
    for table, before, after in zip(layouts, run.offsets, span.offsets, strict=True):
        if before is None or after is None:
            if before is not after:
                return False
        elif before + run.elements * codec.ITEM_BYTES[table.specs[0].dtype] != after:
            return False
    return True


# --- The loop -----------------------------------------------------------------------------------------------------------------------


class _Folding:
    """One pass over the state. Per element it holds: 8 bytes raw, 8 widened, 8 sum, 8 old; with moments 8 to 16 more, and 4 to 8 raw."""

    def __init__(self, plan: FoldPlan, inputs: _Inputs, moments: _Moments | None, out: slabs.Output) -> None:
        self._inputs = inputs
        self._moments = moments
        self._out = out
        self._elements = max(1, plan.slab_bytes // 32)
        self._raw = memoryview(bytearray(self._elements * 8))
        self._wide = np.empty(self._elements, np.float64)
        self._sum = np.empty(self._elements, np.float64)
        self._old = np.empty(self._elements, np.float64)

    def run(self) -> float:
        """Writes the whole state; returns the squared norm of the mean delta."""
        squares = 0.0
        for span in _spans(self._inputs.base, self._inputs.layouts):
            holders = [part for part in self._inputs.inputs if span.offsets[part.layout] is not None]
            weight = sum(part.source.weight for part in holders)
            for start in range(0, span.elements, self._elements):
                count = min(self._elements, span.elements - start)
                if holders:
                    squares += self._covered(span, holders, weight, start, count)
                else:
                    self._untouched(span, start, count)
        return squares

    def _untouched(self, span: _Span, start: int, count: int) -> None:
        width = codec.ITEM_BYTES[span.dtype]
        raw = self._raw[: count * width]
        self._out.write(slabs.read(self._inputs.base_fd, raw, span.offset + start * width))
        if self._moments is not None and span.dtype in slabs.FLOATS:
            self._moments.write(self._moments.read(count))

    def _covered(self, span: _Span, holders: Sequence[_Input], weight: int, start: int, count: int) -> float:
        total = self._sum[:count]
        wide = self._wide[:count]
        for index, part in enumerate(holders):
            table = self._inputs.layouts[part.layout]
            dtype = table.specs[0].dtype
            width = codec.ITEM_BYTES[dtype]
            raw = part.read(self._raw[: count * width], cast("int", span.offsets[part.layout]) + start * width)
            target = total if index == 0 else wide
            slabs.widen(raw, dtype, target)
            if part.source.weight != 1:
                target *= part.source.weight
            if index > 0:
                total += wide
        total /= weight
        old = self._old[:count]
        width = codec.ITEM_BYTES[span.dtype]
        slabs.widen(slabs.read(self._inputs.base_fd, self._raw[: count * width], span.offset + start * width), span.dtype, old)
        delta, scratch = total, wide
        if self._inputs.kind == "state":
            delta, scratch = np.subtract(total, old, out=wide), total
        square = _squares(delta, out=np.frombuffer(self._raw, np.float64)[:count])
        if not math.isfinite(square):
            raise NotFiniteError("The mean of the updates holds NaN or Inf.", "Check every update before it is folded.")
        if self._moments is not None:
            moments = self._moments.read(count)
            self._moments.step(delta, moments, scratch)
            self._moments.write(moments)
        # The mean state itself, not old + (mean - old), which would round once more.
        new = total if self._moments is None and self._inputs.kind == "state" else np.add(old, delta, out=old)
        self._out.write(slabs.narrow(new, span.dtype, self._raw))
        return square


class _Moments:
    """The optimiser's file of the last round as a stream, and the one of this round."""

    def __init__(self, plan: FoldPlan, base: TensorTable, stack: contextlib.ExitStack) -> None:
        if plan.server is None or plan.out_optimizer_state is None:
            raise ValueError("a fold with a server optimiser needs out_optimizer_state")
        self._server = plan.server
        self._count = plan.server.moments
        header = _moments_header(base, plan.server)
        self._fd = -1
        if plan.optimizer_state is not None:
            self._fd = _opened(plan.optimizer_state, stack)
            found = codec.read_header(self._fd)
            codec.parse_header(found, os.fstat(self._fd).st_size)
            if found != header:
                raise WireError(
                    f"{plan.optimizer_state} does not hold the moments of {plan.server.kind} for this state.",
                    "A job cannot change its server optimiser or its trainable tensors between rounds.",
                )
        self._offset = len(header)
        elements = max(1, plan.slab_bytes // 32)
        self._raw = memoryview(bytearray(elements * self._count * 4))
        self._wide = np.empty((elements, self._count), np.float64)
        self.out = stack.enter_context(slabs.Output(plan.out_optimizer_state))
        self.out.write(header)

    def read(self, count: int) -> Floats:
        """The next `count` coordinates' moments, (count, moments), in this object's buffer."""
        wide = self._wide[:count]
        if self._fd < 0:
            wide[:] = self._server.initial()
            return wide
        raw = self._raw[: count * self._count * 4]
        slabs.widen(slabs.read(self._fd, raw, self._offset), "F32", wide.ravel())
        self._offset += len(raw)
        return wide

    def step(self, delta: Floats, moments: Floats, scratch: Floats) -> None:
        self._server.step(delta, moments, scratch)

    def write(self, moments: Floats) -> None:
        self.out.write(slabs.narrow(moments.ravel(), "F32", self._raw))


def _moments_header(base: TensorTable, server: ServerOptimizer) -> bytes:
    """Header of the moments file: the state's float tensors in the state's own order, with a last axis of moments."""
    specs: list[TensorSpec] = []
    begin = 0
    for spec in base.in_file_order:
        if spec.dtype in slabs.FLOATS:
            end = begin + spec.elements * server.moments * 4
            specs.append(TensorSpec(spec.name, "F32", (*spec.shape, server.moments), begin, end))
            begin = end
    return codec.build_header(specs, {OPTIMIZER_KEY: server.kind})


def _opened(path: Path, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


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

"""The updates of a round as the fold reads them: checked against the state, and cut into spans that lie alike in all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from fleetune.coordinator.rounds import slabs
from fleetune.coordinator.rounds.lorapairs import NO_LEEWAY, Leeway
from fleetune.coordinator.rounds.slabs import Floats
from fleetune.errors import WireError
from fleetune.wire import codec, digests
from fleetune.wire.codec import TensorSpec, TensorTable

Kind = Literal["delta", "state", "gradient"]
KIND_KEY = "fleetune.update"
_KINDS: Mapping[str, Kind] = {"delta": "delta", "state": "state", "gradient": "gradient"}
_KIND_WORDS = "'delta', 'state' or 'gradient'"
# Files kept open during a fold; those beyond are opened for each slab.
OPEN_FILES = 64
# Sums of integers in float64 stay exact below this.
MAX_TOTAL_WEIGHT = 2**53

_UPDATE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Contribution:
    """One accepted update; `weight` is a whole number above 0 (samples seen)."""

    device_id: str
    path: Path
    weight: int


@dataclass(frozen=True)
class Input:
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
class Span:
    """Adjacent tensors of one dtype that the same layouts hold, adjacent there, too; `offsets` has one file offset (or None) per layout."""

    dtype: str
    offset: int
    elements: int
    offsets: tuple[int | None, ...]


@dataclass(frozen=True)
class Inputs:
    """A round's start state and updates, open and sound."""

    base_fd: int
    base_header: bytes
    base: TensorTable
    kind: Kind
    layouts: tuple[TensorTable, ...]
    # In device-id order.
    inputs: tuple[Input, ...]
    # Total weight of each layout's inputs.
    weights: tuple[int, ...]

    def holders(self, span: Span) -> list[Input]:
        return [part for part in self.inputs if span.offsets[part.layout] is not None]

    def coverage(self) -> dict[str, int]:
        """Each tensor's total weight, 0 where nobody holds it."""
        return {
            name: sum(weight for table, weight in zip(self.layouts, self.weights, strict=True) if name in table.by_name)
            for name in self.base.names
        }


def open_inputs(
    base_state: Path, found: Sequence[Contribution], stack: contextlib.ExitStack, otherwise: Kind = "delta", leeway: Leeway = NO_LEEWAY
) -> Inputs:
    """The state and its updates, open until `stack` is closed; of kind `otherwise` where there are none. WireError for what is unsound."""
    contributions = sorted(found, key=lambda contribution: contribution.device_id)
    _check_contributions(contributions)
    base_fd = opened(base_state, stack)
    base_header = codec.read_header(base_fd)
    base = codec.parse_header(base_header, os.fstat(base_fd).st_size)
    # Devices of one method send one layout: equal headers share one table, or memory would grow with the number of devices.
    seen: dict[tuple[str, int], int] = {}
    layouts: list[TensorTable] = []
    weights: list[int] = []
    inputs: list[Input] = []
    kinds: set[Kind] = set()
    for contribution in contributions:
        keep = len(inputs) < OPEN_FILES
        with contextlib.ExitStack() as once:
            fd = opened(contribution.path, stack if keep else once)
            header = codec.read_header(fd)
            file_size = os.fstat(fd).st_size
            identity = (digests.of_bytes(header), file_size)
            if identity not in seen:
                try:
                    table = codec.parse_header(header, file_size)
                    kinds.add(check_update(table, base, leeway))
                except WireError as error:
                    raise WireError(f"The update of device {contribution.device_id!r}: {error.message}", error.remedy) from error
                seen[identity] = len(layouts)
                layouts.append(table)
                weights.append(0)
        layout = seen[identity]
        weights[layout] += contribution.weight
        inputs.append(Input(contribution, layout, fd if keep else None))
    if len(kinds) > 1:
        raise WireError(f"The updates of the round hold {' and '.join(sorted(kinds))}; all must be of one kind.")
    kind = kinds.pop() if kinds else otherwise
    return Inputs(base_fd, base_header, base, kind, tuple(layouts), tuple(inputs), tuple(weights))


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


def check_update(table: TensorTable, expected: TensorTable, leeway: Leeway = NO_LEEWAY) -> Kind:
    """What an update of these tensors holds; WireError where one of them is not as the state `expected` has it, but for the leeway."""
    kind = _KINDS.get(table.metadata.get(KIND_KEY, ""))
    if kind is None:
        raise WireError(f"An update's metadata say {KIND_KEY} = {table.metadata.get(KIND_KEY, '')[:40]!r}; {_KIND_WORDS} is needed.")
    if not table.specs:
        raise WireError("An update holds no tensors; at least one is needed.")
    expected = leeway.expected(expected, table)
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


def spans(base: TensorTable, layouts: Sequence[TensorTable]) -> Iterator[Span]:
    """The state from front to back, without what is empty."""
    run: Span | None = None
    for spec in base.in_file_order:
        if spec.elements == 0:
            continue
        span = span_of(spec, base, layouts)
        if run is not None and _follows(run, span, layouts):
            run = Span(run.dtype, run.offset, run.elements + span.elements, run.offsets)
        else:
            if run is not None:
                yield run
            run = span
    if run is not None:
        yield run


def span_of(spec: TensorSpec, base: TensorTable, layouts: Sequence[TensorTable]) -> Span:
    """One tensor alone."""
    held = [table.by_name.get(spec.name) for table in layouts]
    offsets = tuple(None if part is None else table.data_start + part.begin for part, table in zip(held, layouts, strict=True))
    return Span(spec.dtype, base.data_start + spec.begin, spec.elements, offsets)


def _follows(run: Span, span: Span, layouts: Sequence[TensorTable]) -> bool:
    if run.dtype != span.dtype:
        return False
    for table, before, after in zip(layouts, run.offsets, span.offsets, strict=True):
        if before is None or after is None:
            if before is not after:
                return False
        elif before + run.elements * codec.ITEM_BYTES[table.specs[0].dtype] != after:
            return False
    return True


class Mean:
    """The weighted mean of the updates, a slab at a time, in buffers of its own: per element 8 bytes raw, 8 widened, 8 sum."""

    def __init__(self, inputs: Inputs, elements: int) -> None:
        self._inputs = inputs
        self.elements = elements
        self.raw = memoryview(bytearray(elements * 8))
        self.wide = np.empty(elements, np.float64)
        self._sum = np.empty(elements, np.float64)

    def of(self, span: Span, holders: Sequence[Input], weight: int, start: int, count: int) -> Floats:
        """Of `count` elements of `span` from `start` on, over `holders`, who weigh `weight` together; overwrites `raw` and `wide`."""
        total = self._sum[:count]
        wide = self.wide[:count]
        for index, part in enumerate(holders):
            table = self._inputs.layouts[part.layout]
            dtype = table.specs[0].dtype
            width = codec.ITEM_BYTES[dtype]
            raw = part.read(self.raw[: count * width], cast("int", span.offsets[part.layout]) + start * width)
            target = total if index == 0 else wide
            slabs.widen(raw, dtype, target)
            if part.source.weight != 1:
                target *= part.source.weight
            if index > 0:
                total += wide
        total /= weight
        return total

    def old(self, span: Span, start: int, into: Floats) -> Floats:
        """The same elements of the state; `raw` is overwritten."""
        width = codec.ITEM_BYTES[span.dtype]
        raw = self.raw[: len(into) * width]
        slabs.widen(slabs.read(self._inputs.base_fd, raw, span.offset + start * width), span.dtype, into)
        return into

    def copied(self, span: Span, start: int, count: int) -> memoryview:
        """The bytes of `count` elements of the state, in `raw`."""
        width = codec.ITEM_BYTES[span.dtype]
        return slabs.read(self._inputs.base_fd, self.raw[: count * width], span.offset + start * width)


def opened(path: Path, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd

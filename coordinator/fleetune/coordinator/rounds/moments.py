"""The moments of a server optimiser: a tensor file of the state's names, read and written in the same order as the state.

One more axis at the end (m, then v), float32. Of an optimiser that counts steps, each tensor's count stands in the metadata.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fleetune.coordinator.rounds import slabs
from fleetune.coordinator.rounds.contributions import opened
from fleetune.coordinator.rounds.optimizers import AdamW, ServerOptimizer
from fleetune.coordinator.rounds.slabs import Floats
from fleetune.errors import WireError
from fleetune.wire import codec
from fleetune.wire.codec import TensorSpec, TensorTable

OPTIMIZER_KEY = "fleetune.optimizer"
STEPS_KEY = "fleetune.steps"
"""Steps of each tensor, in the order of the names, with commas between them."""

MAX_STEPS_DIGITS = 9


class Moments:
    """The optimiser's file of the last round as a stream, and the one of this round."""

    def __init__(
        self,
        server: ServerOptimizer | AdamW,
        base: TensorTable,
        coverage: Mapping[str, int],
        before: Path | None,
        after: Path,
        elements: int,
        stack: contextlib.ExitStack,
    ) -> None:
        """`before` is None in the first round; `elements` is the size of a slab. WireError for a file of another optimiser or state."""
        self._server = server
        self._count = server.moments
        self._fd = -1
        self._offset = 0
        self.steps: Mapping[str, int] = {}
        """Of each tensor, this round's included; empty for optimisers that do not count."""
        steps: Mapping[str, int] = {}
        if before is not None:
            self._fd = opened(before, stack)
            found = codec.read_header(self._fd)
            steps = _steps(codec.parse_header(found, os.fstat(self._fd).st_size), base)
            if found != _header(base, server, steps):
                raise WireError(
                    f"{before} does not hold the moments of {server.kind} for this state.",
                    "A job cannot change its server optimiser or its trainable tensors between rounds.",
                )
            self._offset = len(found)
        if isinstance(server, AdamW):
            self.steps = {name: steps.get(name, 0) + (coverage[name] > 0) for name in _floats(base)}
        self._raw = memoryview(bytearray(elements * self._count * 4))
        self._wide = np.empty((elements, self._count), np.float64)
        self.out = stack.enter_context(slabs.Output(after))
        self.out.write(_header(base, server, self.steps))

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

    def leave(self, count: int) -> None:
        """The next `count` coordinates' moments stay what they are."""
        if self._fd < 0:
            self.write(self.read(count))
            return
        raw = slabs.read(self._fd, self._raw[: count * self._count * 4], self._offset)
        self._offset += len(raw)
        self.out.write(raw)

    def write(self, moments: Floats) -> None:
        self.out.write(slabs.narrow(moments.ravel(), "F32", self._raw))


def _floats(base: TensorTable) -> list[str]:
    """Names of the tensors that have moments, sorted."""
    return [spec.name for spec in base.specs if spec.dtype in slabs.FLOATS]


def _header(base: TensorTable, server: ServerOptimizer | AdamW, steps: Mapping[str, int]) -> bytes:
    """The state's float tensors in the state's own order, with a last axis of moments."""
    specs: list[TensorSpec] = []
    begin = 0
    for spec in base.in_file_order:
        if spec.dtype in slabs.FLOATS:
            end = begin + spec.elements * server.moments * 4
            specs.append(TensorSpec(spec.name, "F32", (*spec.shape, server.moments), begin, end))
            begin = end
    metadata = {OPTIMIZER_KEY: server.kind}
    if isinstance(server, AdamW):
        metadata[STEPS_KEY] = ",".join(str(steps.get(name, 0)) for name in _floats(base))
    return codec.build_header(specs, metadata)


def _steps(table: TensorTable, base: TensorTable) -> Mapping[str, int]:
    """Counts that a file's metadata tell; empty where they tell none, or none that could be right."""
    names = _floats(base)
    words = table.metadata.get(STEPS_KEY, "").split(",")
    if len(words) != len(names) or not all(word.isascii() and word.isdecimal() and len(word) <= MAX_STEPS_DIGITS for word in words):
        return {}
    return {name: int(word) for name, word in zip(names, words, strict=True)}

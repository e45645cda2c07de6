"""One AdamW step of the global state along the mean of the devices' gradients, slab by slab.

Over the contributions i that hold a tensor, with whole weights w_i and W = sum w_i, the tensor's gradient is (sum w_i g_i) / W. What nobody
holds has no gradient, which is not a gradient of zero: its weights, its moments and its count of steps stay as they are.

The norm by which gradients are clipped is that of all of them together, so it is known only after a first pass over the updates. Means are
computed anew in the second one: to keep them would take twice the state's room on the disk, and most tensors have few contributions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fleetune.coordinator.rounds import slabs
from fleetune.coordinator.rounds.contributions import Inputs, Mean, Span, spans
from fleetune.coordinator.rounds.moments import Moments
from fleetune.coordinator.rounds.optimizers import AdamW
from fleetune.coordinator.rounds.slabs import Floats
from fleetune.errors import NotFiniteError
from fleetune.wire.codec import TensorSpec


@dataclass(frozen=True)
class _Piece:
    """What of one tensor lies in a slab: elements from `begin` to before `end` of the slab."""

    name: str
    begin: int
    end: int


class Stepping:
    """Two passes over the state, one where nothing is clipped. Per element it holds what `Mean` and `Moments` do, 8 old and 8 scratch."""

    def __init__(self, server: AdamW, inputs: Inputs, moments: Moments, out: slabs.Output, elements: int) -> None:
        self._server = server
        self._inputs = inputs
        self._moments = moments
        self._out = out
        self._mean = Mean(inputs, elements)
        self._old = np.empty(elements, np.float64)

    def run(self) -> float:
        """Writes the whole state; returns the squared norm of the mean gradient, before it is clipped."""
        if self._server.max_grad_norm <= 0:
            return self._pass(1.0)
        squares = self._pass(None)
        self._pass(self._server.clip(math.sqrt(squares)))
        return squares

    def _pass(self, factor: float | None) -> float:
        """With a factor for the gradients, take the step; without, only look. Returns the squared norm either way."""
        squares: dict[str, float] = {}
        specs = iter([spec for spec in self._inputs.base.in_file_order if spec.elements])
        for span in spans(self._inputs.base, self._inputs.layouts):
            holders = self._inputs.holders(span)
            weight = sum(part.source.weight for part in holders)
            for start, count, pieces in _slabs(span, specs, self._mean.elements):
                if not holders:
                    if factor is not None:
                        self._leave(span, start, count)
                    continue
                gradient = self._mean.of(span, holders, weight, start, count)
                square = np.multiply(gradient, gradient, out=self._mean.wide[:count])
                for piece in pieces:
                    squares[piece.name] = squares.get(piece.name, 0.0) + float(square[piece.begin : piece.end].sum())
                if factor is not None:
                    gradient *= factor
                    self._step(span, start, gradient, pieces)
        total = math.fsum(squares[name] for name in sorted(squares))
        if not math.isfinite(total):
            raise NotFiniteError("The mean of the gradients holds NaN or Inf.", "Check every update before it is folded.")
        return total

    def _leave(self, span: Span, start: int, count: int) -> None:
        self._out.write(self._mean.copied(span, start, count))
        if span.dtype in slabs.FLOATS:
            self._moments.leave(count)

    def _step(self, span: Span, start: int, gradient: Floats, pieces: Sequence[_Piece]) -> None:
        count = len(gradient)
        weights = self._mean.old(span, start, self._old[:count])
        moments = self._moments.read(count)
        scratch = self._mean.wide[:count]
        for begin, end, steps in self._alike(pieces):
            part = slice(begin, end)
            self._server.step(gradient[part], moments[part], weights[part], scratch[part], steps)
        self._moments.write(moments)
        self._out.write(slabs.narrow(weights, span.dtype, self._mean.raw))

    def _alike(self, pieces: Sequence[_Piece]) -> Iterator[tuple[int, int, int]]:
        """Neighbours that have taken as many steps are stepped as one: begin, end, and which step it is."""
        begin, steps = 0, self._moments.steps[pieces[0].name]
        for piece in pieces[1:]:
            if (other := self._moments.steps[piece.name]) != steps:
                yield begin, piece.begin, steps
                begin, steps = piece.begin, other
        yield begin, pieces[-1].end, steps


def _slabs(span: Span, specs: Iterator[TensorSpec], elements: int) -> Iterator[tuple[int, int, list[_Piece]]]:
    """The span cut into slabs: first element, elements, and the tensors in it. Takes from `specs`, in file order, those of the span."""
    name, left = "", 0
    for start in range(0, span.elements, elements):
        count = min(elements, span.elements - start)
        pieces: list[_Piece] = []
        at = 0
        while at < count:
            if not left:
                spec = next(specs)
                name, left = spec.name, spec.elements
            taken = min(left, count - at)
            pieces.append(_Piece(name, at, at + taken))
            at += taken
            left -= taken
        yield start, count, pieces

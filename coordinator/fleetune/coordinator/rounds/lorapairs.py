"""Which tensors of a state are LoRA pairs, and what a device of a lower rank may send of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fleetune.architectures import Layout
from fleetune.coordinator.rounds import structured
from fleetune.errors import WireError
from fleetune.wire import codec
from fleetune.wire.codec import TensorTable

SCALE_KEY = "fleetune.lora_scale"
"""In an update's metadata: what its device multiplied the product of its matrices by."""

SCALE_MAX = 1e6
_SCALE_CHARACTERS = 32

_ENDINGS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
"""As PEFT saves them: A is r x k, B is d x r, of embeddings, too."""


@dataclass(frozen=True)
class Leeway:
    """In what an update's tensors may be smaller than the state's."""

    rank: int = 0
    """LoRA pairs may be of any rank up to it; 0: of the state's own alone."""
    layout: Layout | None = None
    """Of a model whose devices prune it: rows and columns are those that the update's own structure has left."""

    def expected(self, state: TensorTable, found: TensorTable) -> TensorTable:
        """What an update like `found` should look like. WireError for what no leeway allows; other shapes are for the caller to compare."""
        if self.layout is not None:
            state = structured.table_of(self.layout, structured.structure_of(found, self.layout), state)
        if self.rank:
            state = narrowed(state, found, self.rank)
            scale_of(found, 1.0)
        return state


NO_LEEWAY = Leeway()


@dataclass(frozen=True)
class Pair:
    """Names of the two matrices: left is B, d x r; right is A, r x k."""

    left: str
    right: str

    def held_by(self, table: TensorTable) -> bool:
        return self.left in table.by_name or self.right in table.by_name

    def rank_in(self, table: TensorTable) -> int:
        """Of a table that holds it, by the matrix that is there."""
        right = table.by_name.get(self.right)
        return right.shape[0] if right is not None else table.by_name[self.left].shape[1]


def pairs_of(table: TensorTable) -> Mapping[str, Pair]:
    """Tensor name -> its pair, in the order of the names; a matrix without its other half is no pair."""
    found: dict[str, Pair] = {}
    for spec in table.specs:
        for right_ending, left_ending in _ENDINGS:
            if not spec.name.endswith(right_ending):
                continue
            pair = Pair(spec.name.removesuffix(right_ending) + left_ending, spec.name)
            left = table.by_name.get(pair.left)
            if left is not None and len(left.shape) == len(spec.shape) == 2 and left.shape[1] == spec.shape[0]:
                found[pair.left] = found[pair.right] = pair
    return found


def side_of(name: str) -> Literal["left", "right"] | None:
    """Which matrix of a pair a tensor is by its name; None where it is none."""
    for right_ending, left_ending in _ENDINGS:
        if name.endswith((right_ending, left_ending)):
            return "right" if name.endswith(right_ending) else "left"
    return None


def scale_of(table: TensorTable, otherwise: float) -> float:
    """The scale that an update tells, or `otherwise` where it tells none. WireError for what is no scale."""
    word = table.metadata.get(SCALE_KEY)
    if word is None:
        return otherwise
    try:
        scale = float(word) if len(word) <= _SCALE_CHARACTERS else math.nan
    except ValueError:
        scale = math.nan
    if not 0 < scale <= SCALE_MAX:
        raise WireError(f"An update's metadata say {SCALE_KEY} = {word[:40]!r}; a number above 0, at most {SCALE_MAX:g}, is needed.")
    return scale


def narrowed(expected: TensorTable, found: TensorTable, rank_limit: int) -> TensorTable:
    """What an update like `found` should look like: `expected`, its pairs at the rank that `found` has of them, if that is allowed.

    A device may train less than it was asked for, never more. WireError for a rank above `rank_limit` and for matrices that do not
    belong together. Other shapes are for the caller to compare.
    """
    specs = {spec.name: spec for spec in expected.specs}
    for pair in {pair.right: pair for pair in pairs_of(expected).values()}.values():
        if not pair.held_by(found):
            continue
        shapes = {name: found.by_name[name].shape for name in (pair.left, pair.right) if name in found.by_name}
        if any(len(shape) != 2 for shape in shapes.values()):
            continue  # told as any wrong shape
        rank = pair.rank_in(found)
        if not 1 <= rank <= min(rank_limit, specs[pair.right].shape[0]):
            raise WireError(f"Tensor {min(shapes)!r} has the rank {rank}; 1 to {rank_limit} is asked for.")
        specs[pair.left] = codec.reshaped(specs[pair.left], (specs[pair.left].shape[0], rank))
        specs[pair.right] = codec.reshaped(specs[pair.right], (rank, specs[pair.right].shape[1]))
    return TensorTable(tuple(specs[name] for name in expected.names), expected.metadata, expected.data_start, expected.file_size)

"""What a method decides on the coordinator: each device's payload, and how the updates are folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from google.protobuf.message import Message

from fleetune.coordinator.domain import Blob, Pruning, RoundPlan, UpdateKind
from fleetune.coordinator.jobsections import JobSpec
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.rounds.optimizers import AdamW, ServerOptimizer


@dataclass(frozen=True)
class RoundFacts:
    """What a method may go by when it assigns a round. `devices` are sorted by id."""

    number: int
    devices: Sequence[str]
    plan: RoundPlan | None = None
    """Who trains what; only for methods that plan."""
    depth_count: int = 0
    """Depths that the job's model has; 0 where that does not matter."""
    prunings: Sequence[Pruning] = ()
    """What each device prunes; only for methods that do."""
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """Device id -> its name, as the round's tasks hold it."""
    importance: str = ""
    """How much heads and neurons matter to the fleet; only for methods that prune."""
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    """Module -> triplets of its adapter in the state that the tasks begin with; only for methods whose adapters lose some."""


@dataclass(frozen=True)
class Initial:
    """A global state made without a model."""

    state: Blob
    trainables_digest: str


class Method(Protocol):
    """One entry of the table of methods. Holds no state: everything comes as arguments."""

    name: str
    needs_model: bool
    plans: bool
    """Whether its rounds are planned from what devices and links have shown."""
    prunes: bool
    """Whether devices cut the model while they train it."""

    def assign(self, spec: JobSpec, facts: RoundFacts) -> Mapping[str, Message]:
        """Device id -> the method's Task message. Asked again for the same facts, it answers the same."""
        ...

    def fold(self, spec: JobSpec, number: int) -> ServerOptimizer | AdamW | LoraFold | None:
        """How the mean update of round `number` is applied to the global state; None adds it as it is. AdamW takes gradients, a LoraFold
        makes one pair of matrices of many."""
        ...

    def kinds(self, spec: JobSpec) -> frozenset[UpdateKind]:
        """What an update of such a job may hold. A device does not choose: deltas are held to a norm, states are not."""
        ...

    def initial(self, spec: JobSpec, path: Path) -> Initial:
        """Write the first global state to `path`; only for methods that need no model."""
        ...

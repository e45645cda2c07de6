"""What a method decides on the coordinator: each device's payload, and how the updates are folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from google.protobuf.message import Message

from fleetune.coordinator.domain import Blob
from fleetune.coordinator.jobsections import JobSpec
from fleetune.coordinator.rounds.optimizers import ServerOptimizer


@dataclass(frozen=True)
class RoundFacts:
    """What a method may go by when it assigns a round. `devices` are sorted by id."""

    number: int
    devices: Sequence[str]


@dataclass(frozen=True)
class Initial:
    """A global state made without a model."""

    state: Blob
    trainables_digest: str


class Method(Protocol):
    """One entry of the table of methods. Holds no state: everything comes as arguments."""

    name: str
    needs_model: bool

    def assign(self, spec: JobSpec, facts: RoundFacts) -> Mapping[str, Message]:
        """Device id -> the method's Task message. Asked again for the same facts, it answers the same."""
        ...

    def fold(self, spec: JobSpec) -> ServerOptimizer | None:
        """How the mean update is applied to the global state; None adds it as it is."""
        ...

    def initial(self, spec: JobSpec, path: Path) -> Initial:
        """Write the first global state to `path`; only for methods that need no model."""
        ...

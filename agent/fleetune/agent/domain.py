"""The agent's nouns: tasks as it received them, and what became of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from fleetune.wire.basefiles import BaseFile


class TaskKind(enum.Enum):
    TRAIN = "train"
    EVALUATE = "evaluate"
    MEASURE = "measure"


@dataclass(frozen=True)
class Blob:
    """Content address: lower-case hex BLAKE3 and size."""

    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Base:
    """The frozen pretrained weights that a task starts from."""

    digest: str
    hub_id: str
    revision: str
    files: tuple[BaseFile, ...]


@dataclass(frozen=True)
class Task:
    """One task as the coordinator handed it out. `encoded` is its protobuf form, passed to the training child as it came."""

    task_id: str
    lease: int
    epoch: int
    job_id: str
    round: int
    kind: TaskKind
    method: str
    data_name: str = ""
    base: Base | None = None
    state: Blob | None = None
    keep_warm_s: float = 0.0
    # At which its update may be sent; 0 is no bound.
    uplink_bits_per_s: float = 0.0
    encoded: bytes = field(default=b"", repr=False)


class FailureKind(enum.Enum):
    """The words of the training child's protocol, and `crash` for a child that could not say any."""

    DATA = "data"
    MODEL = "model"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    DISK_FULL = "disk_full"
    CRASH = "crash"
    UNSUPPORTED = "unsupported"
    TRANSFER = "transfer"
    INTERNAL = "internal"


@dataclass(frozen=True)
class Update:
    """A finished update: a file in the outbox and the encoded UpdateReport that goes with it."""

    task_id: str
    lease: int
    epoch: int
    blob: Blob
    file_name: str
    report: bytes = field(default=b"", repr=False)
    # At which the plan has it sent; 0 is no bound. The coordinator tells others under way.
    uplink_bits_per_s: float = 0.0


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation, as an encoded Evaluation."""

    task_id: str
    lease: int
    epoch: int
    evaluation: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Measured:
    """What training costs this device, as encoded Figures."""

    task_id: str
    lease: int
    epoch: int
    figures: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Failed:
    """Why a task did not end in a result."""

    task_id: str
    lease: int
    epoch: int
    kind: FailureKind
    stage: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Refused:
    """A task that was not begun; another device may do it."""

    task_id: str
    lease: int
    epoch: int
    reason: str


Result = Update | Evaluated | Measured | Failed | Refused


class ReceiptStatus(enum.Enum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    REFUSED = "refused"


@dataclass(frozen=True)
class Receipt:
    """The coordinator's word that a result needs no resending."""

    task_id: str
    lease: int
    status: ReceiptStatus
    reason: str = ""


@dataclass(frozen=True)
class Welcome:
    """What the coordinator asked for when it opened the session."""

    heartbeat_s: float
    lease_s: float
    epoch: int
    chunk_bytes: int
    coordinator_version: str
    # An upload hears when its turn has come.
    tells_turns: bool = False

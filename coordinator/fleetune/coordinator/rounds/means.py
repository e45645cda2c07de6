"""What the parts of the engine work with, and how they tell it what came of their work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fleetune.coordinator.domain import Failure
from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.host import ModelHost
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rounds.orders import Receipt
from fleetune.coordinator.rounds.retention import Retention
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.coordinator.store.db import Database
from fleetune.errors import DiskFullError, DurabilityError, FleetuneError
from fleetune.workers import Workers


@dataclass(frozen=True)
class Means:
    """All of it is the engine's; the parts change a job only by the events that they hand in."""

    jobs: Mapping[str, LiveJob]
    blobs: BlobStore
    database: Database
    retention: Retention
    host: ModelHost
    disk: Workers
    """The one way from the event loop to blocking work that is neither database nor fold."""
    fold_thread: Workers
    """One thread, since two folds would only halve each other."""
    scratch: Path
    jobs_folder: Path
    wall: Callable[[], float]
    post: Callable[[str, machine.Event], None]
    """Hand in an event of a job."""
    ask: Callable[[str, machine.Event], Awaitable[Receipt]]
    """Hand in an event and wait until it is durable."""
    give_up: Callable[[DurabilityError], None]
    """The disk did not take it: end the process."""
    note_room: Callable[[str, str], None]
    """Who waits for room on the disk, and why; no longer where that is empty."""


def expanded(place: str) -> Path:
    """A path of a job file, with `~` as this coordinator's home."""
    return Path(place).expanduser()


def failure_of(error: FleetuneError | OSError, stage: str) -> Failure:
    return Failure("disk_full" if isinstance(error, DiskFullError) else "internal", stage, str(error))

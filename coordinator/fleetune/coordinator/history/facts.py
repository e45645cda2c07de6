"""What the checker is given, as plain rows, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fleetune.coordinator.domain import RoundEntry
from fleetune.coordinator.rounds.machine import Event, JobMachine
from fleetune.coordinator.store.records import BlobRow, UpdateRow

Rule = Literal[
    "row_unreadable",
    "round_gap",
    "rounds_disagree",
    "state_chain",
    "update_lost",
    "update_counted_twice",
    "update_row_missing",
    "update_without_event",
    "update_out_of_turn",
    "update_differs",
    "weight_differs",
    "weight_not_positive",
    "event_after_commit",
    "illegal_event",
    "lease_not_grown",
    "replay_differs",
    "folder_differs",
    "manifest_differs",
    "link_differs",
    "blob_missing",
    "blob_damaged",
    "state_not_the_fold",
    "ack_lost",
    "count_differs",
]

RULES: Mapping[Rule, str] = {
    "row_unreadable": "every row can be read",
    "round_gap": "a job's committed rounds are 1, 2, 3 and so on",
    "rounds_disagree": "the machine, the round's row and its entry tell of the same round",
    "state_chain": "a round starts from the state that the last one ended with",
    "update_lost": "an accepted update is in its round",
    "update_counted_twice": "a device's update counts once in a round",
    "update_row_missing": "what counts in a round was accepted, and its row says so",
    "update_without_event": "an accepted update has an event",
    "update_out_of_turn": "an update is accepted only for a round that was open",
    "update_differs": "event, row and entry name the same bytes",
    "weight_differs": "the weight in the round is the one that came with the update",
    "weight_not_positive": "an update's weight is above 0",
    "event_after_commit": "nothing but a late update happens to a round after its commit",
    "illegal_event": "every event is one that the round machine takes",
    "lease_not_grown": "each lease of a job is higher than the one before",
    "replay_differs": "the events, played again, lead to the stored machine and rounds",
    "folder_differs": "a round's folder holds the state that was committed",
    "manifest_differs": "a round's manifest says what its entry says",
    "link_differs": "`final` and `best` lead to the last and the best round",
    "blob_missing": "a blob that a row or an open job names is there, whole",
    "blob_damaged": "a blob's bytes have its digest",
    "state_not_the_fold": "a round's state is the weighted mean of its updates",
    "ack_lost": "an update that a device was told to be accepted is accepted",
    "count_differs": "a device's count of accepted updates is that of its rows",
}
"""Each rule in words."""


@dataclass(frozen=True)
class Violation:
    """One broken promise. `round_number` is 0 where it is about no round."""

    rule: Rule
    job_id: str
    round_number: int
    message: str

    def __str__(self) -> str:
        place = self.job_id + (f" round {self.round_number}" if self.round_number else "")
        return f"{self.rule}: {place + ': ' if place else ''}{self.message}"


@dataclass(frozen=True)
class RoundRow:
    number: int
    state_digest: str
    state_bytes: int
    entry: RoundEntry


@dataclass(frozen=True)
class Happened:
    """A row of the table of events."""

    sequence: int
    unix_s: float
    event: Event


@dataclass(frozen=True)
class RoundFolder:
    """`jobs/JOB/rounds/NNNN`. `manifest` is None where there is none that can be read."""

    number: int
    state_path: Path
    state_digest: str
    state_bytes: int
    manifest: Mapping[str, object] | None


@dataclass(frozen=True)
class JobHistory:
    """All that is stored of a job. Rounds, updates and events are in the order of the database."""

    job_id: str
    status: str
    toml: str
    machine: JobMachine
    rounds: Sequence[RoundRow] = ()
    updates: Sequence[UpdateRow] = ()
    events: Sequence[Happened] = ()
    folders: Sequence[RoundFolder] = ()
    links: Mapping[str, int] = field(default_factory=dict[str, int])
    """`best` and `final` -> the number of the round that they lead to, where they are there."""


@dataclass(frozen=True)
class BlobFile:
    """A file in `blobs/`, named by the digest that it should have."""

    path: Path
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class StateFolder:
    """A coordinator's state folder."""

    jobs: Sequence[JobHistory]
    blob_rows: Sequence[BlobRow] = ()
    blob_files: Mapping[str, BlobFile] = field(default_factory=dict[str, BlobFile])
    accepted_by_device: Mapping[str, int] = field(default_factory=dict[str, int])
    unreadable: Sequence[Violation] = ()


@dataclass(frozen=True)
class Acknowledgement:
    """A receipt as the device got it."""

    task_id: str
    digest: str
    status: str

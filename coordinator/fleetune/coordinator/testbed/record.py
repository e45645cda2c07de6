"""The record of a testbed's run: one JSON object in each line, told as it happens, so that a crash loses the last line at most.

Every line has "at_unix_s" and "what"; the dataclass of that name below says the rest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fleetune.coordinator.testbed.backend import Sample


@dataclass(frozen=True)
class Began:
    """The first line. `spec` is the TestbedSpec and `chaos` the schedule as plain data; `machine` says what played the boards."""

    what = "began"
    at_unix_s: float
    backend: str
    spec: dict[str, Any]
    chaos: list[dict[str, Any]]
    machine: dict[str, Any]
    job_id: str
    job: str
    """The job file's text."""


@dataclass(frozen=True)
class Sampled:
    """Once a second: counters by member; and the job's state word and round by `fleetune jobs --json`."""

    what = "sampled"
    at_unix_s: float
    members: dict[str, Sample]
    lives: dict[str, str]
    stages: dict[str, str]
    """Device -> what its open task is at; absent when idle. One of queued, fetching base, fetching state, loading, measuring, training,
    evaluating and uploading."""
    round_number: int
    phase: str


@dataclass(frozen=True)
class Acted:
    """A fault was made or undone."""

    what = "acted"
    at_unix_s: float
    member: str
    act: str
    """kill, restart, pause, resume, cut, mend, throttle, unthrottle, fill_disk, free_disk, out_of_memory."""
    text: str
    """In words, with figures."""


@dataclass(frozen=True)
class Ended:
    """The job's whole report as `fleetune report --json` gives it, and the devices as `fleetune devices --json` does."""

    what = "ended"
    at_unix_s: float
    status: str
    report: dict[str, Any]
    devices: list[dict[str, Any]]
    history: list[dict[str, Any]]
    """Violations that `fleetune check --json` found, where it was asked; else empty, and `Checked` comes later."""
    notes: list[str]


@dataclass(frozen=True)
class Checked:
    """After `Ended`, written when the coordinator has been stopped: what the history checker found; empty is good."""

    what = "checked"
    at_unix_s: float
    history: list[dict[str, Any]]


Record = Began | Sampled | Acted | Ended | Checked


def line(record: Record) -> str:
    """The record as its line, the newline included."""
    return json.dumps({"what": record.what, **asdict(record)}, ensure_ascii=False, allow_nan=False) + "\n"

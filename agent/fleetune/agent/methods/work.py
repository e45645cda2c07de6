"""What a method gets to do and what it hands back, in the training child."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from fleetune.v1 import messages_pb2


@dataclass(frozen=True)
class DataFile:
    """Rows on this device; `file_format` is jsonl, csv, parquet or None (by the file's ending)."""

    path: Path
    file_format: str | None


@dataclass(frozen=True)
class DeviceData:
    """Where the rows of a job's data lie on this device. Without `train` it only measures, without `validation` it only trains."""

    train: DataFile | None
    validation: DataFile | None


@dataclass(frozen=True)
class Limits:
    """What the device's owner allows. `memory_bytes` bounds the resident memory of the whole training child; None is no bound."""

    threads: int
    accelerator: str
    memory_bytes: int | None


@dataclass(frozen=True)
class Work:
    """One train or evaluate task. `out_path` is where an update goes; None for an evaluation."""

    task: messages_pb2.Task
    base_folder: Path | None
    state_path: Path
    out_path: Path | None
    data: DeviceData | None
    limits: Limits
    keep_folder: Path | None = None
    """Where a method may keep what is this device's own from round to round."""


@dataclass(frozen=True)
class Trained:
    """A finished train task: the report, and BLAKE3 (hex) and size of the update file."""

    report: messages_pb2.UpdateReport
    digest: str
    size_bytes: int


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

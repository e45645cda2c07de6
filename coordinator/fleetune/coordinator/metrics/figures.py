"""From a snapshot to the samples of every metric. Runs beside the event loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from fleetune.coordinator.domain import JobStatus, TaskStatus
from fleetune.coordinator.metrics.catalog import OTHER
from fleetune.coordinator.metrics.pace import paced
from fleetune.coordinator.metrics.shelf import ShelfFacts
from fleetune.coordinator.metrics.snapshot import JobFigures, Snapshot
from fleetune.coordinator.metrics.tally import Histogram, Key

DEVICES_SHOWN_MAX = 2000
"""Devices with series of their own, in the order of their names; a dozen series each."""

JOBS_SHOWN_MAX = 50
"""Open jobs that have had their turn, with series of their own."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)

Values = dict[tuple[str, ...], float]
"""Values of a metric's labels -> its value."""

_Worst = Literal["most", "least", "sum"]

_DEVICE: Mapping[str, _Worst] = {
    "online": "sum",
    "busy": "sum",
    "quarantined": "sum",
    "last_heard_timestamp_seconds": "least",
    "cpu_ratio": "most",
    "memory_available_bytes": "least",
    "memory_total_bytes": "least",
    "disk_free_bytes": "least",
    "temperature_celsius": "most",
    "agent_resident_memory_bytes": "most",
    "trainer_resident_memory_bytes": "most",
    "uplink_bytes_per_second": "least",
    "downlink_bytes_per_second": "least",
    "round_trip_seconds": "most",
    "certificate_expiry_timestamp_seconds": "least",
}
"""What of a device is told, and what of all those that have no series of their own: the number of them, or the worst."""

_PICK: Mapping[_Worst, Callable[[float, float], float]] = {"most": max, "least": min, "sum": lambda one, other: one + other}


@dataclass
class Figures:
    """Samples by metric; a metric that is not here has none."""

    values: dict[str, Values] = field(default_factory=dict[str, Values])
    histograms: dict[Key, Histogram] = field(default_factory=dict[Key, Histogram])

    def put(self, name: str, value: float, *labels: str) -> None:
        self.values.setdefault(f"fleetune_{name}", {})[labels] = float(value)


@dataclass(frozen=True)
class Reading:
    """What the reading of the metrics tells of itself."""

    scrapes: Mapping[int, int]
    snapshot_s: float
    render_s: float


def of(snapshot: Snapshot, shelf: ShelfFacts, reading: Reading) -> Figures:
    figures = Figures()
    figures.put("build_info", 1, snapshot.version)
    figures.put("epoch", snapshot.epoch)
    _devices(figures, snapshot)
    _jobs(figures, snapshot)
    for (name, labels), count in snapshot.counters.items():
        figures.values.setdefault(name, {})[labels] = float(count)
    figures.histograms.update(snapshot.histograms)
    _traffic(figures, snapshot)
    _store(figures, shelf)
    figures.put("disk_trouble", snapshot.trouble)
    for status, count in reading.scrapes.items():
        figures.put("scrapes_total", count, str(status))
    figures.put("scrape_snapshot_seconds", reading.snapshot_s)
    figures.put("scrape_render_seconds", reading.render_s)
    return figures


def _devices(figures: Figures, snapshot: Snapshot) -> None:
    roster = snapshot.roster
    revoked = {device_id for name, device_id in snapshot.names.items() if roster.is_revoked(device_id, name)}
    known = [(name, device_id) for name, device_id in sorted(snapshot.names.items()) if device_id not in revoked]
    ids = {device_id for _, device_id in known}
    figures.put("devices_known", len(known))
    figures.put("devices_online", len(ids & snapshot.lines.keys()))
    figures.put("devices_accepting", sum(line.session.accepts_tasks for line in snapshot.lines.values()))
    figures.put("devices_busy", len(snapshot.busy))
    figures.put("devices_quarantined", len(ids & snapshot.quarantined))
    figures.put("devices_revoked", len(revoked))
    columns = {what: figures.values.setdefault(f"fleetune_device_{what}", {}) for what in _DEVICE}
    shown = 0
    for name, device_id in paced(known):
        own = shown < DEVICES_SHOWN_MAX and NAME.fullmatch(name) is not None
        shown += own
        key = (name if own else OTHER,)
        for what, value in _device(snapshot, device_id):
            column = columns[what]
            column[key] = value if own or key not in column else _PICK[_DEVICE[what]](column[key], value)


def _device(snapshot: Snapshot, device_id: str) -> Iterable[tuple[str, float]]:
    line = snapshot.lines.get(device_id)
    yield "online", float(line is not None)
    yield "busy", float(device_id in snapshot.busy)
    yield "quarantined", float(device_id in snapshot.quarantined)
    heard_s = line.session.last_heard_s if line is not None else snapshot.left_s.get(device_id)
    if heard_s is not None:
        yield "last_heard_timestamp_seconds", snapshot.wall_s - (snapshot.monotonic_s - heard_s)
    elif device_id in snapshot.seen_unix_s:
        yield "last_heard_timestamp_seconds", snapshot.seen_unix_s[device_id]
    newest = snapshot.roster.newest_of_device(device_id)
    if newest is not None:
        yield "certificate_expiry_timestamp_seconds", newest.not_after_unix_s
    link = line.session.link if line is not None else None
    if link is not None and link.up_bits_per_s > 0:
        yield "uplink_bytes_per_second", link.up_bits_per_s / 8.0
    if link is not None and link.down_bits_per_s > 0:
        yield "downlink_bytes_per_second", link.down_bits_per_s / 8.0
    if link is not None and link.round_trip_s > 0:
        yield "round_trip_seconds", link.round_trip_s
    told = line.telemetry if line is not None else None
    if told is None:  # figures of a device that is gone would look like those of one that is there
        return
    yield "cpu_ratio", told.cpu_percent / 100.0
    yield "memory_available_bytes", float(told.memory_available_bytes)
    yield "memory_total_bytes", float(told.memory_total_bytes)
    yield "disk_free_bytes", float(told.disk_free_bytes)
    yield "agent_resident_memory_bytes", float(told.agent_rss_bytes)
    yield "trainer_resident_memory_bytes", float(told.child_rss_bytes)
    if told.HasField("temperature_c"):
        yield "temperature_celsius", told.temperature_c


def _jobs(figures: Figures, snapshot: Snapshot) -> None:
    for status in get_args(JobStatus):
        figures.put("jobs", snapshot.statuses.get(status, 0), status)
    # The newest are left out: those that were there keep their series.
    for job in snapshot.jobs[:JOBS_SHOWN_MAX]:
        _job(figures, job)
        paired = snapshot.paired.get(job.job_id)
        if paired is not None:
            figures.put("round_predicted_seconds", paired.predicted_s, job.job_id)
            figures.put("round_measured_seconds", paired.measured_s, job.job_id)


def _job(figures: Figures, job: JobFigures) -> None:
    figures.put("job_rounds_planned", job.planned, job.job_id)
    figures.put("job_rounds_committed", job.committed, job.job_id)
    for status in get_args(TaskStatus):
        figures.put("job_round_tasks", job.tasks.get(status, 0), job.job_id, status)
    if job.round_started_unix_s:
        figures.put("job_round_started_timestamp_seconds", job.round_started_unix_s, job.job_id)
    if job.moved_unix_s:
        figures.put("job_moved_timestamp_seconds", job.moved_unix_s, job.job_id)


def _traffic(figures: Figures, snapshot: Snapshot) -> None:
    figures.put("received_bytes_total", snapshot.received_bytes)
    figures.put("sent_bytes_total", snapshot.sent_bytes)
    figures.put("uploads_resumed_total", snapshot.resumed)
    figures.put("uploads_active", snapshot.receiving)
    figures.put("transfers_active", snapshot.moving)
    figures.put("transfers_waiting", snapshot.waiting)
    for (method, code), count in snapshot.calls.items():
        figures.put("calls_total", count, method, code)
    figures.put("calls_open", snapshot.calls_open)
    figures.put("refusals_total", snapshot.refusals)


def _store(figures: Figures, shelf: ShelfFacts) -> None:
    figures.put("database_bytes", shelf.database_bytes)
    figures.put("blobs", shelf.blobs.files)
    figures.put("blob_bytes", shelf.blobs.size_bytes)
    figures.put("spool_bytes", shelf.spool.size_bytes)
    figures.put("blobs_damaged", shelf.damaged.files)
    figures.put("disk_free_bytes", shelf.free_bytes)
    figures.put("disk_size_bytes", shelf.size_bytes)
    for certificate, end in shelf.expiries_unix_s.items():
        figures.put("certificate_expiry_timestamp_seconds", end, certificate)

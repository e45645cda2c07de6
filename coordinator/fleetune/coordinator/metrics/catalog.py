"""Every metric of the coordinator as a row: name, kind, labels, help. The exposition, the docs and the tests read the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]

OTHER = "_other"
"""The device or job that stands for all beyond the cap; no name begins with an underscore."""


@dataclass(frozen=True)
class Metric:
    """One metric. Its unit is the end of its name, as Prometheus has it; a counter's name ends in _total."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


def _gauge(name: str, help_: str, *labels: str) -> Metric:
    return Metric(f"fleetune_{name}", "gauge", help_, labels)


def _counter(name: str, help_: str, *labels: str) -> Metric:
    return Metric(f"fleetune_{name}_total", "counter", help_, labels)


def _histogram(name: str, help_: str, *labels: str) -> Metric:
    return Metric(f"fleetune_{name}", "histogram", help_, labels)


CATALOG: tuple[Metric, ...] = (
    # the coordinator
    _gauge("build_info", "1, with the version that runs.", "version"),
    _gauge("epoch", "Grows by one with each restore of a backup."),
    # the fleet
    _gauge("devices_known", "Devices that have ever connected and are not revoked."),
    _gauge("devices_online", "Devices with a live session."),
    _gauge("devices_accepting", "Devices with a live session whose owner's limits let them train now."),
    _gauge("devices_busy", "Devices that hold an open task."),
    _gauge("devices_quarantined", "Devices that get no tasks until an operator releases them."),
    _gauge("devices_revoked", "Devices none of whose certificates is taken any more."),
    # each device, as its last heartbeat says
    _gauge("device_online", "1 with a live session, else 0.", "device"),
    _gauge("device_busy", "1 while the device holds an open task, else 0.", "device"),
    _gauge("device_quarantined", "1 in quarantine, else 0.", "device"),
    _gauge("device_last_heard_timestamp_seconds", "When the last message of the device came, Unix time.", "device"),
    _gauge("device_cpu_ratio", "CPU in use, 0 to 1 over all cores that the agent may use.", "device"),
    _gauge("device_memory_available_bytes", "Memory that the device has left.", "device"),
    _gauge("device_memory_total_bytes", "Memory that the agent may use.", "device"),
    _gauge("device_disk_free_bytes", "Room on the disk of the agent's state.", "device"),
    _gauge("device_temperature_celsius", "Hottest sensor; absent where none can be read.", "device"),
    _gauge("device_agent_resident_memory_bytes", "Memory of the agent's daemon.", "device"),
    _gauge("device_trainer_resident_memory_bytes", "Memory of the agent's training child, 0 while there is none.", "device"),
    _gauge("device_uplink_bytes_per_second", "What its link carries towards the coordinator; absent where it is not known.", "device"),
    _gauge("device_downlink_bytes_per_second", "What its link carries to it; absent where it is not known.", "device"),
    _gauge("device_round_trip_seconds", "From the device to the coordinator and back; absent where it is not known.", "device"),
    _gauge("device_certificate_expiry_timestamp_seconds", "When the newest certificate of the device ends, Unix time.", "device"),
    # jobs
    _gauge("jobs", "Jobs by status.", "status"),
    _counter("jobs_ended", "Jobs that have ended since the start, by status.", "status"),
    _gauge("job_rounds_planned", "Rounds that the open job asks for.", "job_id"),
    _gauge("job_rounds_committed", "Rounds that the open job has committed.", "job_id"),
    _gauge("job_round_started_timestamp_seconds", "When the open round of the job began, Unix time; absent between rounds.", "job_id"),
    _gauge("job_moved_timestamp_seconds", "When anything of the running job last moved, Unix time.", "job_id"),
    _gauge("job_round_tasks", "Tasks of the job's open round by status.", "job_id", "status"),
    # rounds, since the start
    _counter("rounds_committed", "Rounds committed since the start."),
    _counter("rounds_abandoned", "Rounds given up since the start."),
    _histogram("round_duration_seconds", "Seconds from the opening of a round to its commit."),
    _histogram("round_phase_duration_seconds", "Seconds of a round's phases: measuring, training, folding, evaluating.", "phase"),
    _gauge("round_predicted_seconds", "What the planner expected of the job's last committed round that it had planned.", "job_id"),
    _gauge("round_measured_seconds", "What that same round took.", "job_id"),
    _counter("tasks_sent", "Tasks given to devices, by kind; repeats count.", "kind"),
    _counter("tasks_resent", "Of those, tasks that had been given before in the same round.", "kind"),
    _counter("task_failures", "Tasks that ended with a failure, by its kind.", "kind"),
    _counter("task_refusals", "Tasks that a device refused because of its owner's limits."),
    _counter("updates", "Updates by what became of them: accepted, late, damaged on the disk.", "outcome"),
    # bytes and calls, since the start
    _counter("received_bytes", "Bytes of updates that came in, those that were sent again counted again."),
    _counter("sent_bytes", "Bytes of states, base files and adapters that went out."),
    _counter("uploads_resumed", "Uploads that went on at an offset after a cut."),
    _gauge("uploads_active", "Updates on their way in, those that wait for the disk included."),
    _gauge("transfers_active", "Transfers of either direction that move bytes."),
    _gauge("transfers_waiting", "Transfers that wait for their turn."),
    _counter("calls", "Ended calls by method and gRPC status.", "method", "code"),
    _gauge("calls_open", "Open calls of all callers, streams included."),
    _counter("refusals", "Calls and messages that asked for what is not their caller's, or came too often."),
    # the store
    _gauge("database_bytes", "Size of the database with its write-ahead log."),
    _gauge("blobs", "Blobs in the store; looked at every 10 s at most."),
    _gauge("blob_bytes", "Bytes of the blobs in the store; looked at every 10 s at most."),
    _gauge("spool_bytes", "Bytes of uploads that are not whole; looked at every 10 s at most."),
    _gauge("blobs_damaged", "Blobs that no longer had their digest and wait for a person."),
    _gauge("disk_free_bytes", "Room on the disk of the state folder for this process."),
    _gauge("disk_size_bytes", "Size of the disk of the state folder."),
    _gauge("disk_trouble", "1 while want of room on the disk holds work up, else 0."),
    # certificates of the coordinator's own
    _gauge("certificate_expiry_timestamp_seconds", "When a certificate ends, Unix time: coordinator, authority.", "certificate"),
    # the reading of the metrics itself
    _counter("scrapes", "HTTP requests for metrics by status; 0 is one that was cut before it could be answered.", "status"),
    _gauge("scrape_snapshot_seconds", "What the reading before this one took of the event loop."),
    _gauge("scrape_render_seconds", "What the reading before this one took beside the event loop."),
)

BY_NAME = {metric.name: metric for metric in CATALOG}

PHASES = ("measuring", "training", "folding", "evaluating")
DURATION_BOUNDS_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0)


def reference() -> str:
    """The rows as a table of Markdown, for the reference page."""
    lines = ["| metric | kind | labels | what it is |", "| --- | --- | --- | --- |"]
    for row in CATALOG:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        lines.append(f"| `{row.name}` | {row.kind} | {labels} | {row.help} |".replace("  ", " "))
    return "\n".join(lines) + "\n"

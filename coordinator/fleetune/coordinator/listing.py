"""Jobs, devices and log lines as tables."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from fleetune.coordinator.figures import bytes_text, count_text, duration_text, metric_text
from fleetune.coordinator.watch import best_round, metric_of, state_style, state_word, work_text
from fleetune.v1 import control_pb2 as pb
from fleetune.v1 import registry_pb2

CERTIFICATE_COLUMNS = 130
"""Below it, how long a certificate is good gives way to what the device does; `--json` tells it always."""

LINK_COLUMNS = 120
FIGURES_COLUMNS = 170
"""From here on there is room for how old the link's figures are and what a training step takes; `--json` always tells all of it."""


def jobs(found: Sequence[pb.JobView], *, now_unix_s: float) -> RenderableType:
    """One row a job, in the order given."""
    table = _table("job", "name", "state", "rounds", "method", "age", "time", Column("", overflow="ellipsis", no_wrap=True))
    for job in found:
        start = job.started_unix_s or job.submitted_unix_s
        table.add_row(
            job.job_id,
            job.name,
            Text(state_word(job.state), style=state_style(job.state)),
            f"{job.rounds_committed}/{job.rounds_total}",
            job.method,
            duration_text(max(0.0, now_unix_s - job.submitted_unix_s)),
            duration_text(max(0.0, (job.ended_unix_s or now_unix_s) - start)),
            Text(job.message or _best(job), style="dim"),
        )
    return table


def _best(job: pb.JobView) -> str:
    best = best_round(job)
    value = metric_of(best.metrics, job.metric) if best is not None else None
    return f"best {job.metric} {metric_text(job.metric, value)}" if value is not None else ""


def devices(found: Sequence[pb.DeviceView], *, now_unix_s: float, width: int) -> RenderableType:
    """One row a device, those online first; details beyond 100 columns."""
    wide = width >= 100
    heads = ["device", "state", "cores", "memory", "accelerator", "temp", "done", "failed"]
    heads += ["board", "data", "tags"] if wide else []
    heads += ["up/down Mbit/s"] if width >= LINK_COLUMNS else []
    heads += ["certificate"] if wide and width >= CERTIFICATE_COLUMNS else []
    heads += ["link known", "step"] if width >= FIGURES_COLUMNS else []
    table = _table(*heads, "seen")
    for device in sorted(found, key=lambda item: (not item.online, item.name)):
        profile, telemetry = device.profile, device.telemetry
        available = telemetry.memory_available_bytes or profile.memory_available_bytes
        cells: list[str | Text] = [device.name, _device_state(device), f"{profile.cores:g}" if profile.cores else "-"]
        cells.append(f"{bytes_text(available)} of {bytes_text(profile.memory_total_bytes)}" if wide else bytes_text(available))
        cells.append(profile.accelerator_name or profile.accelerator or "-")
        cells.append(f"{telemetry.temperature_c:.0f} °C" if telemetry.HasField("temperature_c") else "-")
        cells += [str(device.updates_accepted), str(device.failures) if device.failures else "-"]
        if wide:
            cells += [profile.board or profile.machine or "-", ", ".join(_data_words(device)) or "-", ", ".join(device.tags) or "-"]
            cells += [_link(device)] if width >= LINK_COLUMNS else []
            cells += [_until(device.certificate_until_unix_s, now_unix_s)] if width >= CERTIFICATE_COLUMNS else []
            cells += [_link_age(device), _step(device)] if width >= FIGURES_COLUMNS else []
        seen = "now" if device.online else f"{duration_text(max(0.0, now_unix_s - device.last_seen_unix_s))} ago"
        table.add_row(*cells, seen if device.last_seen_unix_s or device.online else "never")
    return table


def _link(device: pb.DeviceView) -> str:
    """Payload rates and the round trip: "5.2/48, 8 ms", with "?" for what is not known."""
    link = device.link
    rates = [f"{rate / 1e6:.3g}" if rate < 1e9 else f"{rate / 1e6:.0f}" for rate in (link.up_bits_per_s, link.down_bits_per_s)]
    words = ["/".join(text if text != "0" else "?" for text in rates)] if rates != ["0", "0"] else []
    words += [duration_text(link.round_trip_s)] if link.round_trip_s >= 0.0005 else []
    words += ["metered"] if link.metered else []
    return ", ".join(words) or "-"


def _link_age(device: pb.DeviceView) -> str:
    """Where the rates come from, and how old they were when the device told them."""
    if not device.link.source:
        return "-"
    return device.link.source if device.link.source == "configured" else f"{device.link.source} {duration_text(device.link.age_s)} ago"


def _step(device: pb.DeviceView) -> str:
    """Seconds of a training step from the shallowest to the deepest, as measured for its newest planned job."""
    if not device.figures.step_s:
        return "-"
    first, last = device.figures.step_s[0], device.figures.step_s[-1]
    return f"{duration_text(first)} to {duration_text(last)}, {count_text(device.figures.batch_rows, 'row')}"


def _data_words(device: pb.DeviceView) -> list[str]:
    """Its data names, and of each what it lacks; a coordinator from before the two lists tells neither."""
    told = bool(device.train_data_names or device.validation_data_names)
    words: list[str] = []
    for name in device.data_names:
        if told and name not in device.train_data_names:
            name += " (validation only)"
        elif told and name not in device.validation_data_names:
            name += " (train only)"
        words.append(name)
    return words


def _device_state(device: pb.DeviceView) -> Text:
    if device.revoked:
        return Text("revoked", style="red")
    if device.quarantine:
        return Text("in quarantine", style="red")
    if not device.online:
        return Text("offline", style="yellow")
    if device.task_id:
        return Text(work_text(device.task) if device.HasField("task") else "at work", style="cyan")
    if not device.availability.accepts_tasks:
        return Text(f"not now: {device.availability.reason}" if device.availability.reason else "not now", style="yellow")
    return Text("ready", style="green")


def _until(unix_s: float, now_unix_s: float) -> str | Text:
    """How long something is still good."""
    if not unix_s:
        return "-"
    left_s = unix_s - now_unix_s
    return Text("ended", style="red") if left_s <= 0 else f"{duration_text(left_s)} left"


def tokens(found: Sequence[registry_pb2.TokenView], *, now_unix_s: float) -> RenderableType:
    """One row a token, in the order given."""
    table = _table("id", "for", "name", "uses left", "state", "made", "by")
    for token in found:
        kind = "devices" if token.kind == registry_pb2.IDENTITY_KIND_AGENT else f"operators, {_role_word(token.role)}"
        state: str | Text = _until(token.expires_unix_s, now_unix_s)
        if token.revoked:
            state = Text("revoked", style="red")
        elif not token.uses_left:
            state = Text("used up", style="yellow")
        name = (token.name or "any") + (", replaces" if token.replace else "")
        age = f"{duration_text(max(0.0, now_unix_s - token.created_unix_s))} ago"
        table.add_row(token.token_id, kind, name, str(token.uses_left), state, age, token.creator)
    return table


def operators(found: Sequence[registry_pb2.CertificateView], *, now_unix_s: float) -> RenderableType:
    """One row an operator: its newest certificate."""
    table = _table("operator", "role", "certificate", "since")
    for view in found:
        state: str | Text = Text("revoked", style="red") if view.revoked_unix_s else _until(view.not_after_unix_s, now_unix_s)
        since = time.strftime("%Y-%m-%d", time.gmtime(view.not_before_unix_s))
        table.add_row(view.name, _role_word(view.role), state, since)
    return table


def _role_word(role: registry_pb2.Role.ValueType) -> str:
    return {registry_pb2.ROLE_VIEW: "view", registry_pb2.ROLE_OPERATE: "operate", registry_pb2.ROLE_ADMIN: "admin"}.get(role, "-")


def log_lines(lines: Sequence[pb.LogLine]) -> Text:
    """Time, device and round before each line, as a log reader expects."""
    width = max(len(line.device_name) for line in lines)
    text = Text()
    for line in lines:
        clock = time.strftime("%H:%M:%S", time.localtime(line.unix_s))
        text.append(f"{clock}  {line.device_name:<{width}}  r{line.round}  ", style="dim")
        text.append(line.text.rstrip("\n") + "\n")
    text.right_crop(1)
    return text


def audit(entries: Sequence[pb.AuditEntry]) -> RenderableType:
    """One row for each thing asked, in the order given."""
    table = _table("time", "who", "asked for", "about", "outcome", Column("", overflow="fold"))
    for entry in entries:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.unix_s))
        style = "yellow" if entry.outcome == "refused" else "green"
        cells = [entry.actor, entry.action, entry.subject or "-"]
        table.add_row(Text(clock, style="dim"), *(Text(cell) for cell in cells), Text(entry.outcome, style=style), Text(entry.detail))
    return table


def _table(*heads: str | Column) -> Table:
    columns = [head if isinstance(head, Column) else Column(head, no_wrap=True, overflow="ellipsis") for head in heads]
    return Table(*columns, box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))


def garbage(found: pb.CollectGarbageResponse, *, dry_run: bool) -> str:
    """One sentence: what went, or would go, and how much room that gives."""
    parts = [
        f"{count} {what} ({bytes_text(size)})"
        for count, what, size in (
            (found.blobs, "blobs", found.blob_bytes),
            (found.folders, "round folders", found.folder_bytes),
            (found.spools, "broken uploads", found.spool_bytes),
            (found.damaged, "damaged blobs", found.damaged_bytes),
        )
        if count
    ]
    if found.rows:
        parts.append(f"{found.rows} records of missing blobs")
    if not parts:
        return "nothing to clear away"
    freed = bytes_text(found.blob_bytes + found.folder_bytes + found.spool_bytes + found.damaged_bytes)
    return f"{'would clear away' if dry_run else 'cleared away'} {', '.join(parts)}: {freed}"

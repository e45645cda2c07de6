"""What became of a job: its rounds, the devices' shares, its failures, as tables or as JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fleetune.coordinator.figures import bytes_text, count_text, duration_text, metric_text
from fleetune.coordinator.jsonview import Json, enum_word, message_json
from fleetune.coordinator.watch import (
    base_words,
    best_round,
    metric_name,
    metric_of,
    notes_of,
    problem_text,
    rounds_table,
    state_style,
    state_word,
    trained_by,
)
from fleetune.v1 import control_pb2 as pb


@dataclass(frozen=True)
class DeviceShare:
    """What one device gave to a job."""

    device: str
    rounds_asked: int
    rounds_done: int
    samples: int
    share: float
    """Of all samples folded, 0 to 1."""
    failed: int
    missed: int
    late: int
    refused: int


def device_shares(job: pb.JobView) -> list[DeviceShare]:
    """Each device's part in the committed rounds that tell their tasks (`tasks_since_round`), the largest first."""
    asked: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    ends: dict[str, Counter[int]] = {}
    for task in (task for item in job.history for task in trained_by(item)):
        asked[task.device_name] += 1
        ends.setdefault(task.device_name, Counter())[task.state] += 1
        if task.state == pb.DEVICE_TASK_STATE_DONE:
            samples[task.device_name] += task.samples
    total = sum(samples.values())
    shares = [
        DeviceShare(
            device=name,
            rounds_asked=asked[name],
            rounds_done=ends[name][pb.DEVICE_TASK_STATE_DONE],
            samples=samples[name],
            share=samples[name] / total if total else 0.0,
            failed=ends[name][pb.DEVICE_TASK_STATE_FAILED],
            missed=ends[name][pb.DEVICE_TASK_STATE_MISSED],
            late=ends[name][pb.DEVICE_TASK_STATE_LATE],
            refused=ends[name][pb.DEVICE_TASK_STATE_REFUSED],
        )
        for name in asked
    ]
    return sorted(shares, key=lambda share: (-share.samples, share.device))


@dataclass(frozen=True)
class DevicePlan:
    """What plans said of one device, and what came of it. Seconds from a round's training start to the end of the device's upload."""

    device: str
    rounds_planned: int
    """Rounds in which it had a part."""
    rounds_seen: int
    """Those of them whose end was seen."""
    predicted_s: float | None
    """Median, as the two below."""
    actual_s: float | None
    error: float | None
    """|actual - predicted| by predicted."""


def device_plans(job: pb.JobView) -> list[DevicePlan]:
    """Predicted against actual for every device that a plan had a part for."""
    parts: dict[str, list[pb.TaskPlan]] = {}
    for task in (task for item in job.history for task in trained_by(item) if task.HasField("plan")):
        parts.setdefault(task.device_name, []).append(task.plan)
    found: list[DevicePlan] = []
    for name, own in sorted(parts.items()):
        seen = [part for part in own if part.HasField("actual_finish_s")]
        found.append(
            DevicePlan(
                name,
                len(own),
                len(seen),
                _median([part.predicted_finish_s for part in seen]),
                _median([part.actual_finish_s for part in seen]),
                _median([_error(part.predicted_finish_s, part.actual_finish_s) for part in seen]),
            )
        )
    return found


def round_errors(job: pb.JobView) -> list[float]:
    """Of every planned round whose end was seen: |actual - predicted| by predicted."""
    return [_error(item.plan.predicted_s, item.plan.actual_s) for item in job.history if item.plan.HasField("actual_s")]


def _error(predicted_s: float, actual_s: float) -> float:
    return abs(actual_s - predicted_s) / predicted_s if predicted_s > 0 else 0.0


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def report_json(job: pb.JobView) -> dict[str, Json]:
    """The job as it is, with the devices' shares and the failures beside."""
    shares: list[Json] = [dict(asdict(share)) for share in device_shares(job)]
    failures: list[Json] = [
        {
            "round": item.round,
            "device": task.device_name,
            "state": enum_word("DeviceTaskState", pb.DeviceTaskState.Name(task.state)),
            **_failure(task),
        }
        for item in job.history
        for task in item.tasks
        if problem_text(task)
    ]
    document: dict[str, Json] = {**message_json(job), "devices": shares, "failures": failures}
    if any(item.HasField("plan") for item in job.history):
        document["plans"] = {"devices": [dict(asdict(one)) for one in device_plans(job)], "round_error": _median(round_errors(job))}
    return document


def _failure(task: pb.DeviceTask) -> dict[str, Json]:
    view = message_json(task.failure)
    return {name: view[name] for name in ("kind", "stage", "message", "traceback")}


def report(job: pb.JobView, *, now_unix_s: float, width: int) -> RenderableType:
    """The report as a person reads it; pure."""
    parts: list[RenderableType] = [_facts(job, now_unix_s)]
    if job.history:
        parts += [Text(), rounds_table(job, width=width)]
    shares = device_shares(job)
    if shares:
        parts += [Text(), _shares_table(shares)]
    planned = device_plans(job)
    if planned:
        parts += [Text(), _plans_table(planned)]
        errors = round_errors(job)
        if errors:
            middle = statistics.median(errors)
            parts.append(Text(f"rounds: training took {middle:.0%} more or less than predicted (median of {len(errors)})", style="dim"))
        if reason := next((item.plan.reason for item in reversed(job.history) if item.plan.reason), ""):
            parts.append(Text(reason, style="dim"))
    if job.tasks_since_round:
        note = f"what each device did is told from round {job.tasks_since_round} on; the job has more rounds than an answer holds in full"
        parts += [Text(note, style="dim")]
    limited = {task.device_name: (item.round, text) for item in job.history for task in item.tasks for text in notes_of([task])}
    if limited:
        parts += [Text(), Text("devices whose memory chose for them, as of the last such round", style="bold")]
        parts += [Text(f"  round {number}: {text}") for number, text in list(limited.values())[:20]]
    problems = [(item.round, text) for item in job.history for task in item.tasks if (text := problem_text(task))]
    if problems:
        parts += [Text(), Text(f"{count_text(len(problems), 'device task')} without a result", style="bold")]
        parts += [Text(f"  round {number}: {text}") for number, text in problems[:20]]
        if len(problems) > 20:
            parts.append(Text(f"  and {len(problems) - 20} more (--json shows all)", style="dim"))
    if job.failure.traceback:
        parts += [
            Text(),
            Text(f"traceback of {job.failed_device or 'the coordinator'}", style="bold"),
            Text(job.failure.traceback.rstrip(), style="dim"),
        ]
    return Group(*parts)


def _facts(job: pb.JobView, now_unix_s: float) -> RenderableType:
    grid = Table.grid(Column(style="dim", no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    grid.add_row("job", Text.assemble((job.name, "bold"), f"  {job.job_id}"))
    state = Text(state_word(job.state), style=f"bold {state_style(job.state)}")
    grid.add_row("state", Text.assemble(state, f": {job.message}" if job.message else ""))
    grid.add_row("method", " · ".join(part for part in (job.method, job.model_task) if part))
    if job.base:
        grid.add_row("base", base_words(job.base))
    rounds = f"{job.rounds_committed} of {job.rounds_total} committed"
    start = job.started_unix_s or job.submitted_unix_s
    grid.add_row("rounds", f"{rounds}, {duration_text(max(0.0, (job.ended_unix_s or now_unix_s) - start))}" if start else rounds)
    name = metric_name(job)
    before, best = metric_of(job.initial_metrics, name), best_round(job)
    last = metric_of(job.history[-1].metrics, name) if job.history else None
    if last is not None:
        text = metric_text(name, last) if before is None else f"{metric_text(name, before)} before, {metric_text(name, last)} after"
        grid.add_row(name.replace("_", " "), text)
    if best is not None:
        own = job.metric or "loss"
        grid.add_row("best round", f"{best.round} ({own.replace('_', ' ')} {metric_text(own, metric_of(best.metrics, own))})")
    grid.add_row("bytes", f"up {bytes_text(job.upload_bytes)}, down {bytes_text(job.download_bytes)}")
    errors = [(item.round, value) for item in job.history if (value := metric_of(item.fold_metrics, "aggregation_error")) is not None]
    if errors:
        worst, value = max(errors, key=lambda error: error[1])
        text = f"{errors[-1][1]:.1%} of the exact mean in the last round; at most {value:.1%}, in round {worst}"
        grid.add_row("aggregation error", text)
    if job.adapter_folder:
        grid.add_row("adapter", f"{job.adapter_folder}  (on the coordinator; `fleetune export {job.job_id} DIR` copies it)")
    return grid


def _device_table(*heads: str) -> Table:
    """A row for each device, figures to the right."""
    figures = (Column(head, justify="right", no_wrap=True) for head in heads)
    return Table(Column("device", no_wrap=True), *figures, box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))


def _plans_table(plans: list[DevicePlan]) -> RenderableType:
    table = _device_table("planned", "predicted", "took", "off by")
    for item in plans:
        times = [duration_text(value) if value is not None else "-" for value in (item.predicted_s, item.actual_s)]
        error = f"{item.error:.0%}" if item.error is not None else "-"
        table.add_row(item.device, count_text(item.rounds_planned, "round"), *times, error)
    return table


def _shares_table(shares: list[DeviceShare]) -> RenderableType:
    table = _device_table("rounds", "samples", "share", "failed", "missed", "late", "refused")
    for item in shares:
        ends = [str(count) if count else "-" for count in (item.failed, item.missed, item.late, item.refused)]
        table.add_row(item.device, f"{item.rounds_done}/{item.rounds_asked}", f"{item.samples:,}", f"{item.share:.1%}", *ends)
    return table

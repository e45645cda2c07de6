"""Between the coordinator's own types and the messages that travel."""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence

from fleetune.complaints import Complaint
from fleetune.coordinator.domain import (
    Blob,
    DeviceFigures,
    Evaluation,
    Failure,
    FailureKind,
    JobStatus,
    LinkFigures,
    Metrics,
    Phase,
    PlannedPart,
    Pruning,
    RoundEntry,
    RoundPlan,
    TaskEntry,
    TaskKind,
    TaskStatus,
    Update,
)
from fleetune.coordinator.registry import Greeting
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rounds.orders import Order, Receipt
from fleetune.coordinator.rpc import ownership
from fleetune.v1 import blob_pb2, control_pb2, fleet_pb2, messages_pb2
from fleetune.wire import channel

ANSWER_BYTES_MAX = channel.MESSAGE_BYTES_MAX * 3 // 4
"""Of the growing part of an answer: the whole must fit into a message."""

CURRENT_BYTES_MAX = channel.MESSAGE_BYTES_MAX // 8
"""Of the open round, or the last one, in the view of a job."""

ROWS_MAX = 2**40
"""Rows of one evaluation; more is a mistake, and sums of them must fit into their field."""

TEXT_CHARS_MAX = 2000
TASK_ID_CHARS_MAX = 300
TRACEBACK_CHARS_MAX = 8192

_RECEIPTS: Mapping[str, messages_pb2.ReceiptStatus.ValueType] = {
    "accepted": messages_pb2.RECEIPT_STATUS_ACCEPTED,
    "duplicate": messages_pb2.RECEIPT_STATUS_DUPLICATE,
    "late": messages_pb2.RECEIPT_STATUS_LATE,
    "refused": messages_pb2.RECEIPT_STATUS_REFUSED,
}
_FAILURES: Mapping[messages_pb2.FailureKind.ValueType, FailureKind] = {
    messages_pb2.FAILURE_KIND_DATA: "data",
    messages_pb2.FAILURE_KIND_MODEL: "model",
    messages_pb2.FAILURE_KIND_OUT_OF_MEMORY: "out_of_memory",
    messages_pb2.FAILURE_KIND_NOT_FINITE: "not_finite",
    messages_pb2.FAILURE_KIND_DISK_FULL: "disk_full",
    messages_pb2.FAILURE_KIND_CRASH: "crash",
    messages_pb2.FAILURE_KIND_UNSUPPORTED: "unsupported",
    messages_pb2.FAILURE_KIND_TRANSFER: "transfer",
    messages_pb2.FAILURE_KIND_INTERNAL: "internal",
}
_FAILURES_BACK: Mapping[FailureKind, messages_pb2.FailureKind.ValueType] = {
    **{kind: number for number, kind in _FAILURES.items()},
    "stalled": messages_pb2.FAILURE_KIND_TRANSFER,
    "norm": messages_pb2.FAILURE_KIND_NOT_FINITE,
}
_STATES: Mapping[JobStatus, control_pb2.JobState.ValueType] = {
    "queued": control_pb2.JOB_STATE_QUEUED,
    "preparing": control_pb2.JOB_STATE_PREPARING,
    "waiting": control_pb2.JOB_STATE_WAITING,
    "running": control_pb2.JOB_STATE_RUNNING,
    "paused": control_pb2.JOB_STATE_PAUSED,
    "completed": control_pb2.JOB_STATE_COMPLETED,
    "failed": control_pb2.JOB_STATE_FAILED,
    "cancelled": control_pb2.JOB_STATE_CANCELLED,
}
_KINDS: Mapping[TaskKind, messages_pb2.TaskKind.ValueType] = {
    "train": messages_pb2.TASK_KIND_TRAIN,
    "evaluate": messages_pb2.TASK_KIND_EVALUATE,
    "measure": messages_pb2.TASK_KIND_MEASURE,
}
_PHASES: Mapping[Phase, control_pb2.RoundPhase.ValueType] = {
    "measuring": control_pb2.ROUND_PHASE_MEASURING,
    "training": control_pb2.ROUND_PHASE_TRAINING,
    "folding": control_pb2.ROUND_PHASE_FOLDING,
    "evaluating": control_pb2.ROUND_PHASE_EVALUATING,
    "committed": control_pb2.ROUND_PHASE_COMMITTED,
}
_TASK_STATES: Mapping[TaskStatus, control_pb2.DeviceTaskState.ValueType] = {
    "assigned": control_pb2.DEVICE_TASK_STATE_ASSIGNED,
    "done": control_pb2.DEVICE_TASK_STATE_DONE,
    "failed": control_pb2.DEVICE_TASK_STATE_FAILED,
    "refused": control_pb2.DEVICE_TASK_STATE_REFUSED,
    "missed": control_pb2.DEVICE_TASK_STATE_MISSED,
}


def clean(text: str, limit: int = TEXT_CHARS_MAX) -> str:
    """Text from the network without control characters (new lines stay), bounded."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text[:limit])


def line(text: str, limit: int) -> str:
    """As `clean`, without new lines and tabs, for what is shown or logged on one line."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


# --- from agents


def greeting(hello: fleet_pb2.Hello, address: str) -> Greeting:
    train_names, validation_names = rows_of(hello)
    return Greeting(
        device_id=hello.device_id,
        name=hello.device_name,
        instance_id=hello.instance_id,
        tags=frozenset(hello.tags),
        data_names=frozenset(hello.data_names),
        train_data_names=frozenset(train_names),
        validation_data_names=frozenset(validation_names),
        methods=frozenset(hello.methods),
        accepts_tasks=hello.availability.accepts_tasks,
        reason=line(hello.availability.reason, 200),
        address=address,
        link=link(hello.link) if hello.HasField("link") else LinkFigures(),
        hardware=hardware(hello),
    )


HARDWARE_TAG = "class:"
"""A device's tag that begins so names its class of hardware."""


def hardware(hello: fleet_pb2.Hello) -> str:
    """The device's class of hardware: by its tag, else its board, its accelerator or its kind of processor; devices of one class get one
    pruned model."""
    tagged = sorted(tag.removeprefix(HARDWARE_TAG) for tag in hello.tags if tag.startswith(HARDWARE_TAG) and tag != HARDWARE_TAG)
    profile = hello.profile
    found = tagged[:1] or [profile.board or profile.accelerator_name or profile.machine or "unknown"]
    return line(found[0].strip(), PROFILE_CHARS_MAX)


CORES_MAX = 4096.0
BYTES_MAX = 2**50
"""A pebibyte: no board has more memory or disk, and sums of it fit everywhere."""

PROFILE_CHARS_MAX = 100


def sober(hello: fleet_pb2.Hello) -> None:
    """Take from what a device says of itself whatever no machine can be, in place: it is kept, shown, and planned with.

    Its names are for the fleet service to refuse; here are texts for people, numbers, and fields that nobody knows.
    """
    hello.DiscardUnknownFields()
    hello.agent_version = line(hello.agent_version, 40)
    hello.availability.reason = line(hello.availability.reason, 200)
    profile = hello.profile
    for text in ("machine", "system", "python_version", "accelerator", "accelerator_name", "board"):
        setattr(profile, text, line(getattr(profile, text), PROFILE_CHARS_MAX))
    for number in ("memory_total_bytes", "memory_available_bytes", "disk_free_bytes", "accelerator_memory_bytes"):
        setattr(profile, number, min(getattr(profile, number), BYTES_MAX))
    profile.cores = _between(profile.cores, 0.0, CORES_MAX)
    if hello.HasField("link"):
        hello.link.CopyFrom(link_message(link(hello.link)))


def sober_heartbeat(heartbeat: fleet_pb2.Heartbeat, device_id: str) -> None:
    """As `sober`, for what is kept of each device between its heartbeats."""
    heartbeat.DiscardUnknownFields()
    heartbeat.cpu_percent = _between(heartbeat.cpu_percent, 0.0, 100.0)
    if heartbeat.HasField("temperature_c"):
        heartbeat.temperature_c = _between(heartbeat.temperature_c, -100.0, 300.0)
    for number in ("memory_available_bytes", "memory_total_bytes", "agent_rss_bytes", "child_rss_bytes", "disk_free_bytes"):
        setattr(heartbeat, number, min(getattr(heartbeat, number), BYTES_MAX))
    if len(heartbeat.task_id) > TASK_ID_CHARS_MAX or ownership.device_of(heartbeat.task_id) != device_id:
        heartbeat.task_id = ""
    if heartbeat.HasField("link"):
        heartbeat.link.CopyFrom(link_message(link(heartbeat.link)))


def _between(value: float, least: float, most: float) -> float:
    return least if math.isnan(value) else min(max(value, least), most)


def rows_of(hello: fleet_pb2.Hello) -> tuple[Sequence[str], Sequence[str]]:
    """Data names with rows to train on and with rows to measure on; an agent of minor 0 does not tell, and is taken to have both."""
    if not hello.train_data_names and not hello.validation_data_names:
        return hello.data_names, hello.data_names
    return hello.train_data_names, hello.validation_data_names


def failure(message: messages_pb2.Failure) -> Failure:
    kind = _FAILURES.get(message.kind, "internal")
    return Failure(kind, line(message.stage, 40), clean(message.message), clean(message.traceback, TRACEBACK_CHARS_MAX))


def evaluation(message: messages_pb2.Evaluation) -> Evaluation:
    return Evaluation(metrics(message.metrics), min(message.rows, ROWS_MAX))


def update(header: blob_pb2.UploadHeader) -> Update:
    report = header.report
    return Update(
        Blob(header.blob.digest, header.blob.size_bytes),
        report.samples,
        metrics(report.metrics),
        metrics(report.seconds),
        report.peak_rss_bytes,
        figures=figures(report.figures) if report.HasField("figures") else None,
        report=report.payload.value,
    )


DEPTHS_MAX = 512
"""Of a model that a device tells figures of."""

STEP_S_MAX = 1e6
RATE_MAX = 1e15
"""Bits or floating-point operations a second: above any machine of these years."""

DIGITS = 6
"""Kept of a measured number; the figures of a whole fleet are written with each change of a job."""

SOURCES = ("measured", "configured")


def figures(message: messages_pb2.Figures) -> DeviceFigures | None:
    """What a device tells of itself, as far as a machine can be so; None where it cannot be read as times and sizes by depth.

    Times and sizes that fall with depth are raised to the ones before: a deeper step contains the shallower ones.
    """
    count = len(message.step_s)
    if not 1 <= count <= DEPTHS_MAX or len(message.step_bytes) != count:
        return None
    if not all(math.isfinite(value) and 0 < value <= STEP_S_MAX for value in message.step_s):
        return None
    return DeviceFigures(
        batch_rows=min(max(message.batch_rows, 1), 65_536),
        step_s=tuple(itertools.accumulate(map(_rounded, message.step_s), max)),
        step_bytes=tuple(min(value, BYTES_MAX) for value in itertools.accumulate(message.step_bytes, max)),
        loaded_bytes=min(message.loaded_bytes, BYTES_MAX),
        room_bytes=min(message.room_bytes, BYTES_MAX),
        forward_s=_rounded(_between(message.forward_s, 0.0, STEP_S_MAX)),
        only_deepest=message.only_deepest,
        source=message.source if message.source in SOURCES else "",
        age_s=_rounded(_between(message.age_s, 0.0, AGE_S_MAX)),
        ratio=_rounded(_between(message.ratio or 1.0, 1 / RATIO_MAX, RATIO_MAX)),
        margin=_rounded(_between(message.margin or 1.0, 1.0, RATIO_MAX)),
        flops_per_s=_rounded(_between(message.flops_per_s, 0.0, RATE_MAX)),
        peak_flops_per_s=_rounded(_between(message.peak_flops_per_s, 0.0, RATE_MAX)),
        tokens_per_s=_rounded(_between(message.tokens_per_s, 0.0, RATE_MAX)),
    )


RATIO_MAX = 100.0
AGE_S_MAX = 1e9


def link(message: messages_pb2.Link) -> LinkFigures:
    """What a device tells of its link; 0 for what no link can be."""
    return LinkFigures(
        up_bits_per_s=_rate(message.up_bits_per_s),
        down_bits_per_s=_rate(message.down_bits_per_s),
        round_trip_s=_rounded(_between(message.round_trip_s, 0.0, 60.0)),
        source=message.source if message.source in SOURCES else "",
        age_s=_rounded(_between(message.age_s, 0.0, AGE_S_MAX)),
        metered=message.metered,
    )


def link_message(known: LinkFigures) -> messages_pb2.Link:
    return messages_pb2.Link(**vars(known))


def figures_message(known: DeviceFigures) -> messages_pb2.Figures:
    return messages_pb2.Figures(**vars(known))


def _rate(value: float) -> float:
    """0 is not known; anything else carries a thousand bits a second at least, or a plan would wait for it for days."""
    return _rounded(_between(value, 1000.0, RATE_MAX)) if value > 0 else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def metrics(items: Iterable[messages_pb2.Metric]) -> Metrics:
    """At most 64 named figures."""
    return {line(item.name, 64): item.value for item, _ in zip(items, range(64), strict=False)}


# --- to agents


def task(order: Order, device_name: str) -> messages_pb2.Task:
    command, job = order.command, order.job
    prepared = job.machine.prepared
    assert prepared is not None
    message = messages_pb2.Task(
        task_id=command.task_id,
        job_id=job.job_id,
        round=command.round_number,
        lease=command.lease,
        kind=_KINDS[command.kind],
        method=job.method.name,
        state=messages_pb2.BlobRef(digest=command.state.digest, size_bytes=command.state.size_bytes),
        trainables_digest=command.trainables_digest or prepared.trainables_digest,
        recipe=job.recipe,
        deadline_s=order.deadline_s,
        # One seed a task: two devices must not shuffle alike. By name, since a device that is set up anew has another id.
        seed=_seed(job.spec.seed, f"{command.round_number}/{device_name}"),
        keep_warm_s=job.spec.devices.keep_warm_s,
    )
    message.payload.Pack(order.payload)
    if order.uplink_bits_per_s > 0:
        message.uplink.bits_per_s = order.uplink_bits_per_s
    if prepared.base_digest:
        message.base.CopyFrom(
            messages_pb2.Base(
                digest=prepared.base_digest,
                hub_id=prepared.hub_id,
                revision=prepared.revision,
                files=[
                    messages_pb2.BaseFile(name=name, blob=messages_pb2.BlobRef(digest=digest, size_bytes=size))
                    for name, digest, size in prepared.files
                ],
            )
        )
    return message


def receipt(task_id: str, lease: int, answer: Receipt) -> messages_pb2.Receipt:
    return messages_pb2.Receipt(task_id=task_id, lease=lease, status=_RECEIPTS[answer.status], reason=answer.reason)


def foreign_epoch(epoch: int, own: int) -> Receipt:
    """The answer to a result of another epoch."""
    return Receipt("refused", f"the result is of epoch {epoch}, this coordinator is in epoch {own}: an older state was restored")


# --- to operators


def fitting(views: Iterable[control_pb2.DeviceView]) -> list[control_pb2.DeviceView]:
    """The devices as far as an answer holds them: those for which there is no room come without what they say of themselves."""
    found: list[control_pb2.DeviceView] = []
    room = ANSWER_BYTES_MAX
    for view in views:
        if view.ByteSize() > room:
            view = control_pb2.DeviceView(
                device_id=view.device_id, name=view.name, online=view.online, last_seen_unix_s=view.last_seen_unix_s
            )
        room -= view.ByteSize() + 8
        found.append(view)
    return found


def complaints(found: Iterable[Complaint]) -> list[control_pb2.Complaint]:
    return [control_pb2.Complaint(path=c.path, value=c.value, allowed=c.allowed, remedy=c.remedy) for c in found]


def job_view(job: LiveJob, folder: str, *, online: frozenset[str], waiting: str = "", history: bool = False) -> control_pb2.JobView:
    """A job as operators see it. `online` holds the ids of connected devices; `waiting` why devices are not ready.

    With `history` it tells the job's file, too; the rounds themselves are `pastrounds`' to add.
    """
    state, spec = job.machine, job.spec
    prepared = state.prepared
    message = state.message
    if state.status == "preparing":
        message = job.host_stage or "the model host loads the base"
    elif state.status == "waiting" and waiting:
        message = f"{message} ({waiting})" if message else waiting
    if state.quarantined:
        named = f"quarantined: {'; '.join(state.quarantined.values())}"
        message = f"{message}; {named}" if message else named
    open_round = state.round
    plans = state.plan.planning is not None
    view = control_pb2.JobView(
        job_id=job.job_id,
        name=spec.name,
        state=_STATES[state.status],
        message=message,
        method=spec.method.name,
        model_task=spec.task.kind or "",
        base=(prepared.hub_id or prepared.base_name) if prepared else spec.model.base,
        rounds_total=spec.rounds.count,
        rounds_committed=state.committed,
        submitted_unix_s=job.submitted_unix_s,
        started_unix_s=state.started_unix_s,
        ended_unix_s=state.ended_unix_s,
        best_round=state.best_round,
        metric=state.plan.metric,
        upload_bytes=job.history.upload_bytes + (open_round.upload_bytes() if open_round else 0),
        download_bytes=job.history.download_bytes + (open_round.download_bytes() if open_round else 0),
        failed_device=state.last_failure_device if state.status == "failed" else "",
        adapter_folder=folder,
        job_toml=job.toml if history else "",
        devices_minimum=spec.devices.minimum,
        blocks=[block.name for block in prepared.blocks] if prepared is not None and plans else [],
        newcomers=[work_view(entry, job, online) for entry in state.newcomers.values()],
    )
    current = open_round or job.history.last
    if current is not None:
        view.current.CopyFrom(_bounded(round_view(current, job, online)))
    if prepared is not None and prepared.initial is not None:
        view.initial_metrics.extend(_metric_messages(prepared.initial.metrics))
    if state.last_failure is not None and state.status == "failed":
        view.failure.CopyFrom(failure_message(state.last_failure))
    remaining = _remaining_s(job)
    if remaining is not None:
        view.remaining_s = remaining
    return view


def _bounded(view: control_pb2.RoundView) -> control_pb2.RoundView:
    """A round that fits beside the growing part of an answer: many failed tasks lose their tracebacks first, then what they said."""
    if view.ByteSize() > CURRENT_BYTES_MAX:
        for task_ in view.tasks:
            task_.failure.ClearField("traceback")
    if view.ByteSize() > CURRENT_BYTES_MAX:
        for task_ in view.tasks:
            task_.ClearField("failure")
    if view.ByteSize() > CURRENT_BYTES_MAX:
        view.ClearField("tasks")
    return view


def round_view(entry: RoundEntry, job: LiveJob, online: frozenset[str]) -> control_pb2.RoundView:
    view = control_pb2.RoundView(
        round=entry.number,
        phase=_PHASES[entry.phase],
        tasks=[_task_view(task_, entry, job, online) for task_ in entry.tasks.values()],
        started_unix_s=entry.started_unix_s,
        ended_unix_s=entry.ended_unix_s,
        metrics=_metric_messages(entry.metrics),
        evaluation_rows=entry.evaluation_rows,
        fold_metrics=_metric_messages(entry.fold_metrics),
        upload_bytes=entry.upload_bytes(),
        download_bytes=entry.download_bytes(),
        updates_folded=len(entry.trained()),
        updates_late=entry.late,
        adapter_digest=entry.published.digest if entry.published else "",
    )
    loss = entry.train_loss()
    if loss is not None:
        view.train_loss = loss
    if entry.plan is not None:
        view.plan.CopyFrom(_plan_view(entry.plan, entry, job))
    return view


def _plan_view(plan: RoundPlan, entry: RoundEntry, job: LiveJob) -> control_pb2.PlanView:
    settings = job.machine.plan.planning
    view = control_pb2.PlanView(
        layout=plan.layout,
        solver=plan.solver,
        predicted_s=plan.round_s,
        uncovered_depths=plan.uncovered_depths,
        idle_devices=plan.idle_names,
        idle_count=len(plan.idle_devices),
        reason=plan.reason,
        training_since_unix_s=entry.training_since_unix_s,
    )
    if settings is not None and settings.resource == "airtime":
        view.share_unit = "airtime"
    elif settings is not None and settings.uplink_bits_per_s > 0:
        view.share_unit = "bit/s"
    if plan.lower_bound_s is not None:
        view.lower_bound_s = plan.lower_bound_s
    for layout, round_s, row_s in plan.predictions:
        view.predictions.add(layout=layout, round_s=round_s, seconds_per_full_gradient_row=row_s)
    ends = [finish_s(task_, entry) for task_ in entry.tasks.values() if task_.kind == "train" and task_.update is not None]
    known = [end for end in ends if end is not None]
    if entry.phase != "training" and known and len(known) == len(ends):
        view.actual_s = max(known)
    return view


def finish_s(task_: TaskEntry, entry: RoundEntry) -> float | None:
    """When a planned task's update was through, seconds from the beginning of the round's training; None where that was not seen."""
    if task_.update is None or task_.update.ready_s <= 0:
        return None
    return task_.assigned_unix_s - entry.training_since_unix_s + task_.update.ready_s + task_.update.sent_s


def _task_plan(part: PlannedPart, task_: TaskEntry, entry: RoundEntry) -> control_pb2.TaskPlan:
    view = control_pb2.TaskPlan(
        depths=part.depths,
        share=part.share,
        uplink_bits_per_s=part.uplink_bits_per_s,
        predicted_ready_s=part.ready_s,
        predicted_finish_s=part.finish_s,
    )
    if task_.update is not None and (end := finish_s(task_, entry)) is not None:
        view.actual_ready_s = end - task_.update.sent_s
        view.actual_finish_s = end
    return view


def failure_message(found: Failure) -> messages_pb2.Failure:
    return messages_pb2.Failure(kind=_FAILURES_BACK[found.kind], stage=found.stage, message=found.message, traceback=found.traceback)


def work_view(entry: TaskEntry, job: LiveJob, online: frozenset[str]) -> control_pb2.DeviceTask:
    """What a device does and how far it is; what a round adds to that is `round_view`'s."""
    view = control_pb2.DeviceTask(
        device_name=entry.device_name,
        kind=_KINDS[entry.kind],
        state=_TASK_STATES[entry.status],
        samples=entry.update.samples if entry.update else 0,
        online=entry.device_id in online,
    )
    progress = job.progress.get(entry.task_id)
    if progress is not None:
        view.stage = fleet_pb2.TaskStage.ValueType(progress.stage)
        view.done, view.total = progress.done, progress.total
    return view


def _task_view(entry: TaskEntry, in_round: RoundEntry, job: LiveJob, online: frozenset[str]) -> control_pb2.DeviceTask:
    view = work_view(entry, job, online)
    progress = job.progress.get(entry.task_id)
    loss = entry.update.metrics.get("loss") if entry.update else progress.loss if progress else None
    if loss is not None:
        view.loss = loss
    part = in_round.plan.part_of(entry.device_id) if in_round.plan is not None and entry.kind == "train" else None
    if part is not None:
        view.plan.CopyFrom(_task_plan(part, entry, in_round))
    if entry.kind == "train" and (pruning := in_round.pruning_of(entry.device_id)) is not None:
        view.pruning.CopyFrom(_task_pruning(pruning, entry))
    if entry.failure is not None:
        view.failure.CopyFrom(failure_message(entry.failure))
    elif entry.reason:
        view.failure.message = entry.reason
    return view


def _task_pruning(pruning: Pruning, entry: TaskEntry) -> control_pb2.TaskPruning:
    view = control_pb2.TaskPruning(
        sparsity_before=pruning.sparsity_before,
        sparsity_told=pruning.sparsity_after,
        rank=pruning.rank,
        pace=pruning.pace,
        note=pruning.note,
    )
    if entry.update is not None:
        view.sparsity_after = entry.update.sparsity
    return view


def _remaining_s(job: LiveJob) -> float | None:
    """Rounds left times the median of the last rounds' seconds, less what the open round has taken."""
    median = job.history.median_s
    if median is None or job.ended:
        return None
    open_round = job.machine.round
    spent = min(median, time.time() - open_round.working_since_unix_s) if open_round else 0.0
    return max(0.0, median * (job.spec.rounds.count - job.machine.committed) - spent)


def _metric_messages(found: Metrics) -> list[messages_pb2.Metric]:
    return [messages_pb2.Metric(name=name, value=value) for name, value in sorted(found.items())]


def _seed(seed: int, what: str) -> int:
    return (seed * 0x9E3779B1 + zlib.crc32(what.encode())) & 0x7FFFFFFF

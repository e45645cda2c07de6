"""A job as a person follows it: a live picture on a terminal, one line per event elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from fleetune.coordinator.figures import bytes_text, count_text, duration_text, loss_text, metric_text, rate_text
from fleetune.coordinator.jsonview import enum_word, message_json
from fleetune.v1 import control_pb2 as pb
from fleetune.v1 import fleet_pb2, messages_pb2

WIDTH_MAX = 104
"""Wider lines are harder to read, not richer."""

WIDE = 100
"""From here on there is room for what is nice to have."""

NOTES_SHOWN = 2
"""Lines below the devices on why they were not free to choose."""

REFRESH_S = 0.25

LATE = 1.15
"""Times of the predicted end from which an end is shown as late."""

NEWCOMERS_MAX = 4
"""So many of those that are measured beside the rounds are named; the rest is counted."""

_STATE_STYLES = {
    pb.JOB_STATE_QUEUED: "yellow",
    pb.JOB_STATE_PREPARING: "cyan",
    pb.JOB_STATE_WAITING: "yellow",
    pb.JOB_STATE_RUNNING: "cyan",
    pb.JOB_STATE_PAUSED: "yellow",
    pb.JOB_STATE_COMPLETED: "green",
    pb.JOB_STATE_FAILED: "red",
    pb.JOB_STATE_CANCELLED: "magenta",
}

_ENDED = frozenset({pb.JOB_STATE_COMPLETED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})

_PHASES = {
    pb.ROUND_PHASE_MEASURING: "measuring",
    pb.ROUND_PHASE_TRAINING: "training",
    pb.ROUND_PHASE_FOLDING: "folding",
    pb.ROUND_PHASE_EVALUATING: "evaluating",
    pb.ROUND_PHASE_COMMITTED: "committed",
}

_STAGES = {
    fleet_pb2.TASK_STAGE_QUEUED: "queued",
    fleet_pb2.TASK_STAGE_FETCHING_BASE: "fetching base",
    fleet_pb2.TASK_STAGE_FETCHING_STATE: "fetching state",
    fleet_pb2.TASK_STAGE_LOADING: "loading",
    fleet_pb2.TASK_STAGE_TRAINING: "training",
    fleet_pb2.TASK_STAGE_EVALUATING: "evaluating",
    fleet_pb2.TASK_STAGE_UPLOADING: "uploading",
    fleet_pb2.TASK_STAGE_MEASURING: "measuring",
}

_BYTE_STAGES = frozenset({fleet_pb2.TASK_STAGE_FETCHING_BASE, fleet_pb2.TASK_STAGE_FETCHING_STATE, fleet_pb2.TASK_STAGE_UPLOADING})


def state_word(state: pb.JobState.ValueType) -> str:
    """JOB_STATE_RUNNING -> "running"."""
    return enum_word("JobState", pb.JobState.Name(state))


def state_style(state: pb.JobState.ValueType) -> str:
    """The colour of a job state."""
    return _STATE_STYLES.get(state, "")


def metric_of(metrics: Iterable[messages_pb2.Metric], name: str) -> float | None:
    """The value of a named figure, None where it was not measured."""
    return next((metric.value for metric in metrics if metric.name == name), None)


def metric_name(job: pb.JobView) -> str:
    """The metric worth a column beside the loss; the job's own unless that is the loss itself."""
    return job.metric if job.metric and job.metric != "loss" else "accuracy"


def best_round(job: pb.JobView) -> pb.RoundView | None:
    """The committed round with the best metric, where history is at hand."""
    return next((item for item in job.history if item.round == job.best_round), None)


def base_words(base: str) -> str:
    """A hub id as it is; of a folder, the two last parts, as the first ones say nothing of the model."""
    return "/".join(base.rstrip("/").split("/")[-2:])


def trained_by(view: pb.RoundView) -> list[pb.DeviceTask]:
    """The training tasks of a round; what devices measure are tasks of their own."""
    return [task for task in view.tasks if task.kind not in (messages_pb2.TASK_KIND_EVALUATE, messages_pb2.TASK_KIND_MEASURE)]


def one_a_device(view: pb.RoundView) -> list[pb.DeviceTask]:
    """What each device does now: its evaluation once there is one, with the loss and the rows of its training beside."""
    latest: dict[str, pb.DeviceTask] = {}
    for task in view.tasks:
        trained = latest.get(task.device_name)
        if task.kind == messages_pb2.TASK_KIND_EVALUATE and trained is not None:
            merged = pb.DeviceTask()
            merged.CopyFrom(task)
            merged.samples = trained.samples
            if trained.HasField("plan"):
                merged.plan.CopyFrom(trained.plan)
            if trained.HasField("pruning"):
                merged.pruning.CopyFrom(trained.pruning)
            if trained.HasField("loss"):
                merged.loss = trained.loss
            latest[task.device_name] = merged
        else:
            latest[task.device_name] = task
    return sorted(latest.values(), key=by_name)


def by_name(task: pb.DeviceTask) -> list[tuple[int, str]]:
    """Sorts as people count: agent-2 before agent-10. A device thus keeps its line from round to round."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d{1,9})", task.device_name)]


# --- the picture -----------------------------------------------------------------------------------------------------


def render(job: pb.JobView, *, now_unix_s: float, width: int, height: int = 40, notice: str = "") -> RenderableType:
    """The whole picture of a job at one moment; pure.

    `width` and `height` are the terminal's columns and rows: rows of devices and rounds are left out, and counted, rather
    than pushing the header off the screen. `notice` is a line of the watch itself, for example that it reconnects.
    """
    width = min(width, WIDTH_MAX)
    rows_free = max(6, height - 12)
    tasks = one_a_device(job.current) if _has_open_round(job) else []
    rounds_max = max(3, min(8, rows_free - min(len(tasks), rows_free // 2)))
    tasks_max = max(3, rows_free - min(rounds_max, len(job.history)) - 2)
    parts: list[RenderableType] = [_header(job, now_unix_s), _progress(job, width)]
    if job.message:
        parts.append(Text(job.message, style=state_style(job.state)))
    if notice:
        parts.append(Text(notice, style="yellow"))
    if tasks and job.current.HasField("plan"):
        parts += [Text(), _planned_devices(tasks, tasks_max, width, job), Text(plan_text(job.current.plan, job.blocks), style="dim")]
    elif tasks:
        parts += [Text(), _devices(tasks, tasks_max, width)]
    if newcomers := newcomers_text(job):
        parts.append(Text(newcomers, style="dim"))
    parts += list(_problems(tasks))
    if job.history:
        parts += [Text(), rounds_table(job, width=width, last=rounds_max)]
    elif job.initial_metrics:
        parts += [Text(), Text(f"before the first round: {_measures(job, job.initial_metrics)}", style="dim")]
    if job.upload_bytes or job.download_bytes or (job.state in _ENDED and job.adapter_folder):
        parts += [Text(), _totals(job)]
    return Padding(Group(*parts), (0, 1), expand=False) if width < 40 else _Bounded(Padding(Group(*parts), (0, 1)), width)


def _has_open_round(job: pb.JobView) -> bool:
    """False also between rounds, when `current` is the committed one."""
    return job.HasField("current") and job.state not in _ENDED and job.current.phase != pb.ROUND_PHASE_COMMITTED


class _Bounded:
    """A renderable that never uses more than `width` columns."""

    def __init__(self, inner: RenderableType, width: int) -> None:
        self._inner, self._width = inner, width

    def __rich_console__(self, console: Console, options: object) -> Iterable[RenderableType]:
        grid = Table.grid(Column(width=self._width))
        grid.add_row(self._inner)
        yield grid


def _header(job: pb.JobView, now_unix_s: float) -> RenderableType:
    title = Text.assemble((job.name or "job", "bold"), "  ", (job.job_id, "dim"))
    state = Text(state_word(job.state), style=f"bold {state_style(job.state)}")
    about = " · ".join(part for part in (job.method, job.model_task, base_words(job.base)) if part)
    grid = Table.grid(
        Column(ratio=1, no_wrap=True, overflow="ellipsis"), Column(justify="right", no_wrap=True), expand=True, padding=(0, 1)
    )
    grid.add_row(title, state)
    grid.add_row(Text(about, style="dim"), Text(_clock(job, now_unix_s), style="dim"))
    return grid


def _clock(job: pb.JobView, now_unix_s: float) -> str:
    start = job.started_unix_s or job.submitted_unix_s
    if not start:
        return ""
    elapsed = duration_text(max(0.0, (job.ended_unix_s or now_unix_s) - start))
    if job.state in _ENDED:
        return f"took {elapsed}"
    if job.HasField("remaining_s") and job.state != pb.JOB_STATE_PAUSED:
        return f"{elapsed}, about {duration_text(job.remaining_s)} left"
    return elapsed


def _progress(job: pb.JobView, width: int) -> RenderableType:
    bar_width = max(10, width - 50)
    done = float(job.rounds_committed)
    if _has_open_round(job):
        done += _round_share(job.current)
    total = max(1, job.rounds_total)
    style = state_style(job.state) or "cyan"
    text = Text.assemble(("round ", ""), (f"{_round_shown(job)}/{job.rounds_total}", "bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        text, ProgressBar(total=total, completed=min(done, total), width=bar_width, complete_style=style, finished_style=style), _phase(job)
    )
    return grid


def _round_shown(job: pb.JobView) -> int:
    if _has_open_round(job):
        return job.current.round
    return job.rounds_committed


def _phase(job: pb.JobView) -> Text:
    if job.state in _ENDED:
        return Text("")
    if job.state == pb.JOB_STATE_WAITING and not job.message:
        return Text(f"waits for {count_text(max(1, job.devices_minimum), 'device')}")
    if job.state != pb.JOB_STATE_RUNNING or not job.HasField("current"):
        return Text("")
    tasks = one_a_device(job.current)
    done = sum(task.state == pb.DEVICE_TASK_STATE_DONE for task in tasks)
    phase = _PHASES.get(job.current.phase, "")
    return Text(f"{phase}, {done} of {count_text(len(tasks), 'device')} done" if tasks else phase)


def _round_share(current: pb.RoundView) -> float:
    """How far a round is, 0 to 1: devices' own steps where they tell, so that the bar moves within a round."""
    if current.phase in (pb.ROUND_PHASE_FOLDING, pb.ROUND_PHASE_EVALUATING):
        return 0.9
    tasks = trained_by(current)
    return 0.9 * sum(map(_task_share, tasks)) / len(tasks) if tasks else 0.0


def _task_share(task: pb.DeviceTask) -> float:
    if task.state != pb.DEVICE_TASK_STATE_ASSIGNED:
        return 1.0
    if task.stage == fleet_pb2.TASK_STAGE_TRAINING:
        return 0.9 * min(1.0, task.done / task.total) if task.total else 0.0
    return 0.95 if task.stage in (fleet_pb2.TASK_STAGE_UPLOADING, fleet_pb2.TASK_STAGE_EVALUATING) else 0.0


def _devices(tasks: Sequence[pb.DeviceTask], rows_max: int, width: int) -> RenderableType:
    bar_width = 20 if width >= WIDE else 10
    name_width = max(8, min(32 if width >= WIDE else 17, max(len(task.device_name) for task in tasks)))
    prunes = any(task.HasField("pruning") for task in tasks)
    bars = width >= WIDE or not prunes
    cuts = [Column("cut", justify="right", no_wrap=True, min_width=8), Column("rank", justify="right", no_wrap=True, min_width=4)]
    table = Table(
        Column("device", width=name_width if width >= 80 else 8, no_wrap=True, overflow="ellipsis"),
        Column("doing", width=14, no_wrap=True, overflow="ellipsis"),
        *([Column("", width=bar_width)] if bars else []),
        Column("", no_wrap=True, width=14),
        Column("loss", justify="right", no_wrap=True, min_width=6),
        Column("rows", justify="right", no_wrap=True, min_width=5),
        *(cuts if prunes else []),
        box=None,
        header_style="dim",
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    notes = notes_of(tasks)[:NOTES_SHOWN] if rows_max > 2 * NOTES_SHOWN else []
    rows_max -= len(notes)
    shown = list(tasks) if len(tasks) <= rows_max else _most_telling(tasks, rows_max - 1)
    for task in shown:
        doing, style = _doing(task)
        loss = loss_text(task.loss) if task.HasField("loss") else "-"
        table.add_row(
            task.device_name,
            Text(doing, style=style),
            *([_task_bar(task, bar_width)] if bars else []),
            Text(_amount(task), style="dim"),
            loss,
            f"{task.samples:,}" if task.samples else "-",
            *([cut_text(task), f"{task.pruning.rank}" if task.HasField("pruning") else "-"] if prunes else []),
        )
    below: list[RenderableType] = []
    if len(shown) < len(tasks):
        hidden = [task for task in tasks if not any(task is other for other in shown)]
        below.append(Text(f"and {len(hidden)} more: {_tally(hidden)}", style="dim"))
    below += [Text(text, style="yellow", no_wrap=True, overflow="ellipsis") for text in notes]
    return Group(table, *below) if below else table


def notes_of(tasks: Sequence[pb.DeviceTask]) -> list[str]:
    """Why devices were not free to choose what they prune, a line each."""
    return [f"{task.device_name}: {task.pruning.note}" for task in tasks if task.pruning.note]


def cut_text(task: pb.DeviceTask) -> str:
    """The share of heads and neurons that is cut, and in a round in which more is: "20 > 25%"."""
    if not task.HasField("pruning"):
        return "-"
    own = task.pruning
    after = own.sparsity_after if own.HasField("sparsity_after") else own.sparsity_told
    if round(after * 100) == round(own.sparsity_before * 100):
        return f"{after:.0%}"
    return f"{own.sparsity_before * 100:.0f} > {after:.0%}"


def _planned_devices(tasks: Sequence[pb.DeviceTask], rows_max: int, width: int, job: pb.JobView) -> RenderableType:
    """As `_devices`, with who trains what, at which rate, and when it should be and was through."""
    wide = width >= WIDE
    columns = [
        Column("device", width=15 if wide else 10, no_wrap=True, overflow="ellipsis"),
        Column("doing", width=13, no_wrap=True, overflow="ellipsis"),
    ]
    columns += [Column("", width=8), Column("", no_wrap=True, width=14)] if wide else []
    columns += [
        Column("loss", justify="right", no_wrap=True, min_width=6),
        Column("trains", no_wrap=True, min_width=8, max_width=15, overflow="ellipsis"),
        Column("uplink", justify="right", no_wrap=True, min_width=6),
        Column("plan", justify="right", no_wrap=True, min_width=6),
        Column("took", justify="right", no_wrap=True, min_width=6),
    ]
    table = Table(*columns, box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    busy = [task for task in tasks if task.HasField("plan") or task.state == pb.DEVICE_TASK_STATE_ASSIGNED or problem_text(task)]
    shown = busy if len(busy) <= rows_max else _most_telling(busy, rows_max - 1)
    for task in shown:
        doing, style = _doing(task)
        cells: list[RenderableType] = [task.device_name, Text(doing, style=style)]
        cells += [_task_bar(task, 8), Text(_amount(task), style="dim", overflow="ellipsis")] if wide else []
        cells.append(loss_text(task.loss) if task.HasField("loss") else "-")
        cells += _planned_cells(task, job)
        table.add_row(*cells)
    if len(shown) == len(busy):
        return table
    hidden = [task for task in busy if not any(task is other for other in shown)]
    return Group(table, Text(f"and {len(hidden)} more: {_tally(hidden)}", style="dim"))


def _planned_cells(task: pb.DeviceTask, job: pb.JobView) -> list[RenderableType]:
    if not task.HasField("plan"):
        return ["-", "-", "-", "-"]
    own = task.plan
    took = Text("-")
    if own.HasField("actual_finish_s"):
        late = own.actual_finish_s > LATE * own.predicted_finish_s
        took = Text(duration_text(own.actual_finish_s), style="yellow" if late else "green")
    return [
        blocks_text(own.depths, job.blocks),
        share_text(own, job.current.plan),
        duration_text(own.predicted_finish_s),
        took,
    ]


def plan_text(plan: pb.PlanView, blocks: Sequence[str]) -> str:
    """A round's plan in a line: "plan: blocks (exact), 12.3 s predicted, 3 devices idle"."""
    parts = [f"plan: {plan.layout} ({plan.solver})", f"{duration_text(plan.predicted_s)} predicted"]
    if plan.HasField("actual_s"):
        parts.append(f"took {duration_text(plan.actual_s)}")
    if plan.idle_count:
        parts.append(f"{count_text(plan.idle_count, 'device')} idle")
    if plan.uncovered_depths:
        parts.append(f"nobody can train {blocks_text(plan.uncovered_depths, blocks)}")
    return ", ".join(parts)


def blocks_text(depths: Sequence[int], names: Sequence[str]) -> str:
    """Depths (from 1) by the names of their blocks: "layer.4", "head to layer.2", "layer.5-3", "all 7 blocks"."""
    known = [names[depth - 1] if 0 < depth <= len(names) else f"depth {depth}" for depth in sorted(depths)]
    if not known:
        return "-"
    if len(known) == 1:
        return known[0]
    if len(known) == len(names):
        return f"all {len(names)} blocks"
    if max(depths) - min(depths) + 1 != len(known):
        return f"{len(known)} blocks"
    stem, _, number = known[-1].rpartition(".")
    if stem and known[0].startswith(f"{stem}.") and number.isdigit():
        return f"{known[0]}-{number}"
    return f"{known[0]} to {known[-1]}"


def share_text(own: pb.TaskPlan, plan: pb.PlanView) -> str:
    """A device's part of the shared uplink: "23 % air", "5.2 Mbit/s", or "free" where nothing is shared."""
    if plan.share_unit == "airtime":
        return f"{own.share:.0%} air"
    return rate_text(own.uplink_bits_per_s) if own.uplink_bits_per_s > 0 else "free"


def _most_telling(tasks: Sequence[pb.DeviceTask], count: int) -> list[pb.DeviceTask]:
    """Trouble first, then work under way, then what is done; the given order among equals."""
    done = (pb.DEVICE_TASK_STATE_DONE,)
    under_way = (pb.DEVICE_TASK_STATE_ASSIGNED,)
    return sorted(tasks, key=lambda task: 2 if task.state in done else 1 if task.state in under_way else 0)[:count]


def _tally(tasks: Sequence[pb.DeviceTask]) -> str:
    counts: dict[str, int] = {}
    for task in tasks:
        word = _doing(task)[0]
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items(), key=lambda item: -item[1]))


def _doing(task: pb.DeviceTask) -> tuple[str, str]:
    """What a device does, in a word or two, and its colour."""
    if task.state == pb.DEVICE_TASK_STATE_DONE:
        return "done", "green"
    if task.state == pb.DEVICE_TASK_STATE_FAILED:
        return "failed", "red"
    if task.state == pb.DEVICE_TASK_STATE_REFUSED:
        return "refused", "yellow"
    if task.state == pb.DEVICE_TASK_STATE_MISSED:
        return "missed", "red"
    if task.state == pb.DEVICE_TASK_STATE_LATE:
        return "late", "yellow"
    if not task.online:
        return "offline", "yellow"
    word = _STAGES.get(task.stage, "queued")
    return word, "dim" if word == "queued" else "cyan"


def work_text(task: pb.DeviceTask) -> str:
    """What a device is at and how far it is, in few words: "measuring 40%", "loading"."""
    word = _doing(task)[0]
    return f"{word} {min(1.0, task.done / task.total):.0%}" if task.total and task.done else word


def newcomers_text(job: pb.JobView) -> str:
    """Who is being measured for later plans, or an empty string."""
    found = sorted(job.newcomers, key=by_name)
    parts = [f"{task.device_name} {work_text(task)}" for task in found[:NEWCOMERS_MAX]]
    more = f" and {len(found) - NEWCOMERS_MAX} more" if len(found) > NEWCOMERS_MAX else ""
    return f"for a later plan: {', '.join(parts)}{more}" if parts else ""


def _task_bar(task: pb.DeviceTask, width: int) -> RenderableType:
    if task.state != pb.DEVICE_TASK_STATE_ASSIGNED or not task.total or not task.online:
        return Text("")
    return ProgressBar(total=task.total, completed=min(task.done, task.total), width=width, complete_style="cyan", finished_style="cyan")


def _amount(task: pb.DeviceTask) -> str:
    if task.state != pb.DEVICE_TASK_STATE_ASSIGNED or not task.total or not task.online:
        return ""
    if task.stage in _BYTE_STAGES:
        return f"{min(1.0, task.done / task.total):.0%} of {bytes_text(task.total)}"
    return f"{task.done}/{task.total}"


def problem_text(task: pb.DeviceTask) -> str:
    """Why a device gave no result, with the stage and the message; empty where it did."""
    stage = f" ({task.failure.stage})" if task.failure.stage else ""
    message = task.failure.message
    if task.state == pb.DEVICE_TASK_STATE_FAILED:
        kind = enum_word("FailureKind", messages_pb2.FailureKind.Name(task.failure.kind)).replace("_", " ")
        return f"{task.device_name} failed{stage}: {message or kind}"
    if task.state == pb.DEVICE_TASK_STATE_REFUSED:
        return f"{task.device_name} refused: {message or 'its owner does not let it train now'}"
    if task.state == pb.DEVICE_TASK_STATE_MISSED:
        return f"{task.device_name} missed the round: {message or ('not back by the deadline' if task.online else 'it left')}"
    if task.state == pb.DEVICE_TASK_STATE_LATE:
        return f"{task.device_name} came late: its update is recorded, not folded"
    return ""


def _problems(tasks: Sequence[pb.DeviceTask]) -> Iterable[RenderableType]:
    problems = [(task, text) for task in tasks if (text := problem_text(task))]
    for task, text in problems[:4]:
        style = "red" if task.state in (pb.DEVICE_TASK_STATE_FAILED, pb.DEVICE_TASK_STATE_MISSED) else "yellow"
        grid = Table.grid(Column(width=2), Column(overflow="fold"))
        grid.add_row(Text("!", style=f"bold {style}"), Text(text, style=style))
        yield grid
    if len(problems) > 4:
        yield Text(f"  and {len(problems) - 4} more like these", style="dim")


def rounds_table(job: pb.JobView, *, width: int, last: int | None = None) -> RenderableType:
    """The committed rounds, the newest `last` of them, with the best one marked."""
    name = metric_name(job)
    has_metric = any(metric_of(item.metrics, name) is not None for item in job.history) or metric_of(job.initial_metrics, name) is not None
    columns = [Column("round", justify="right", min_width=5, no_wrap=True), Column("devices", justify="right", no_wrap=True)]
    columns.append(Column("train loss", justify="right", no_wrap=True))
    # On a narrow terminal the metric is what one wants to see; without one the loss is the metric.
    has_loss = not has_metric or width >= WIDE
    if has_loss:
        columns.append(Column("eval loss", justify="right", no_wrap=True))
    if has_metric:
        columns.append(Column(name.replace("_", " "), justify="right", no_wrap=True))
    has_ranks = any(ranks_text(item) for item in job.history)
    heads = ("ranks", "modules", "up", "down", "time") if has_ranks else ("up", "down", "time")
    columns += [Column(head, justify="right", no_wrap=True) for head in heads]
    columns.append(Column("", no_wrap=True))
    table = Table(*columns, box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    shown = list(job.history) if last is None else list(job.history)[-last:]
    if job.initial_metrics:
        cells = ["start", "", ""]
        cells += [loss_text(metric_of(job.initial_metrics, "loss"))] if has_loss else []
        cells += [metric_text(name, metric_of(job.initial_metrics, name))] if has_metric else []
        table.add_row(*cells, *([""] * (len(columns) - len(cells))), style="dim")
    hidden = len(job.history) - len(shown)
    if hidden:
        table.add_row("...", *([""] * (len(columns) - 1)), style="dim")
    for item in shown:
        best = item.round == job.best_round
        asked = len(trained_by(item))
        devices = f"{item.updates_folded}/{asked}" if asked else str(item.updates_folded)
        cells = [str(item.round), devices, loss_text(item.train_loss if item.HasField("train_loss") else None)]
        cells += [loss_text(metric_of(item.metrics, "loss"))] if has_loss else []
        cells += [metric_text(name, metric_of(item.metrics, name))] if has_metric else []
        cells += [_count_of(item, "triplets"), _count_of(item, "modules")] if has_ranks else []
        cells += [bytes_text(item.upload_bytes), bytes_text(item.download_bytes), duration_text(item.ended_unix_s - item.started_unix_s)]
        note = " ".join(part for part in ("best" if best else "", f"{item.updates_late} late" if item.updates_late else "") if part)
        table.add_row(*cells, Text(note, style="green" if best else "yellow"), style="bold" if best else "")
    return table


def _count_of(item: pb.RoundView, name: str) -> str:
    found = metric_of(item.fold_metrics, name)
    return f"{found:,.0f}" if found is not None else "-"


def _totals(job: pb.JobView) -> RenderableType:
    parts = [f"up {bytes_text(job.upload_bytes)}", f"down {bytes_text(job.download_bytes)}"]
    best = best_round(job)
    if best is not None:
        name = job.metric or "loss"
        parts.append(f"best round {best.round}: {name.replace('_', ' ')} {metric_text(name, metric_of(best.metrics, name))}")
    if job.state in _ENDED and job.adapter_folder:
        return Group(
            Text(" · ".join(parts), style="dim"), Text(f"adapter on the coordinator: {job.adapter_folder}", style="dim", overflow="fold")
        )
    return Text(" · ".join(parts), style="dim")


# --- one line per event ----------------------------------------------------------------------------------------------


class Announcer:
    """Turns views of one job into the lines that matter, each said once; owns what was said."""

    def __init__(self) -> None:
        self._state: int | None = None
        self._message = ""
        self._started = 0
        self._committed = 0
        self._initial = False
        self._measured = 0
        self._problems: set[str] = set()
        self._newcomers: set[str] = set()

    def lines(self, job: pb.JobView) -> list[str]:
        """What is new in `job` since the last call."""
        said: list[str] = []
        if self._state is None:
            said.append(f"job {job.name} ({job.job_id}): {count_text(job.rounds_total, 'round')} of {job.method}")
        ended = job.state in _ENDED
        if job.initial_metrics and not self._initial:
            self._initial = True
            said.append("before the first round: " + _measures(job, job.initial_metrics))
        for item in job.history:
            if item.round > self._committed:
                said += self._round(job, item)
        if job.HasField("current") and not ended and job.current.tasks:
            said += self._start(job, job.current)
            said += self._trouble(job.current)
        said += [
            f"{task.device_name} came later: measured beside the rounds"
            for task in sorted(job.newcomers, key=by_name)
            if task.device_name not in self._newcomers
        ]
        self._newcomers.update(task.device_name for task in job.newcomers)
        if (job.state != self._state or job.message != self._message) and not ended and (job.state != pb.JOB_STATE_RUNNING or job.message):
            said.append(f"{state_word(job.state)}" + (f": {job.message}" if job.message else ""))
        if ended and self._state != job.state:
            said.append(_end(job))
        self._state, self._message = job.state, job.message
        return said

    def _start(self, job: pb.JobView, current: pb.RoundView) -> list[str]:
        if current.round <= self._started:
            return []
        names = [task.device_name for task in sorted(trained_by(current), key=by_name)]
        if not names:
            return self._measuring(job, current)
        self._started = current.round
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        said = [f"round {current.round}/{job.rounds_total} started on {count_text(len(names), 'device')}: {shown}"]
        said += [f"round {current.round}: {text}" for text in notes_of(trained_by(current))]
        if current.HasField("plan"):
            parts = [
                f"{task.device_name} {blocks_text(task.plan.depths, job.blocks)}"
                for task in sorted(trained_by(current), key=by_name)
                if task.HasField("plan")
            ]
            more = f" and {len(parts) - 8} more" if len(parts) > 8 else ""
            said.append(f"round {current.round}/{job.rounds_total} {plan_text(current.plan, job.blocks)}: {', '.join(parts[:8])}{more}")
        return said

    def _measuring(self, job: pb.JobView, current: pb.RoundView) -> list[str]:
        """Before a round is planned."""
        if self._measured == current.round:
            return []
        self._measured = current.round
        asked = sum(task.kind == messages_pb2.TASK_KIND_MEASURE for task in current.tasks)
        return [f"round {current.round}/{job.rounds_total}: {count_text(asked, 'device')} told to measure how fast they train"]

    def _trouble(self, view: pb.RoundView) -> list[str]:
        fresh = [text for task in view.tasks if (text := problem_text(task)) and f"{view.round} {text}" not in self._problems]
        self._problems.update(f"{view.round} {text}" for text in fresh)
        return [f"round {view.round}: {text}" for text in fresh]

    def _round(self, job: pb.JobView, item: pb.RoundView) -> list[str]:
        self._committed = max(self._committed, item.round)
        said = self._start(job, item) if item.tasks else []
        said += self._trouble(item)
        asked = len(trained_by(item))
        parts = [f"{item.updates_folded} of {count_text(asked, 'device')}" if asked else count_text(item.updates_folded, "device")]
        if item.HasField("train_loss"):
            parts.append(f"train loss {loss_text(item.train_loss)}")
        if item.metrics:
            parts.append(_measures(job, item.metrics))
        if error := aggregation_text(item):
            parts.append(error)
        if left := ranks_text(item):
            parts.append(left)
        parts += [f"up {bytes_text(item.upload_bytes)}", f"down {bytes_text(item.download_bytes)}"]
        parts.append(duration_text(item.ended_unix_s - item.started_unix_s))
        if cut := [task.pruning.sparsity_after for task in item.tasks if task.pruning.HasField("sparsity_after")]:
            parts.append(f"cut {min(cut):.0%}" if round(min(cut), 2) == round(max(cut), 2) else f"cut {min(cut):.0%} to {max(cut):.0%}")
        if item.plan.HasField("actual_s"):
            parts.append(f"training {duration_text(item.plan.actual_s)} of {duration_text(item.plan.predicted_s)} predicted")
        if job.HasField("remaining_s") and item.round == job.rounds_committed and job.state not in _ENDED:
            parts.append(f"about {duration_text(job.remaining_s)} left")
        return [*said, f"round {item.round}/{job.rounds_total} committed: " + ", ".join(parts)]


def ranks_text(item: pb.RoundView) -> str:
    """What the round has left of adapters that lose ranks: "26 ranks in 9 modules"; empty where they keep them."""
    ranks, modules = (metric_of(item.fold_metrics, name) for name in ("triplets", "modules"))
    return f"{count_text(int(ranks), 'rank')} in {count_text(int(modules), 'module')}" if ranks is not None and modules is not None else ""


def aggregation_text(item: pb.RoundView) -> str:
    """How far the folded LoRA pairs are from the exact mean of their products; empty where that was not told."""
    error = metric_of(item.fold_metrics, "aggregation_error")
    return f"aggregation error {error:.1%}" if error is not None else ""


def _measures(job: pb.JobView, metrics: Sequence[messages_pb2.Metric]) -> str:
    """The loss and the metric of the job; `--json` has the others."""
    first = metric_name(job)
    metrics = [metric for metric in metrics if metric.name in ("loss", first)]
    ordered = sorted(metrics, key=lambda metric: (metric.name != "loss", metric.name != first, metric.name))
    return ", ".join(
        f"{'eval loss' if metric.name == 'loss' else metric.name.replace('_', ' ')} {metric_text(metric.name, metric.value)}"
        for metric in ordered
    )


def _end(job: pb.JobView) -> str:
    took = f" after {duration_text(job.ended_unix_s - (job.started_unix_s or job.submitted_unix_s))}" if job.ended_unix_s else ""
    text = f"{state_word(job.state)}{took}, {job.rounds_committed} of {count_text(job.rounds_total, 'round')} committed"
    best = best_round(job)
    if best is not None and best.metrics:
        text += f"; best round {best.round}: {_measures(job, best.metrics)}"
    return f"{text}. {job.message}" if job.message else text


# --- the loops -------------------------------------------------------------------------------------------------------


class Notice:
    """The watch's own line, set by the client while it reconnects."""

    def __init__(self) -> None:
        self.text = ""

    def set(self, text: str) -> None:
        """Show `text`; an empty one takes it away."""
        self.text = text


async def show(views: AsyncIterator[pb.JobView], console: Console, notice: Notice, *, lines: bool) -> pb.JobView:
    """Follows a job until it has ended and returns its last view: drawn in place, or line by line."""
    return await (_show_lines(views, console, notice) if lines else _show_live(views, console, notice))


async def show_json(views: AsyncIterator[pb.JobView], out: TextIO) -> pb.JobView:
    """One JSON document a line for each view; returns the last one."""
    last = pb.JobView()
    async for view in views:
        last = view
        out.write(json.dumps(message_json(view), ensure_ascii=False) + "\n")
        out.flush()
    return last


async def _show_lines(views: AsyncIterator[pb.JobView], console: Console, notice: Notice) -> pb.JobView:
    announcer = Announcer()
    last = pb.JobView()
    async for view in views:
        last = view
        for line in announcer.lines(view):
            console.print(Text(f"{time.strftime('%H:%M:%S')}  {line}"), soft_wrap=True)
    return last


async def _show_live(views: AsyncIterator[pb.JobView], console: Console, notice: Notice) -> pb.JobView:
    last = pb.JobView()

    def picture() -> RenderableType:
        if not last.job_id:
            return Text(notice.text or "asking the coordinator", style="dim")
        return render(last, now_unix_s=time.time(), width=console.width, height=console.height, notice=notice.text)

    async def tick() -> None:
        # The clock and the reconnect notice move between views.
        while True:
            await asyncio.sleep(REFRESH_S)
            live.refresh()

    with Live(get_renderable=picture, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        ticking = asyncio.create_task(tick(), name="watch-tick")
        try:
            async for view in views:
                last = view
                live.refresh()
        finally:
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking
            live.refresh()
    return last

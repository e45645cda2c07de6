"""The figures of a testbed's run: Quality-under-Budget, Cost-to-Target, Robustness, and each device's own. Pure.

    run began (t = 0)        round 1 committed        round 2 committed            end
    |------------------------|------------------------|----------------------------|
    cost 0, initial metric   cost(t1), metric(1)      cost(t2), metric(2)

The cost of a quality is everything that was spent until the commit of the round that has it: wall seconds since the run began, and
of all devices together the bytes they sent, their processor seconds and, where every one of them can tell, their energy. So what is
spent on rounds that fail, on work done twice and on devices that are thrown out counts in full.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fleetune import tomltext
from fleetune.coordinator.rounds.machine import LOWER_IS_BETTER
from fleetune.coordinator.testbed import lanes, plain
from fleetune.coordinator.testbed.lanes import Activity, Fault, Lane
from fleetune.coordinator.testbed.meters import Meter, meter
from fleetune.coordinator.testbed.records import Record

Cost = Literal["wall_s", "sent_bytes", "upload_bytes", "cpu_s", "energy_j"]
COSTS: tuple[Cost, ...] = ("wall_s", "sent_bytes", "upload_bytes", "cpu_s", "energy_j")
"""`sent_bytes` are on the devices' interfaces, headers and all; `upload_bytes` the updates alone, as the coordinator counts them."""

PARTS_OF_BEST = (0.9, 0.95, 0.99)
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Of a metric between 0 and 1, so that two runs can be compared."""

BUDGETS_MAX = 6
UNFINISHED = "unfinished"
"""The status of a run whose record has no end."""

SHARES = frozenset({"accuracy", "macro_f1", "rouge1", "rouge2", "rougeL", "exact_match"})


@dataclass(frozen=True)
class Point:
    """A committed round's metric and what had been spent by then; round 0 is before the first one. None: not known."""

    round_number: int
    value: float
    costs: Mapping[Cost, float | None]


@dataclass(frozen=True)
class Quality:
    """Quality-under-Budget: the best metric among the rounds that were committed within a budget. None: there was none yet."""

    cost: Cost
    budget: float
    value: float | None
    round_number: int | None
    whole: bool
    """The budget is all that this run has spent."""


@dataclass(frozen=True)
class Target:
    """Cost-to-Target: what had been spent when a round first reached a level of the metric. `costs` is None where none did."""

    name: str
    level: float
    round_number: int | None
    costs: Mapping[Cost, float | None] | None


@dataclass(frozen=True)
class Recovery:
    """One fault and what came after it. Seconds from the run's beginning."""

    fault: Fault
    device_kind: str
    back_s: float | None
    """From its making until the member worked again; None: not before the end."""
    round_number: int
    """The round in which it was made; 0 outside of one."""
    was_at: Activity
    """What its member was at when it was made."""


@dataclass(frozen=True)
class Robustness:
    """How the job stood what happened to it."""

    rounds_asked: int
    """As the job says; of one that was content early, those that it made."""
    rounds_committed: int
    rounds_on_time: int
    """Committed within their due time; see `due`."""
    rounds_whole: int
    """Committed with an update of every device that was asked."""
    due: str
    """What "on time" means in this job, in words."""
    tasks_asked: int
    tasks_done: int
    tasks_failed: int
    tasks_lost: int
    """Not back when their round closed, or their device had gone."""
    tasks_refused: int
    tasks_late: int
    """Came after their round had closed."""
    tasks_retrained: int
    """Training that a device began anew within a round, since what it had was lost."""
    faults_made: Mapping[str, int]
    faults_not_made: int
    """Faults that the machine could not make; the notes say why."""
    faults_undone: int
    faults_open: int
    recoveries: tuple[Recovery, ...]
    back_count: int
    """Faults that met a member at work, and after which it worked again; `back_median_s` and `back_max_s` are of these."""
    back_median_s: float | None
    back_max_s: float | None
    out_of_memory_kills: int
    """Processes that the kernel killed in any member for lack of memory, faults included."""
    first_value: float | None
    final_value: float | None
    best_value: float | None
    best_round: int
    violations: tuple[str, ...] | None
    """Promises that the job's history breaks, in words; None where nobody has looked."""


@dataclass(frozen=True)
class DeviceFailure:
    """Why a task of a device had no result. `kind` is of the failure, "missed" or "refused"."""

    round_number: int
    kind: str
    stage: str
    message: str


@dataclass(frozen=True)
class DeviceFigures:
    """What one device did and used over the run. None: not known."""

    device: str
    kind: str
    cpus: float | None
    memory_mib: float | None
    up_mbit: float | None
    down_mbit: float | None
    online: bool | None
    """Whether it was ever seen at the coordinator."""
    rounds_asked: int
    rounds_done: int
    samples: int
    share: float
    """Of all samples folded, 0 to 1."""
    failed: int
    missed: int
    late: int
    refused: int
    retrained: int
    seconds: Mapping[Activity, float]
    cpu_s: float | None
    cpus_highest: float | None
    """Processors used at once, the most between two samples."""
    sent_bytes: float | None
    received_bytes: float | None
    up_mbit_highest: float | None
    down_mbit_highest: float | None
    memory_peak_bytes: int | None
    out_of_memory_kills: int | None
    energy_j: float | None
    faults: int
    failures: tuple[DeviceFailure, ...]
    failure: str
    """The last one by name, in words; empty where there was none."""


@dataclass(frozen=True)
class RoundFigures:
    """One committed round, in seconds from the run's beginning."""

    number: int
    begin_s: float
    end_s: float
    value: float | None
    folded: int
    asked: int
    on_time: bool


@dataclass(frozen=True)
class RunFigures:
    """All of a run."""

    testbed: str
    backend: str
    job_id: str
    job: str
    method: str
    base: str
    status: str
    message: str
    began_unix_s: float
    wall_s: float
    metric: str
    lower_is_better: bool
    spent: Mapping[Cost, float | None]
    """At the end of the record."""
    points: tuple[Point, ...]
    qualities: tuple[Quality, ...]
    targets: tuple[Target, ...]
    robustness: Robustness
    rounds: tuple[RoundFigures, ...]
    devices: tuple[DeviceFigures, ...]
    coordinator: DeviceFigures
    lanes: tuple[Lane, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Meters:
    sent: Meter
    received: Meter
    cpu: Meter
    energy: Meter


def run_figures(record: Record, levels: Sequence[float] = LEVELS) -> RunFigures:
    """Everything that the report tells. `levels` are the named targets of a metric between 0 and 1."""
    origin = record.origin_unix_s
    job = record.ended.report if record.ended is not None else {}
    drawn = lanes.lanes(record)
    meters = {
        lane.member: _Meters(
            sent=meter(record.samples, lane.member, lambda sample: sample.sent_bytes, origin),
            received=meter(record.samples, lane.member, lambda sample: sample.received_bytes, origin),
            cpu=meter(record.samples, lane.member, lambda sample: sample.cpu_s, origin),
            energy=meter(record.samples, lane.member, lambda sample: sample.energy_j, origin),
        )
        for lane in drawn
    }
    device_meters = {lane.member: meters[lane.member] for lane in drawn[:-1]}
    never_ran = {
        lane.member for lane in drawn[:-1] if not any(item.lives.get(lane.member) in ("running", "paused") for item in record.samples)
    }
    wall_s = record.end_unix_s - origin
    metric = _metric(job)
    lower = metric in LOWER_IS_BETTER
    points = _points(job, metric, origin, device_meters, never_ran)
    spent = _costs(wall_s, device_meters, never_ran, plain.number(job.get("upload_bytes")))
    rounds = _rounds(job, metric, origin)
    devices = tuple(_device(record, lane, meters[lane.member], job) for lane in drawn[:-1])
    notes = [*record.notes, *(record.ended.notes if record.ended is not None else [])]
    if record.checked is not None:  # what the run promised has been done since
        notes = [note for note in notes if not note.startswith("The history is checked when")]
    if job and plain.count(job.get("tasks_since_round")):
        notes.append(
            f"what devices did is told from round {plain.count(job.get('tasks_since_round'))} on; the job has more rounds than fit"
        )
    return RunFigures(
        testbed=plain.text(record.began.spec.get("name")),
        backend=record.began.backend,
        job_id=plain.text(job.get("job_id")) or record.began.job_id,
        job=plain.text(job.get("name")),
        method=plain.text(job.get("method")),
        base=plain.text(job.get("base")),
        status=record.ended.status if record.ended is not None else UNFINISHED,
        message=plain.text(job.get("message")),
        began_unix_s=origin,
        wall_s=wall_s,
        metric=metric,
        lower_is_better=lower,
        spent=spent,
        points=points,
        qualities=qualities(points, spent, lower),
        targets=targets(points, metric, levels),
        robustness=_robustness(record, job, drawn, rounds, devices, points, lower),
        rounds=rounds,
        devices=devices,
        coordinator=_device(record, drawn[-1], meters[drawn[-1].member], {}),
        lanes=drawn,
        notes=tuple(notes),
    )


# --- quality and cost


def _metric(job: Mapping[str, object]) -> str:
    """The one that the best round goes by, unless nothing but the loss was measured, or the loss beside something that people read."""
    named = plain.text(job.get("metric"))
    measured = [plain.table(item.get("metrics")) for item in plain.tables(job.get("history"))]
    if named and named != "loss" and any(named in item for item in measured):
        return named
    return "accuracy" if any("accuracy" in item for item in measured) else named or "loss"


def _points(
    job: Mapping[str, object], metric: str, origin_unix_s: float, meters: Mapping[str, _Meters], never_ran: set[str]
) -> tuple[Point, ...]:
    found: list[Point] = []
    initial = plain.number(plain.table(job.get("initial_metrics")).get(metric))
    if initial is not None:
        found.append(Point(0, initial, dict.fromkeys(COSTS, 0.0)))
    uploaded = 0.0
    for item in plain.tables(job.get("history")):
        uploaded += plain.number(item.get("upload_bytes")) or 0.0
        value, ended = plain.number(plain.table(item.get("metrics")).get(metric)), plain.number(item.get("ended_unix_s"))
        if value is not None and ended is not None:
            found.append(Point(plain.count(item.get("round")), value, _costs(ended - origin_unix_s, meters, never_ran, uploaded)))
    return tuple(found)


def _costs(at_s: float, meters: Mapping[str, _Meters], never_ran: set[str], upload_bytes: float | None) -> dict[Cost, float | None]:
    def of_all(chosen: Mapping[str, Meter]) -> float | None:
        # A sum that leaves a device out would be a lie; one that never ran has used nothing.
        if not chosen or any(not one.known for name, one in chosen.items() if name not in never_ran):
            return None
        return sum(one.until(at_s) for one in chosen.values())

    return {
        "wall_s": at_s,
        "sent_bytes": of_all({name: one.sent for name, one in meters.items()}),
        "upload_bytes": upload_bytes,
        "cpu_s": of_all({name: one.cpu for name, one in meters.items()}),
        "energy_j": of_all({name: one.energy for name, one in meters.items()}),
    }


def best_until(points: Sequence[Point], lower: bool) -> list[float]:
    """For each point the best value so far."""
    found: list[float] = []
    for point in points:
        found.append(point.value if not found else (min if lower else max)(found[-1], point.value))
    return found


def qualities(points: Sequence[Point], spent: Mapping[Cost, float | None], lower: bool) -> tuple[Quality, ...]:
    """Under round budgets, the same ones in every run, as far as this run went; and under all of what it spent."""
    found: list[Quality] = []
    for cost in COSTS:
        whole = spent[cost]
        if whole is None or whole <= 0 or (cost == "upload_bytes" and spent["sent_bytes"] is not None):
            continue
        for budget in (*budgets(cost, whole), whole):
            within = [point for point in points if (used := point.costs[cost]) is not None and used <= budget]
            best = (min if lower else max)(within, key=lambda point: point.value, default=None)
            found.append(Quality(cost, budget, best.value if best else None, best.round_number if best else None, budget == whole))
    return tuple(found)


def budgets(cost: Cost, whole: float) -> list[float]:
    """The highest round budgets below `whole`: 1, 2, 5 of each power of ten (of MiB for bytes); of time 10 s, 30 s, 1 min, 2 min, ..."""
    if cost == "wall_s":
        steps = [
            10.0,
            30.0,
            *(60.0 * number for number in (1, 2, 5, 10, 30)),
            *(3600.0 * number for number in (1, 2, 5, 10, 24, 48, 96, 168)),
        ]
    else:
        unit = float(1 << 20) if cost in ("sent_bytes", "upload_bytes") else 1.0
        steps = [unit * factor * 10.0**power for power in range(10) for factor in (1, 2, 5)]
    return [step for step in steps if step < whole][-(BUDGETS_MAX - 1) :]


def targets(points: Sequence[Point], metric: str, levels: Sequence[float]) -> tuple[Target, ...]:
    """Parts of the best value, and the named levels of a metric between 0 and 1.

    Of a metric that falls, a part of the best is a part of the way down from its first value: 90 % of 2.5 -> 0.5 is 0.7.
    """
    if not points:
        return ()
    lower = metric in LOWER_IS_BETTER
    first, best = points[0].value, best_until(points, lower)[-1]
    named = [(f"{part:.0%} of the best", first + part * (best - first) if lower else part * best) for part in PARTS_OF_BEST]
    named.append(("the best", best))
    if metric in SHARES:
        named += [(f"{level:.0%}", level) for level in levels]
    found: list[Target] = []
    for name, level in named:
        reached = next((point for point in points if (point.value <= level if lower else point.value >= level)), None)
        found.append(Target(name, level, reached.round_number if reached else None, reached.costs if reached else None))
    return tuple(found)


# --- rounds and robustness


def _rounds(job: Mapping[str, object], metric: str, origin_unix_s: float) -> tuple[RoundFigures, ...]:
    deadline_s, factor = _due(job)
    found: list[RoundFigures] = []
    for item in plain.tables(job.get("history")):
        begin, end = plain.number(item.get("started_unix_s")), plain.number(item.get("ended_unix_s"))
        if begin is None or end is None:
            continue
        plan = plain.table(item.get("plan"))
        actual_s, predicted_s = plain.number(plan.get("actual_s")), plain.number(plan.get("predicted_s"))
        in_time = not deadline_s or end - begin <= deadline_s
        if factor and actual_s is not None and predicted_s:
            in_time = in_time and actual_s <= factor * predicted_s
        found.append(
            RoundFigures(
                number=plain.count(item.get("round")),
                begin_s=begin - origin_unix_s,
                end_s=end - origin_unix_s,
                value=plain.number(plain.table(item.get("metrics")).get(metric)),
                folded=plain.count(item.get("updates_folded")),
                asked=len({plain.text(task.get("device_name")) for task in _trained(item)}),
                on_time=in_time,
            )
        )
    return tuple(found)


def _trained(round_view: Mapping[str, object]) -> list[Mapping[str, object]]:
    return [task for task in plain.tables(round_view.get("tasks")) if task.get("kind") not in ("evaluate", "measure")]


def _due(job: Mapping[str, object]) -> tuple[float, float]:
    """A round's deadline in seconds, and the factor over a planned round's prediction; 0 where there is none."""
    try:
        document = tomltext.parse(plain.text(job.get("job_toml")))
    except tomltext.TomlError:
        return 0.0, 0.0  # the coordinator took it, so it says no more than that this text was shortened
    deadline_s = plain.number(plain.table(document.get("rounds")).get("deadline_s")) or 0.0
    planned = any(plain.table(item.get("plan")) for item in plain.tables(job.get("history")))
    factor = plain.number(plain.table(document.get("method")).get("deadline_factor"))
    return deadline_s, (1.5 if factor is None else factor) if planned else 0.0


def _due_words(job: Mapping[str, object]) -> str:
    deadline_s, factor = _due(job)
    words = [f"within {deadline_s:g} s"] if deadline_s else []
    if factor:
        words.append(f"trained within {factor:g} times the plan")
    return " and ".join(words) or "the job has no deadline: every committed round counts"


def _robustness(
    record: Record,
    job: Mapping[str, object],
    drawn: Sequence[Lane],
    rounds: Sequence[RoundFigures],
    devices: Sequence[DeviceFigures],
    points: Sequence[Point],
    lower: bool,
) -> Robustness:
    committed = plain.count(job.get("rounds_committed")) or len(rounds)
    content = record.ended is not None and record.ended.status == "completed"
    history = plain.tables(job.get("history"))
    tasks = [task for item in history for task in _trained(item)]
    states = Counter(plain.text(task.get("state")) for task in tasks)
    recoveries = [
        Recovery(fault, lane.kind, lanes.back_s(fault, lane), _round_at(record, fault.begin_s), lanes.activity_at(lane, fault.begin_s))
        for lane in drawn
        for fault in lane.faults
    ]
    recoveries.sort(key=lambda item: item.fault.begin_s)
    # Who was idle may wait for its next task long after it is well.
    backs = [item.back_s for item in recoveries if item.back_s is not None and item.was_at in lanes.AT_WORK]
    kills = [lane_kills for member in drawn if (lane_kills := _kills(record, member.member)) is not None]
    made = [fault for lane in drawn for fault in lane.faults]
    best = best_until(points, lower)
    return Robustness(
        rounds_asked=committed if content else max(committed, plain.count(job.get("rounds_total"))),
        rounds_committed=committed,
        rounds_on_time=sum(item.on_time for item in rounds),
        rounds_whole=sum(item.asked > 0 and item.folded >= item.asked for item in rounds),
        due=_due_words(job),
        tasks_asked=len(tasks),
        tasks_done=states["done"],
        tasks_failed=states["failed"],
        tasks_lost=states["missed"],
        tasks_refused=states["refused"],
        tasks_late=max(states["late"], sum(plain.count(item.get("updates_late")) for item in history)),
        tasks_retrained=sum(device.retrained for device in devices),
        faults_made=dict(Counter(fault.kind for fault in made)),
        faults_not_made=sum(act.text.startswith(lanes.NOT_DONE) and act.act not in lanes.UNDOINGS for act in record.acts),
        faults_undone=sum(fault.end_s is not None and fault.kind != "out_of_memory" for fault in made),
        faults_open=sum(fault.end_s is None for fault in made),
        recoveries=tuple(recoveries),
        back_count=len(backs),
        back_median_s=statistics.median(backs) if backs else None,
        back_max_s=max(backs, default=None),
        out_of_memory_kills=sum(kills),
        first_value=points[0].value if points and points[0].round_number == 0 else None,
        final_value=points[-1].value if points and points[-1].round_number else None,
        best_value=best[-1] if best else None,
        best_round=plain.count(job.get("best_round")),
        violations=_violations(record),
    )


def _round_at(record: Record, at_s: float) -> int:
    origin = record.origin_unix_s
    return next((item.round_number for item in reversed(record.samples) if item.at_unix_s - origin <= at_s), 0)


def _violations(record: Record) -> tuple[str, ...] | None:
    if record.checked is None and not (record.ended is not None and record.ended.history):
        return None
    told = record.checked.history if record.checked is not None else record.ended.history if record.ended is not None else []
    found: list[str] = []
    for item in told:
        number = plain.count(item.get("round_number"))
        found.append(f"{plain.text(item.get('rule'))}{f' (round {number})' if number else ''}: {plain.text(item.get('message'))}")
    return tuple(found)


# --- devices


def _kills(record: Record, member: str) -> int | None:
    readings = [sample.out_of_memory_kills for item in record.samples if (sample := item.members.get(member)) is not None]
    known = [reading for reading in readings if reading is not None]
    if not known:
        return None
    return sum(after - before if after >= before else after for before, after in itertools.pairwise(known))


def _device(record: Record, lane: Lane, meters: _Meters, job: Mapping[str, object]) -> DeviceFigures:
    name = lane.member
    spec = plain.named(record.began.spec.get("devices"), "name", name)
    share = plain.named(job.get("devices"), "device", name)
    samples = [sample for item in record.samples if (sample := item.members.get(name)) is not None]
    peaks = [peak for sample in samples for peak in (sample.memory_peak_bytes, sample.memory_bytes) if peak is not None]
    kills = _kills(record, name)
    failures = _failures(job, name)
    online = _online(record, name)
    return DeviceFigures(
        device=name,
        kind=lane.kind,
        cpus=plain.number(spec.get("cpus")),
        memory_mib=plain.number(spec.get("memory_mib")),
        up_mbit=plain.number(spec.get("up_mbit")),
        down_mbit=plain.number(spec.get("down_mbit")),
        online=online,
        rounds_asked=plain.count(share.get("rounds_asked")),
        rounds_done=plain.count(share.get("rounds_done")),
        samples=plain.count(share.get("samples")),
        share=plain.number(share.get("share")) or 0.0,
        failed=plain.count(share.get("failed")),
        missed=plain.count(share.get("missed")),
        late=plain.count(share.get("late")),
        refused=plain.count(share.get("refused")),
        retrained=lanes.trained_again(record, name),
        seconds=lane.seconds(),
        cpu_s=meters.cpu.total if meters.cpu.known else None,
        cpus_highest=meters.cpu.fastest(),
        sent_bytes=meters.sent.total if meters.sent.known else None,
        received_bytes=meters.received.total if meters.received.known else None,
        up_mbit_highest=_mbit(meters.sent),
        down_mbit_highest=_mbit(meters.received),
        memory_peak_bytes=max(peaks, default=None),
        out_of_memory_kills=kills,
        energy_j=meters.energy.total if meters.energy.known else None,
        faults=len(lane.faults),
        failures=failures,
        failure=_named_failure(record, name, failures, online, len(lane.killings)),
    )


def _mbit(found: Meter) -> float | None:
    rate = found.fastest()
    return rate * 8 / 1e6 if rate is not None else None


def _online(record: Record, name: str) -> bool | None:
    if any(name in item.stages for item in record.samples):
        return True
    if record.ended is None:
        return None
    return any(item.get("name") == name for item in record.ended.devices)


def _failures(job: Mapping[str, object], name: str) -> tuple[DeviceFailure, ...]:
    """Of the committed rounds, then of the one that was open at the end, then the one that ended the job."""
    found: list[DeviceFailure] = []
    for item in plain.tables(job.get("failures")):
        if item.get("device") == name:
            found.append(_failure(plain.count(item.get("round")), plain.text(item.get("state")), item))
    current, committed = plain.table(job.get("current")), {plain.count(item.get("round")) for item in plain.tables(job.get("history"))}
    open_round = plain.count(current.get("round"))
    if open_round not in committed:
        for task in plain.tables(current.get("tasks")):
            state = plain.text(task.get("state"))
            if task.get("device_name") == name and state in ("failed", "missed", "refused"):
                found.append(_failure(open_round, state, plain.table(task.get("failure"))))
    last = plain.table(job.get("failure"))
    if job.get("failed_device") == name and not any(item.message == plain.text(last.get("message")) for item in found):
        found.append(_failure(open_round, "failed", last))
    return tuple(found)


def _failure(round_number: int, state: str, told: Mapping[str, object]) -> DeviceFailure:
    kind = plain.text(told.get("kind"))
    named = kind if kind not in ("", "unspecified") else state
    return DeviceFailure(round_number, named, plain.text(told.get("stage")), plain.text(told.get("message")))


def _named_failure(record: Record, name: str, failures: Sequence[DeviceFailure], online: bool | None, killings: int) -> str:
    named = [item for item in failures if item.kind not in ("missed", "refused")] or list(failures)
    if named:
        last = named[-1]
        return f"{last.kind.replace('_', ' ')}{f' ({last.stage})' if last.stage else ''}{f': {last.message}' if last.message else ''}"
    if record.ended is not None:
        view = plain.named(record.ended.devices, "name", name)
        if plain.count(view.get("failures")) and plain.text(view.get("last_failure")):
            return plain.text(view.get("last_failure"))
    if killings:
        return "out of memory: the kernel killed processes of it"
    return "it never came online" if online is False else ""

"""The rules, each a function over rows: no database, no clock.

    ack -> present      an acknowledged update is in its round, once, with the bytes and the weight it came with
    rounds              1, 2, 3, each from the state of the one before
    replay              the events lead to what is stored
    files               folders, manifests, links and blobs agree with the rows

The checker knows the tables and the round machine, not the engine: a mistake of the engine's cannot excuse itself here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from fleetune.coordinator.domain import ENDED, Blob, RoundEntry, Update
from fleetune.coordinator.history import replay
from fleetune.coordinator.history.facts import Acknowledgement, JobHistory, RoundFolder, StateFolder, Violation
from fleetune.coordinator.rounds import machine
from fleetune.coordinator.store.records import UpdateRow

ACKNOWLEDGED = frozenset({"accepted", "duplicate"})
"""Receipts that let a device drop its update."""


def check(state: StateFolder, acknowledgements: Iterable[Acknowledgement] = ()) -> list[Violation]:
    """Every broken rule, in the order of jobs; an empty list for a sound history."""
    found = list(state.unreadable)
    for job in state.jobs:
        for rule in (_rounds, _updates, replay.violations, _folders, _links):
            found += rule(job)
    return [*found, *_blobs(state), *_counts(state), *_acknowledged(state, acknowledgements)]


def _rounds(job: JobHistory) -> Iterator[Violation]:
    numbers = [row.number for row in job.rounds]
    if numbers != list(range(1, len(numbers) + 1)):
        yield Violation("round_gap", job.job_id, 0, f"the committed rounds are {_span(numbers)}")
    if job.machine.committed != max(numbers, default=0):
        yield Violation(
            "rounds_disagree", job.job_id, 0, f"the machine has committed {job.machine.committed} rounds, stored: {_span(numbers)}"
        )
    if job.status != job.machine.status:
        yield Violation("rounds_disagree", job.job_id, 0, f"the job's row says {job.status}, its machine {job.machine.status}")
    before = job.machine.prepared.state if job.machine.prepared is not None else None
    for row in job.rounds:
        entry = row.entry
        if entry.number != row.number or entry.phase != "committed":
            message = f"the entry tells of round {entry.number}, which is {entry.phase}"
            yield Violation("rounds_disagree", job.job_id, row.number, message)
        if entry.state != Blob(row.state_digest, row.state_bytes):
            yield Violation(
                "rounds_disagree", job.job_id, row.number, f"the row names state {row.state_digest[:12]}, the entry {_short(entry.state)}"
            )
        if entry.start_state != before:
            yield Violation("state_chain", job.job_id, row.number, f"it starts from {_short(entry.start_state)}, not from {_short(before)}")
        before = entry.state
    if job.machine.state is not None and job.machine.state != before:
        yield Violation(
            "state_chain", job.job_id, 0, f"the machine's state is {_short(job.machine.state)}, the last round's {_short(before)}"
        )


@dataclass(frozen=True)
class TaskName:
    """The parts of "<job>/<round>/<device>/<kind>[/<attempt>]"."""

    round_number: int
    device_id: str
    attempt: int


def task_name(task_id: str) -> TaskName:
    """Raises ValueError for anything else."""
    _, number, device_id, _, *attempt = task_id.split("/")
    return TaskName(int(number), device_id, int(attempt[0]) if attempt else 0)


def _updates(job: JobHistory) -> Iterator[Violation]:
    accepted = {row.task_id: row for row in job.updates if row.status == "accepted"}
    arrived: dict[str, Update] = {}
    taken_back: set[str] = set()
    for item in job.events:
        match item.event:
            case machine.UpdateArrived(task_id, update):
                if task_id in arrived and task_id not in taken_back:
                    message = f"{task_id} arrived twice, again in event {item.sequence}"
                    yield Violation("update_counted_twice", job.job_id, _number(task_id), message)
                arrived[task_id] = update
                taken_back.discard(task_id)
            case machine.UpdateDamaged(task_id):
                # Its bytes are gone: the device is asked for them again, and until then nothing counts.
                taken_back.add(task_id)
            case _:
                pass
    for task_id, update in arrived.items():
        row = accepted.get(task_id)
        if row is None and task_id not in taken_back:
            yield Violation("update_row_missing", job.job_id, _number(task_id), f"{task_id} was accepted by an event, no row says so")
        elif row is not None and row.digest != update.blob.digest:
            message = f"{task_id} arrived as {update.blob.digest[:12]}, its row says {row.digest[:12]}"
            yield Violation("update_differs", job.job_id, row.round_number, message)
    for row in accepted.values():
        if row.task_id not in arrived:
            yield Violation("update_without_event", job.job_id, row.round_number, f"{row.task_id} is accepted, no event tells of it")
    per_device = Counter((row.round_number, task_name(row.task_id).attempt, row.device_id) for row in accepted.values())
    for (number, _, device_id), count in per_device.items():
        if count > 1:
            yield Violation("update_counted_twice", job.job_id, number, f"device {device_id} has {count} accepted updates in one round")
    entries = {row.number: row.entry for row in job.rounds}
    for entry in entries.values():
        yield from _counted(job.job_id, entry, accepted, arrived)
    open_entry = job.machine.round
    if open_entry is not None:
        yield from _counted(job.job_id, open_entry, accepted, arrived)
    for row in accepted.values():
        yield from _present(job, row, entries.get(row.round_number))


def _counted(job_id: str, entry: RoundEntry, accepted: Mapping[str, UpdateRow], arrived: Mapping[str, Update]) -> Iterator[Violation]:
    """What counts in a round is what was accepted, as it came."""
    trained = entry.trained()
    for device_id, count in Counter(task.device_id for task in trained).items():
        if count > 1:
            yield Violation("update_counted_twice", job_id, entry.number, f"device {device_id} is folded {count} times")
    for task in trained:
        assert task.update is not None
        if task.update.samples <= 0:
            yield Violation("weight_not_positive", job_id, entry.number, f"{task.task_id} has weight {task.update.samples}")
        row, update = accepted.get(task.task_id), arrived.get(task.task_id)
        if row is None:
            yield Violation("update_row_missing", job_id, entry.number, f"{task.task_id} is folded, but has no row as accepted")
        elif row.digest != task.update.blob.digest:
            message = f"{task.task_id} is folded as {task.update.blob.digest[:12]}, its row says {row.digest[:12]}"
            yield Violation("update_differs", job_id, entry.number, message)
        if update is not None and update.samples != task.update.samples:
            message = f"{task.task_id} came with weight {update.samples} and is folded with {task.update.samples}"
            yield Violation("weight_differs", job_id, entry.number, message)
        if update is not None and update.blob != task.update.blob:
            message = f"{task.task_id} came as {_short(update.blob)} and is folded as {_short(task.update.blob)}"
            yield Violation("update_differs", job_id, entry.number, message)


def _present(job: JobHistory, row: UpdateRow, committed: RoundEntry | None) -> Iterator[Violation]:
    """An accepted update is in its round, unless that attempt at the round was given up."""
    name = task_name(row.task_id)
    if (name.round_number, name.device_id) != (row.round_number, row.device_id):
        yield Violation("update_differs", job.job_id, row.round_number, f"the row of {row.task_id} names device {row.device_id}")
    entry = committed
    if entry is None:
        if row.round_number != job.machine.committed + 1:
            yield Violation("update_out_of_turn", job.job_id, row.round_number, f"{row.task_id} is accepted for a round that never was")
            return
        entry = job.machine.round
    if entry is None:
        # The round was given up, and the job waits or has ended. The replay knows whether it was.
        return
    attempt = max((task_name(task.task_id).attempt for task in entry.tasks.values()), default=0)
    if name.attempt > attempt:
        yield Violation("update_out_of_turn", job.job_id, row.round_number, f"{row.task_id} is accepted for an attempt that never was")
    if name.attempt == attempt and row.task_id not in {task.task_id for task in entry.trained()}:
        yield Violation("update_lost", job.job_id, row.round_number, f"{row.task_id} was accepted and is not in its round")


def _folders(job: JobHistory) -> Iterator[Violation]:
    entries = {row.number: row.entry for row in job.rounds}
    for folder in job.folders:
        entry = entries.get(folder.number)
        if entry is None or entry.published is None:
            yield Violation("folder_differs", job.job_id, folder.number, "there is a folder of a round that was not committed")
            continue
        if Blob(folder.state_digest, folder.state_bytes) != entry.published:
            message = f"{folder.state_path.name} has digest {folder.state_digest[:12]}, committed was {_short(entry.published)}"
            yield Violation("folder_differs", job.job_id, folder.number, message)
        yield from _manifest(job.job_id, folder, entry)


def _manifest(job_id: str, folder: RoundFolder, entry: RoundEntry) -> Iterator[Violation]:
    if folder.manifest is None:
        yield Violation("manifest_differs", job_id, folder.number, "there is no manifest that can be read")
        return
    expected: dict[str, object] = {
        "job": job_id,
        "round": entry.number,
        "start_state": (entry.start_state.digest, entry.start_state.size_bytes) if entry.start_state else None,
        "state": (entry.state.digest, entry.state.size_bytes) if entry.state else None,
        "devices": [
            (task.device_id, task.update.samples, task.update.blob.size_bytes, task.update.blob.digest)
            for task in entry.trained()
            if task.update
        ],
    }
    found = {
        "job": folder.manifest.get("job"),
        "round": folder.manifest.get("round"),
        "start_state": _fields(folder.manifest.get("start_state"), "digest", "bytes"),
        "state": _fields(folder.manifest.get("state"), "digest", "bytes"),
        "devices": [_fields(item, "id", "weight", "bytes", "digest") for item in _items(folder.manifest.get("devices"))],
    }
    for name, value in expected.items():
        if found[name] != value:
            yield Violation(
                "manifest_differs", job_id, folder.number, f"its {name} is {_clipped(found[name])}, the entry says {_clipped(value)}"
            )


def _links(job: JobHistory) -> Iterator[Violation]:
    final, best = job.links.get("final"), job.links.get("best")
    if final is None:  # made at the very end: until then `best` may be one crash behind, and the next start mends it
        return
    if job.machine.status not in ENDED or final != job.machine.committed:
        message = f"final leads to round {final}; the job is {job.machine.status} after {job.machine.committed} rounds"
        yield Violation("link_differs", job.job_id, final, message)
    if best is not None and best != job.machine.best_round:
        yield Violation("link_differs", job.job_id, best, f"best leads to round {best}, the best was {job.machine.best_round}")


def _blobs(state: StateFolder) -> Iterator[Violation]:
    for row in state.blob_rows:
        yield from _there(state, row.job_id, Blob(row.digest, row.size_bytes), f"a row names the {row.kind}")
    for job in state.jobs:
        if job.machine.status in ENDED:
            continue
        needed = [(job.machine.state, "the job stands on the state")]
        if job.machine.round is not None:
            needed += [(task.update.blob, f"{task.task_id} was accepted as") for task in job.machine.round.trained() if task.update]
        for blob, why in needed:
            if blob is not None:
                yield from _there(state, job.job_id, blob, why)
    for name, file in state.blob_files.items():
        if file.digest != name:
            yield Violation("blob_damaged", "", 0, f"blob {name[:12]} has bytes of digest {file.digest[:12]}")


def _there(state: StateFolder, job_id: str, blob: Blob, why: str) -> Iterator[Violation]:
    file = state.blob_files.get(blob.digest)
    if file is None:
        yield Violation("blob_missing", job_id, 0, f"{why} {blob.digest[:12]}, which is not there")
    elif file.size_bytes != blob.size_bytes:
        yield Violation("blob_missing", job_id, 0, f"{why} {blob.digest[:12]} of {blob.size_bytes} bytes, which has {file.size_bytes}")


def _counts(state: StateFolder) -> Iterator[Violation]:
    rows = Counter(row.device_id for job in state.jobs for row in job.updates if row.status == "accepted")
    # A device is not blamed for what the coordinator's disk did: what was taken back still counts for it.
    taken_back = Counter(task_name(task_id).device_id for job in state.jobs for task_id in _damaged(job))
    for device_id, count in state.accepted_by_device.items():
        if not rows[device_id] <= count <= rows[device_id] + taken_back[device_id]:
            yield Violation(
                "count_differs", "", 0, f"device {device_id} counts {count} accepted updates, there are rows of {rows[device_id]}"
            )


def _acknowledged(state: StateFolder, acknowledgements: Iterable[Acknowledgement]) -> Iterator[Violation]:
    rows = {row.task_id: row for job in state.jobs for row in job.updates}
    damaged = {task_id for job in state.jobs for task_id in _damaged(job)}
    for ack in acknowledgements:
        if ack.status not in ACKNOWLEDGED or ack.task_id in damaged:
            continue
        row = rows.get(ack.task_id)
        job_id, number = ack.task_id.partition("/")[0], _number(ack.task_id)
        if row is None or row.status != "accepted":
            yield Violation("ack_lost", job_id, number, f"{ack.task_id} was answered {ack.status} and is not accepted")
        elif ack.digest and row.digest != ack.digest:
            message = f"{ack.task_id} was answered {ack.status} for {ack.digest[:12]}; stored is {row.digest[:12]}"
            yield Violation("ack_lost", job_id, number, message)


def _damaged(job: JobHistory) -> list[str]:
    """Tasks whose accepted update was lost by the disk, once for each time."""
    return [item.event.task_id for item in job.events if isinstance(item.event, machine.UpdateDamaged)]


def _number(task_id: str) -> int:
    try:
        return task_name(task_id).round_number
    except ValueError:
        return 0


def _fields(value: object, *names: str) -> tuple[object, ...] | None:
    return tuple(cast("Mapping[str, object]", value).get(name) for name in names) if isinstance(value, Mapping) else None


def _items(value: object) -> Sequence[object]:
    return cast("Sequence[object]", value) if isinstance(value, list) else ()


def _short(blob: Blob | None) -> str:
    return blob.digest[:12] if blob is not None else "nothing"


def _clipped(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _span(numbers: Sequence[int]) -> str:
    """ "1 to 3, 5": runs of rounds in the order in which they are stored."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in runs) or "none"

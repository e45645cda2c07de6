"""Reading and writing the tables' rows: machines, rounds, events, devices, blobs and log lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from pydantic import ConfigDict, TypeAdapter
from pydantic_core import to_json
from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from fleetune.coordinator.domain import RoundEntry
from fleetune.coordinator.rounds.machine import Event, JobMachine
from fleetune.coordinator.store import schema

LOG_LINES_PER_JOB = 20_000

ROUNDS_AT_ONCE = 20
"""Rows of rounds that a reader holds: one of a hundred devices has 50 KB and more."""

EPOCH_KEY = "epoch"
"""In `meta`: changes with every restore, so that results of a lost future are told apart."""

LOST_KEY = "lost"
"""In `meta`, where this database came out of a backup: from and to, in Unix seconds, of the time that it knows nothing of."""

RESTORED_KEY = "restored"
"""In `meta`, where this database came out of a backup: since when and of which time, for people."""

# Left alone, pydantic writes NaN as null, which is no number when it is read again. `| None`, because a dataclass by itself
# takes no settings from outside.
_JSON = ConfigDict(ser_json_inf_nan="constants")
_machine_json: TypeAdapter[JobMachine | None] = TypeAdapter(JobMachine | None, config=_JSON)
_round_json: TypeAdapter[RoundEntry | None] = TypeAdapter(RoundEntry | None, config=_JSON)


@dataclass(frozen=True)
class JobRow:
    """A job as it was submitted, with its machine."""

    job_id: str
    name: str
    submit_id: str
    toml: str
    submitted_unix_s: float
    machine: JobMachine


@dataclass(frozen=True)
class EventRow:
    unix_s: float
    job_id: str
    event: Event


@dataclass(frozen=True)
class UpdateRow:
    """The one result of a task that was answered with a receipt."""

    task_id: str
    job_id: str
    round_number: int
    device_id: str
    digest: str
    status: str
    unix_s: float


@dataclass(frozen=True)
class BlobRow:
    digest: str
    size_bytes: int
    kind: str
    job_id: str
    unix_s: float


@dataclass(frozen=True)
class DeviceRow:
    device_id: str
    name: str
    first_seen_unix_s: float
    last_seen_unix_s: float
    hello: bytes
    updates_accepted: int = 0
    failures: int = 0
    last_failure: str = ""
    quarantine: str = ""
    """Why it gets no tasks; empty: it is not in quarantine."""


@dataclass(frozen=True)
class LogRow:
    unix_s: float
    job_id: str
    round_number: int
    device_name: str
    text: str


def add_job(tx: Connection, row: JobRow) -> None:
    tx.execute(
        insert(schema.jobs).values(
            job_id=row.job_id,
            name=row.name,
            submit_id=row.submit_id,
            toml=row.toml,
            submitted_unix_s=row.submitted_unix_s,
            status=row.machine.status,
            machine=dump_machine(row.machine),
        )
    )


def save_machine(tx: Connection, job_id: str, status: str, machine_json: str) -> None:
    tx.execute(update(schema.jobs).where(schema.jobs.c.job_id == job_id).values(status=status, machine=machine_json))


def load_jobs(connection: Connection) -> list[JobRow]:
    """All jobs, oldest first."""
    rows = connection.execute(select(schema.jobs).order_by(schema.jobs.c.submitted_unix_s)).all()
    return [JobRow(r.job_id, r.name, r.submit_id, r.toml, r.submitted_unix_s, load_machine(cast(str, r.machine))) for r in rows]


def dump_machine(machine: JobMachine) -> str:
    return _machine_json.dump_json(machine).decode()


def load_machine(text: str) -> JobMachine:
    """The machine that `dump_machine` wrote. Raises pydantic's ValidationError for anything else."""
    machine = _machine_json.validate_json(text)
    assert machine is not None
    return machine


def save_round(tx: Connection, job_id: str, entry: RoundEntry) -> None:
    assert entry.state is not None
    tx.execute(
        upsert(schema.rounds)
        .values(
            job_id=job_id,
            round=entry.number,
            state_digest=entry.state.digest,
            state_bytes=entry.state.size_bytes,
            entry=_round_json.dump_json(entry).decode(),
        )
        .on_conflict_do_nothing()
    )


def load_rounds(connection: Connection, job_id: str, first: int = 1, last: int | None = None) -> Iterator[RoundEntry]:
    """The committed rounds `first` to `last` in order, one in memory at a time. To be read within the transaction of `connection`."""
    rounds = schema.rounds.c
    question = select(rounds.entry).where(rounds.job_id == job_id, rounds.round >= first).order_by(rounds.round)
    if last is not None:
        question = question.where(rounds.round <= last)
    for row in connection.execute(question.execution_options(yield_per=ROUNDS_AT_ONCE)):
        entry = _round_json.validate_json(cast(str, row.entry))
        assert entry is not None
        yield entry


def add_events(tx: Connection, rows: Sequence[EventRow]) -> None:
    if rows:
        tx.execute(insert(schema.events), [_event_values(row) for row in rows])


def add_updates(tx: Connection, rows: Sequence[UpdateRow]) -> None:
    if rows:
        tx.execute(
            upsert(schema.updates).on_conflict_do_nothing(),
            [
                {
                    "task_id": row.task_id,
                    "job_id": row.job_id,
                    "round": row.round_number,
                    "device_id": row.device_id,
                    "digest": row.digest,
                    "status": row.status,
                    "unix_s": row.unix_s,
                }
                for row in rows
            ],
        )


def find_update(connection: Connection, task_id: str) -> UpdateRow | None:
    row = connection.execute(select(schema.updates).where(schema.updates.c.task_id == task_id)).first()
    return UpdateRow(row.task_id, row.job_id, row.round, row.device_id, row.digest, row.status, row.unix_s) if row else None


def drop_updates(tx: Connection, task_ids: Sequence[str]) -> None:
    """Take acceptances back: the tasks may be answered with other bytes."""
    if task_ids:
        tx.execute(delete(schema.updates).where(schema.updates.c.task_id.in_(task_ids)))


def add_blobs(tx: Connection, rows: Sequence[BlobRow]) -> None:
    if rows:
        tx.execute(upsert(schema.blobs).on_conflict_do_nothing(), [row.__dict__ for row in rows])


def drop_blobs(tx: Connection, digests: Iterable[str]) -> None:
    doomed = list(digests)
    if doomed:
        tx.execute(delete(schema.blobs).where(schema.blobs.c.digest.in_(doomed)))


def blob_digests(connection: Connection) -> set[str]:
    return {cast(str, row.digest) for row in connection.execute(select(schema.blobs.c.digest))}


def save_device(tx: Connection, row: DeviceRow) -> None:
    """Insert, or refresh everything but the counters, the first sight and the quarantine."""
    statement = upsert(schema.devices).values(**row.__dict__)
    tx.execute(
        statement.on_conflict_do_update(
            index_elements=["device_id"],
            set_={"name": row.name, "last_seen_unix_s": row.last_seen_unix_s, "hello": row.hello},
        )
    )


def count_for_device(tx: Connection, device_id: str, accepted: int, failures: int, last_failure: str) -> None:
    values: dict[str, object] = {
        "updates_accepted": schema.devices.c.updates_accepted + accepted,
        "failures": schema.devices.c.failures + failures,
    }
    if last_failure:
        values["last_failure"] = last_failure
    tx.execute(update(schema.devices).where(schema.devices.c.device_id == device_id).values(**values))


def count_accepted(tx: Connection, device_ids: Sequence[str]) -> None:
    """One more accepted update for each of them. One statement for all: to make one takes longer than to run it."""
    if device_ids:
        devices = schema.devices.c
        mine = update(schema.devices).where(devices.device_id == bindparam("device"))
        tx.execute(mine.values(updates_accepted=devices.updates_accepted + 1), [{"device": device_id} for device_id in device_ids])


def load_devices(connection: Connection) -> list[DeviceRow]:
    return [_device(row) for row in connection.execute(select(schema.devices).order_by(schema.devices.c.name))]


def add_logs(tx: Connection, rows: Sequence[LogRow]) -> None:
    """Append; the oldest lines of a job over its bound go."""
    if not rows:
        return
    tx.execute(
        insert(schema.logs),
        [{"unix_s": r.unix_s, "job_id": r.job_id, "round": r.round_number, "device_name": r.device_name, "text": r.text} for r in rows],
    )
    for job_id in {row.job_id for row in rows}:
        mine = schema.logs.c.job_id == job_id
        newest = tx.execute(select(func.max(schema.logs.c.sequence)).where(mine)).scalar() or 0
        tx.execute(delete(schema.logs).where(mine, schema.logs.c.sequence <= newest - LOG_LINES_PER_JOB))


def load_logs(connection: Connection, job_id: str, device_name: str) -> list[LogRow]:
    question = select(schema.logs).where(schema.logs.c.job_id == job_id).order_by(schema.logs.c.sequence)
    if device_name:
        question = question.where(schema.logs.c.device_name == device_name)
    return [LogRow(r.unix_s, r.job_id, r.round, r.device_name, r.text) for r in connection.execute(question)]


def read_meta(connection: Connection, key: str) -> str | None:
    return connection.execute(select(schema.meta.c.value).where(schema.meta.c.key == key)).scalar()


def write_meta(tx: Connection, key: str, value: str) -> None:
    statement = upsert(schema.meta).values(key=key, value=value)
    tx.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": value}))


@dataclass(frozen=True)
class AuditRow:
    """What somebody asked for and what became of it: `outcome` is "done" or "refused", `detail` tells more."""

    unix_s: float
    actor: str
    action: str
    subject: str
    outcome: str
    detail: str = ""
    sequence: int = 0
    """Given by the database."""


def add_audit(tx: Connection, row: AuditRow) -> None:
    values = {"unix_s": row.unix_s, "actor": row.actor, "action": row.action, "subject": row.subject}
    tx.execute(insert(schema.audit).values(**values, outcome=row.outcome, detail=row.detail))


def load_audit(connection: Connection, limit: int) -> list[AuditRow]:
    """The newest `limit` rows, the newest last."""
    rows = connection.execute(select(schema.audit).order_by(schema.audit.c.sequence.desc()).limit(limit)).all()
    return [AuditRow(r.unix_s, r.actor, r.action, r.subject, r.outcome, r.detail, r.sequence) for r in reversed(rows)]


def _event_values(row: EventRow) -> dict[str, object]:
    body = to_json(row.event, inf_nan_mode="constants").decode()
    return {"unix_s": row.unix_s, "job_id": row.job_id, "kind": type(row.event).__name__, "body": body}


def _device(row: Row[tuple[object, ...]]) -> DeviceRow:
    return DeviceRow(**row._mapping)  # pyright: ignore[reportPrivateUsage]  # SQLAlchemy's public name for it

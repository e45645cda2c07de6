"""Tables of the coordinator's database, as the newest migration leaves them.

A change here comes with a revision in `migrations/versions`: new databases are made from these tables, older ones are brought to them,
and a test holds the two to the same result.

`jobs.machine` is the round machine as JSON: the truth from which a restart goes on. It is written in the same transaction as
the events that changed it. `events` is the history for people and for checkers; nothing reads it to decide.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, PrimaryKeyConstraint, String, Table, Text

SCHEMA_VERSION = 3

metadata = MetaData()

# Alembic's own: the revision that the tables have.
revision = Table("alembic_version", metadata, Column("version_num", String(32), nullable=False))
revision.append_constraint(PrimaryKeyConstraint("version_num", name="alembic_version_pkc"))

meta = Table("meta", metadata, Column("key", String, primary_key=True), Column("value", String, nullable=False))

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", String, primary_key=True),
    Column("name", String, nullable=False),
    # The operator's client makes it: a submit that is sent twice makes one job.
    Column("submit_id", String, nullable=False, unique=True),
    Column("toml", Text, nullable=False),
    Column("status", String, nullable=False),
    Column("machine", Text, nullable=False),
    Column("submitted_unix_s", Float, nullable=False),
    # Queued jobs start in this order.
    Index("jobs_by_time", "submitted_unix_s"),
)

rounds = Table(
    "rounds",
    metadata,
    Column("job_id", String, ForeignKey("jobs.job_id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("state_digest", String, nullable=False),
    Column("state_bytes", Integer, nullable=False),
    Column("entry", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("unix_s", Float, nullable=False),
    Column("job_id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("body", Text, nullable=False),
    # The story of one job, in order.
    Index("events_by_job", "job_id", "sequence"),
)

updates = Table(
    "updates",
    metadata,
    # One row a task, whatever the attempt: a result counts once.
    Column("task_id", String, primary_key=True),
    Column("job_id", String, nullable=False),
    Column("round", Integer, nullable=False),
    Column("device_id", String, nullable=False),
    Column("digest", String, nullable=False),
    Column("status", String, nullable=False),
    Column("unix_s", Float, nullable=False),
    Index("updates_by_job", "job_id", "round"),
)

devices = Table(
    "devices",
    metadata,
    Column("device_id", String, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("first_seen_unix_s", Float, nullable=False),
    Column("last_seen_unix_s", Float, nullable=False),
    # The last Hello, serialised.
    Column("hello", LargeBinary, nullable=False),
    Column("updates_accepted", Integer, nullable=False, default=0),
    Column("failures", Integer, nullable=False, default=0),
    Column("last_failure", Text, nullable=False, default=""),
    # Why it gets no tasks until an operator releases it; empty: it is not in quarantine.
    Column("quarantine", Text, nullable=False, default="", server_default=""),
)

blobs = Table(
    "blobs",
    metadata,
    Column("digest", String, primary_key=True),
    Column("size_bytes", Integer, nullable=False),
    # "state", "update", "optimizer" or "base"
    Column("kind", String, nullable=False),
    Column("job_id", String, nullable=False),
    Column("unix_s", Float, nullable=False),
    # What a job owns, for clearing up after it.
    Index("blobs_by_job", "job_id", "kind"),
)

logs = Table(
    "logs",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("unix_s", Float, nullable=False),
    Column("job_id", String, nullable=False),
    Column("round", Integer, nullable=False),
    Column("device_name", String, nullable=False),
    Column("text", Text, nullable=False),
    Index("logs_by_job", "job_id", "device_name", "sequence"),
)

audit = Table(
    "audit",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("unix_s", Float, nullable=False),
    # Who asked: name and the peer's address.
    Column("actor", String, nullable=False),
    # "submit", "cancel", "pause", "resume", "restore", "join", "revoke", "token create" and so on
    Column("action", String, nullable=False),
    # What it was about: a job's id, a device, an operator, a token's id, or the name that was asked for where there is none.
    Column("subject", String, nullable=False),
    # "done" or "refused"
    Column("outcome", String, nullable=False),
    Column("detail", Text, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    # Hex SHA-256 of the secret, which is kept nowhere.
    Column("digest", String, primary_key=True),
    # "agent" or "operator"
    Column("kind", String, nullable=False),
    Column("role", Integer, nullable=False),
    # The only name that it is good for; empty: any.
    Column("name", String, nullable=False),
    Column("replace", Boolean, nullable=False),
    Column("uses", Integer, nullable=False),
    Column("uses_left", Integer, nullable=False),
    Column("created_unix_s", Float, nullable=False),
    Column("expires_unix_s", Float, nullable=False),
    Column("creator", String, nullable=False),
    # 0: not revoked
    Column("revoked_unix_s", Float, nullable=False),
)

certificates = Table(
    "certificates",
    metadata,
    # Hex SHA-256 of its DER. One that is not in this table is not taken.
    Column("fingerprint", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    Column("device_id", String, nullable=False),
    Column("role", Integer, nullable=False),
    # Fingerprint of the root that signed it, and digest of the roots that went with it.
    Column("authority", String, nullable=False),
    Column("roots", String, nullable=False),
    # The token that it was given for; empty: renewed, or made by `fleetune init`.
    Column("token_id", String, nullable=False),
    Column("not_before_unix_s", Float, nullable=False),
    Column("not_after_unix_s", Float, nullable=False),
    Column("issued_unix_s", Float, nullable=False),
    # 0: nobody has come in with it yet
    Column("used_unix_s", Float, nullable=False),
    # 0: not revoked
    Column("revoked_unix_s", Float, nullable=False),
    # Who may have a name.
    Index("certificates_by_name", "kind", "name"),
    Index("certificates_by_device", "device_id"),
)

# Names that are refused whatever certificate they show: all there is to refuse by where another authority makes the certificates.
revoked_identities = Table(
    "revoked_identities",
    metadata,
    Column("kind", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("revoked_unix_s", Float, nullable=False),
    Column("reason", Text, nullable=False),
)

"""The first tables, which a program made that knew no revisions yet."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None


def upgrade() -> None:
    op.create_table("meta", sa.Column("key", sa.String, primary_key=True), sa.Column("value", sa.String, nullable=False))
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("submit_id", sa.String, nullable=False, unique=True),
        sa.Column("toml", sa.Text, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("machine", sa.Text, nullable=False),
        sa.Column("submitted_unix_s", sa.Float, nullable=False),
    )
    op.create_index("jobs_by_time", "jobs", ["submitted_unix_s"])
    op.create_table(
        "rounds",
        sa.Column("job_id", sa.String, sa.ForeignKey("jobs.job_id"), primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True),
        sa.Column("state_digest", sa.String, nullable=False),
        sa.Column("state_bytes", sa.Integer, nullable=False),
        sa.Column("entry", sa.Text, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("unix_s", sa.Float, nullable=False),
        sa.Column("job_id", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("events_by_job", "events", ["job_id", "sequence"])
    op.create_table(
        "updates",
        sa.Column("task_id", sa.String, primary_key=True),
        sa.Column("job_id", sa.String, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("device_id", sa.String, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("unix_s", sa.Float, nullable=False),
    )
    op.create_index("updates_by_job", "updates", ["job_id", "round"])
    op.create_table(
        "devices",
        sa.Column("device_id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
        sa.Column("first_seen_unix_s", sa.Float, nullable=False),
        sa.Column("last_seen_unix_s", sa.Float, nullable=False),
        sa.Column("hello", sa.LargeBinary, nullable=False),
        sa.Column("updates_accepted", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("last_failure", sa.Text, nullable=False),
    )
    op.create_table(
        "blobs",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("size_bytes", sa.Integer, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("job_id", sa.String, nullable=False),
        sa.Column("unix_s", sa.Float, nullable=False),
    )
    op.create_index("blobs_by_job", "blobs", ["job_id", "kind"])
    op.create_table(
        "logs",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("unix_s", sa.Float, nullable=False),
        sa.Column("job_id", sa.String, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("device_name", sa.String, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_index("logs_by_job", "logs", ["job_id", "device_name", "sequence"])

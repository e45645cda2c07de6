"""Who belongs to the fleet: tokens, certificates, revoked names, and devices in quarantine."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"


def upgrade() -> None:
    op.add_column("devices", sa.Column("quarantine", sa.Text, nullable=False, server_default=""))
    op.create_table(
        "tokens",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("role", sa.Integer, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("replace", sa.Boolean, nullable=False),
        sa.Column("uses", sa.Integer, nullable=False),
        sa.Column("uses_left", sa.Integer, nullable=False),
        sa.Column("created_unix_s", sa.Float, nullable=False),
        sa.Column("expires_unix_s", sa.Float, nullable=False),
        sa.Column("creator", sa.String, nullable=False),
        sa.Column("revoked_unix_s", sa.Float, nullable=False),
    )
    op.create_table(
        "certificates",
        sa.Column("fingerprint", sa.String, primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("device_id", sa.String, nullable=False),
        sa.Column("role", sa.Integer, nullable=False),
        sa.Column("authority", sa.String, nullable=False),
        sa.Column("roots", sa.String, nullable=False),
        sa.Column("token_id", sa.String, nullable=False),
        sa.Column("not_before_unix_s", sa.Float, nullable=False),
        sa.Column("not_after_unix_s", sa.Float, nullable=False),
        sa.Column("issued_unix_s", sa.Float, nullable=False),
        sa.Column("used_unix_s", sa.Float, nullable=False),
        sa.Column("revoked_unix_s", sa.Float, nullable=False),
    )
    op.create_index("certificates_by_name", "certificates", ["kind", "name"])
    op.create_index("certificates_by_device", "certificates", ["device_id"])
    op.create_table(
        "revoked_identities",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("revoked_unix_s", sa.Float, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )

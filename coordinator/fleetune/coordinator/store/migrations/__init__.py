"""Brings the database of an earlier program to the newest tables, one alembic revision after the other."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection

FOLDER = Path(__file__).resolve().parent


def upgrade(tx: Connection, to_revision: str = "head") -> None:
    """Run what is missing up to `to_revision`, inside the transaction of `tx`, which the caller commits or rolls back."""
    # Only here: a coordinator whose database is current never loads alembic.
    from alembic import command
    from alembic.config import Config

    config = Config()
    # The option is read with ConfigParser's interpolation.
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = tx
    command.upgrade(config, to_revision)

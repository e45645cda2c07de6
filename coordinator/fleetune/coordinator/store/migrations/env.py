"""What alembic runs for each upgrade: the revisions, on the connection that it was given."""

from __future__ import annotations

from typing import cast

from alembic import context
from sqlalchemy import Connection


def run() -> None:
    """The transaction is the caller's: it is one for all revisions, and SQLite takes tables back with it."""
    connection = cast(Connection, context.config.attributes["connection"])
    context.configure(connection=connection, transactional_ddl=True)
    context.run_migrations()


if __name__ == "env_py":  # the name under which alembic runs this file; an import of the module does nothing
    run()

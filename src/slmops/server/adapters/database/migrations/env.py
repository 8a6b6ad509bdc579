"""Alembic's entry: runs on the connection that ``migrate`` opened."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context

from slmops.server.adapters.database.schema import Moment, metadata


def render_item(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """Write our own column types by what they are in the database: a migration must not change with our code."""
    return "sa.BigInteger()" if kind == "type" and isinstance(item, Moment) else False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    render_item=render_item,
)
with context.begin_transaction():
    context.run_migrations()

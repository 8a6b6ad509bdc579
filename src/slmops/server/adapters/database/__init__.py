"""The store on SQLAlchemy Core: SQLite by default; nothing here but its pragmas is SQLite's own."""

from slmops.server.adapters.database.store import SqlStore

__all__ = ["SqlStore"]

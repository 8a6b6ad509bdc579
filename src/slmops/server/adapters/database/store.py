"""Connections and transactions.

One writer at a time within this process (a lock), and ``BEGIN IMMEDIATE`` against writers of other processes; readers
never wait (WAL). ``synchronous=FULL``: what was committed survives a power cut.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.pool import StaticPool

from slmops.core.errors import BugError, BusyError, ConflictError, NoSpaceError, SlmopsError, UsageError
from slmops.server.adapters.database.access import SqlAccess
from slmops.server.adapters.database.blueprints import SqlBlueprints
from slmops.server.adapters.database.devices import SqlDevices
from slmops.server.adapters.database.journal import SqlJournal
from slmops.server.adapters.database.migrate import migrate
from slmops.server.adapters.database.releases import SqlReleases
from slmops.server.adapters.database.rollouts import SqlRollouts

BUSY_TIMEOUT_MS = 10_000


class SqlTransaction:
    """The tables on one connection."""

    def __init__(self, connection: Connection) -> None:
        """Every table shares the transaction of this connection."""
        self.devices = SqlDevices(connection)
        self.access = SqlAccess(connection)
        self.releases = SqlReleases(connection)
        self.blueprints = SqlBlueprints(connection)
        self.rollouts = SqlRollouts(connection)
        self.journal = SqlJournal(connection)


class SqlStore:
    """A database by SQLAlchemy URL, brought to the newest schema when it is opened.

    Args:
        url: ``sqlite:////path/slmops.db``, ``sqlite://`` for one in memory, or another database's URL.

    Raises:
        VersionMismatchError: a newer slmops has written it.
        BusyError: another process holds it.
    """

    def __init__(self, url: str) -> None:
        """Open and migrate."""
        self._lock = threading.RLock()
        self._own = threading.local()
        self._in_memory = url in ("sqlite://", "sqlite:///:memory:")
        try:
            self._engine = _engine(url, self._in_memory)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"database URL cannot be used: {error}", hint="leave it out for SQLite in the data folder"
            ) from error
        with self._lock, _translated():
            migrate(self._engine)

    @staticmethod
    def in_folder(folder: Path) -> SqlStore:
        """The default database of a data folder."""
        return SqlStore(f"sqlite:///{folder / 'slmops.db'}")

    @property
    def engine(self) -> Engine:
        """For migrations and their tests."""
        return self._engine

    @contextmanager
    def read(self) -> Iterator[SqlTransaction]:
        """A transaction that sees one moment."""
        if not self._in_memory:
            with _translated(), self._engine.connect() as connection:
                yield SqlTransaction(connection)
            return
        with self._lock, _translated():  # one connection for everybody: a read inside a transaction joins it
            current: SqlTransaction | None = getattr(self._own, "transaction", None)
            if current is not None:
                yield current
                return
            with self._engine.connect() as connection:
                self._own.transaction = SqlTransaction(connection)
                try:
                    yield self._own.transaction
                finally:
                    self._own.transaction = None

    @contextmanager
    def write(self) -> Iterator[SqlTransaction]:
        """A transaction that commits at the end of the block or not at all."""
        with self._lock, _translated():
            if getattr(self._own, "transaction", None) is not None:
                raise BugError("a write transaction inside another transaction of the same thread")
            try:
                with (
                    self._engine.connect().execution_options(slmops_write=True) as connection,
                    connection.begin(),
                ):
                    self._own.transaction = SqlTransaction(connection)
                    yield self._own.transaction
            finally:
                self._own.transaction = None

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _engine(url: str, in_memory: bool) -> Engine:
    if in_memory:
        engine = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
    elif url.startswith("sqlite"):
        engine = create_engine(url, connect_args={"check_same_thread": False}, pool_size=16, max_overflow=48)
    else:
        return create_engine(url, pool_pre_ping=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        if not in_memory:
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("slmops_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


@contextmanager
def _translated() -> Iterator[None]:
    """Let no foreign error out."""
    try:
        yield
    except SlmopsError:
        raise
    except IntegrityError as error:
        raise ConflictError(
            f"this already exists: {error.orig}", hint="somebody else was faster: look again and repeat"
        ) from error
    except OperationalError as error:
        raise _operational(error) from error
    except DBAPIError as error:
        raise BusyError(f"database failed: {error.orig}", hint="look at the server's log and disk") from error


def _operational(error: OperationalError) -> SlmopsError:
    cause = error.orig
    text = str(cause)
    full = isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorname", "") == "SQLITE_FULL"
    if full or "disk is full" in text or (isinstance(cause, OSError) and cause.errno == errno.ENOSPC):
        return NoSpaceError(
            f"database cannot be written: {text}", hint="free disk in the server's data folder"
        )
    if "locked" in text or "busy" in text:
        return BusyError(
            f"database is locked: {text}", hint="another process writes to it: try again", retry_after_s=1
        )
    return BusyError(f"database failed: {text}", hint="check the data folder's disk and permissions")

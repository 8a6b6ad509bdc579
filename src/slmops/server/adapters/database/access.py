"""Tokens and sessions."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update

from slmops.core.errors import ConflictError
from slmops.server.adapters.database.rows import from_text, to_text
from slmops.server.adapters.database.schema import enrolment_tokens, operator_tokens, sessions
from slmops.server.ports.rows import EnrolmentTokenRow, OperatorTokenRow, SessionRow


class SqlAccess:
    """``AccessTable`` on one connection."""

    def __init__(self, connection: Connection) -> None:
        """Share the transaction of this connection."""
        self._connection = connection

    def add_enrolment_token(self, token: EnrolmentTokenRow) -> None:
        """Add an enrolment token."""
        self._connection.execute(
            insert(enrolment_tokens).values(
                sha256=token.sha256,
                uses=token.uses,
                used=token.used,
                expires_at=token.expires_at,
                labels=to_text(token.labels),
                created_by=token.created_by,
                created_at=token.created_at,
            )
        )

    def enrolment_token(self, sha256: str) -> EnrolmentTokenRow | None:
        """An enrolment token by its hash."""
        query = select(enrolment_tokens).where(enrolment_tokens.c.sha256 == sha256)
        row = self._connection.execute(query).one_or_none()
        if row is None:
            return None
        return EnrolmentTokenRow(
            sha256=row.sha256,
            uses=row.uses,
            used=row.used,
            expires_at=row.expires_at,
            labels=from_text(row.labels, dict[str, str]),
            created_by=row.created_by,
            created_at=row.created_at,
        )

    def use_enrolment_token(self, sha256: str) -> bool:
        """Count one use; False when none is left."""
        used = self._connection.execute(
            update(enrolment_tokens)
            .where(enrolment_tokens.c.sha256 == sha256, enrolment_tokens.c.used < enrolment_tokens.c.uses)
            .values(used=enrolment_tokens.c.used + 1)
        )
        return used.rowcount == 1

    def add_operator_token(self, token: OperatorTokenRow) -> None:
        """Add an operator token."""
        taken = select(operator_tokens.c.name).where(operator_tokens.c.name == token.name)
        if self._connection.execute(taken).first() is not None:
            raise ConflictError(
                f"an operator token named {token.name!r} exists", hint="choose another --name"
            )
        self._connection.execute(
            insert(operator_tokens).values(
                sha256=token.sha256,
                name=token.name,
                role=token.role,
                created_at=token.created_at,
                expires_at=token.expires_at,
            )
        )

    def operator_token(self, sha256: str) -> OperatorTokenRow | None:
        """An operator token by its hash."""
        query = select(operator_tokens).where(operator_tokens.c.sha256 == sha256)
        row = self._connection.execute(query).one_or_none()
        if row is None:
            return None
        return OperatorTokenRow(row.sha256, row.name, row.role, row.created_at, row.expires_at)

    def add_session(self, session: SessionRow) -> None:
        """Add a browser session."""
        self._connection.execute(
            insert(sessions).values(
                sha256=session.sha256, token_sha256=session.token_sha256, expires_at=session.expires_at
            )
        )

    def expire_sessions(self, now: datetime) -> None:
        """Forget sessions whose time is over."""
        self._connection.execute(delete(sessions).where(sessions.c.expires_at <= now))

    def session(self, sha256: str) -> SessionRow | None:
        """A session by its hash."""
        row = self._connection.execute(select(sessions).where(sessions.c.sha256 == sha256)).one_or_none()
        return None if row is None else SessionRow(row.sha256, row.token_sha256, row.expires_at)

    def end_session(self, sha256: str) -> None:
        """Forget a session."""
        self._connection.execute(delete(sessions).where(sessions.c.sha256 == sha256))

"""Events, the audit trail and named facts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from slmops.server.adapters.database.rows import from_text, to_text
from slmops.server.adapters.database.schema import audit, events, facts
from slmops.server.ports.rows import AuditRow, EventRow


class SqlJournal:
    """``JournalTable`` on one connection."""

    def __init__(self, connection: Connection) -> None:
        """Share the transaction of this connection."""
        self._connection = connection

    def event(self, at: datetime, kind: str, subject: str, detail: Mapping[str, Any]) -> None:
        """Add an event."""
        self._connection.execute(
            insert(events).values(at=at, kind=kind, subject=subject, detail=to_text(dict(detail)))
        )

    def events(self, after: int, limit: int = 500) -> list[EventRow]:
        """Events after an id, oldest first."""
        query = select(events).where(events.c.id > after).order_by(events.c.id).limit(limit)
        return [
            EventRow(row.id, row.at, row.kind, row.subject, from_text(row.detail, dict[str, Any]))
            for row in self._connection.execute(query)
        ]

    def last_event_id(self) -> int:
        """The newest event's id; 0 when there is none."""
        return int(self._connection.execute(select(func.max(events.c.id))).scalar() or 0)

    def audit(self, at: datetime, actor: str, action: str, subject: str, detail: Mapping[str, Any]) -> None:
        """Add to the audit trail."""
        self._connection.execute(
            insert(audit).values(
                at=at, actor=actor, action=action, subject=subject, detail=to_text(dict(detail))
            )
        )

    def audit_trail(self, limit: int = 100) -> list[AuditRow]:
        """Newest entries first."""
        query = select(audit).order_by(audit.c.id.desc()).limit(limit)
        return [
            AuditRow(
                row.id, row.at, row.actor, row.action, row.subject, from_text(row.detail, dict[str, Any])
            )
            for row in self._connection.execute(query)
        ]

    def fact(self, name: str) -> str | None:
        """A named fact."""
        return self._connection.execute(
            select(facts.c.value).where(facts.c.name == name)
        ).scalar_one_or_none()

    def set_fact(self, name: str, value: str | None) -> None:
        """Set or forget a named fact."""
        self._connection.execute(delete(facts).where(facts.c.name == name))
        if value is not None:
            self._connection.execute(insert(facts).values(name=name, value=value))

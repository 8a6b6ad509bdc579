"""Blueprints, all revisions."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, and_, func, insert, select

from slmops.core.errors import ConflictError
from slmops.server.adapters.database.schema import blueprints
from slmops.server.ports.rows import BlueprintRow


class SqlBlueprints:
    """``BlueprintTable`` on one connection."""

    def __init__(self, connection: Connection) -> None:
        """Share the transaction of this connection."""
        self._connection = connection

    def add(self, blueprint: BlueprintRow) -> None:
        """Add a revision."""
        if self.revision(blueprint.name, blueprint.revision) is not None:
            raise ConflictError(
                f"blueprint {blueprint.name} has revision {blueprint.revision} already", hint="apply it again"
            )
        self._connection.execute(
            insert(blueprints).values(
                {name: getattr(blueprint, name) for name in BlueprintRow.__dataclass_fields__}
            )
        )

    def current(self, name: str) -> BlueprintRow | None:
        """The newest revision."""
        return next(iter(self.history(name)), None)

    def revision(self, name: str, revision: int) -> BlueprintRow | None:
        """One revision."""
        query = select(blueprints).where(blueprints.c.name == name, blueprints.c.revision == revision)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else _blueprint(row)

    def history(self, name: str) -> list[BlueprintRow]:
        """All revisions, newest first."""
        query = select(blueprints).where(blueprints.c.name == name).order_by(blueprints.c.revision.desc())
        return [_blueprint(row) for row in self._connection.execute(query)]

    def all_current(self) -> list[BlueprintRow]:
        """The newest revision of every blueprint, by name."""
        newest = (
            select(blueprints.c.name, func.max(blueprints.c.revision).label("revision"))
            .group_by(blueprints.c.name)
            .subquery()
        )
        query = (
            select(blueprints)
            .join(
                newest,
                and_(blueprints.c.name == newest.c.name, blueprints.c.revision == newest.c.revision),
            )
            .order_by(blueprints.c.name)
        )
        return [_blueprint(row) for row in self._connection.execute(query)]


def _blueprint(row: Row[Any]) -> BlueprintRow:
    return BlueprintRow(**{name: getattr(row, name) for name in BlueprintRow.__dataclass_fields__})

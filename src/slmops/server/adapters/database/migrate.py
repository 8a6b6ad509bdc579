"""Bring a database to the newest schema with Alembic, from inside the package."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from slmops.core.errors import VersionMismatchError


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "slmops.server.adapters.database:migrations")
    config.set_main_option("path_separator", "os")
    return config


def migrate(engine: Engine) -> None:
    """Apply the migrations that this database has not seen, in one transaction each.

    Raises:
        VersionMismatchError: a newer slmops has written it.
    """
    config = _config()
    script = ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        if current == script.get_current_head():
            return
        known = {revision.revision for revision in script.walk_revisions()}
        if current is not None and current not in known:
            raise VersionMismatchError(
                f"the database has schema {current}, this slmops knows {script.get_current_head()}",
                hint="run the slmops version that wrote it, or a newer one",
                actual=current,
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

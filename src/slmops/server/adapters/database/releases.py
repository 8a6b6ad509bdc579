"""Releases and channels."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, func, insert, select

from slmops.core.errors import ConflictError
from slmops.server.adapters.database.schema import channels, releases
from slmops.server.ports.rows import ChannelRow, ReleaseRow


class SqlReleases:
    """``ReleaseTable`` on one connection."""

    def __init__(self, connection: Connection) -> None:
        """Share the transaction of this connection."""
        self._connection = connection

    def add(self, release: ReleaseRow) -> None:
        """Add a release."""
        if self.get(release.digest) is not None or self.named(release.model, release.version) is not None:
            raise ConflictError(
                f"release {release.model} {release.version} is published", hint="choose the next --version"
            )
        self._connection.execute(
            insert(releases).values(
                {name: getattr(release, name) for name in ReleaseRow.__dataclass_fields__}
            )
        )

    def get(self, digest: str) -> ReleaseRow | None:
        """A release by digest."""
        row = self._connection.execute(select(releases).where(releases.c.digest == digest)).one_or_none()
        return None if row is None else _release(row)

    def named(self, model: str, version: str) -> ReleaseRow | None:
        """A release by name."""
        query = select(releases).where(releases.c.model == model, releases.c.version == version)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else _release(row)

    def all(self, model: str | None = None) -> list[ReleaseRow]:
        """Releases, newest first."""
        query = select(releases).order_by(
            releases.c.published_at.desc(), releases.c.release_seq.desc(), releases.c.digest
        )
        if model is not None:
            query = query.where(releases.c.model == model)
        return [_release(row) for row in self._connection.execute(query)]

    def set_channel(self, entry: ChannelRow) -> None:
        """Add to a channel's history."""
        self._connection.execute(
            insert(channels).values({name: getattr(entry, name) for name in ChannelRow.__dataclass_fields__})
        )

    def channel(self, model: str, channel: str) -> ChannelRow | None:
        """Where a channel points now."""
        return next(iter(self.channel_history(model, channel)), None)

    def channels(self) -> list[ChannelRow]:
        """Where every channel points now."""
        newest = select(func.max(channels.c.id)).group_by(channels.c.model, channels.c.channel)
        query = (
            select(channels).where(channels.c.id.in_(newest)).order_by(channels.c.model, channels.c.channel)
        )
        return [_channel(row) for row in self._connection.execute(query)]

    def channel_history(self, model: str, channel: str) -> list[ChannelRow]:
        """A channel's history, newest first."""
        query = (
            select(channels)
            .where(channels.c.model == model, channels.c.channel == channel)
            .order_by(channels.c.id.desc())
        )
        return [_channel(row) for row in self._connection.execute(query)]


def _release(row: Row[Any]) -> ReleaseRow:
    return ReleaseRow(**{name: getattr(row, name) for name in ReleaseRow.__dataclass_fields__})


def _channel(row: Row[Any]) -> ChannelRow:
    return ChannelRow(**{name: getattr(row, name) for name in ChannelRow.__dataclass_fields__})

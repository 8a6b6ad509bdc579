"""Rollouts, their devices and their outbox."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, insert, select, update

from slmops.core.errors import ConflictError
from slmops.core.rollout.judge import DeviceStatus
from slmops.core.rollout.machine import ENDED, Phase, RolloutState
from slmops.protocol.messages import GoldenReport
from slmops.server.adapters.database.rows import from_text, to_text
from slmops.server.adapters.database.schema import members, outbox, rollouts
from slmops.server.ports.rows import JudgementRow, MemberRow, OutboxRow, RolloutRow

_SAVE_MEMBER = (
    update(members)
    .where(members.c.rollout_id == bindparam("b_rollout_id"), members.c.device_id == bindparam("b_device_id"))
    .values(
        {
            column.name: bindparam(f"b_{column.name}")
            for column in members.columns
            if column.name not in ("rollout_id", "device_id")
        }
    )
)


class SqlRollouts:
    """``RolloutTable`` on one connection."""

    def __init__(self, connection: Connection) -> None:
        """Share the transaction of this connection."""
        self._connection = connection

    def add(self, rollout: RolloutRow, members: Sequence[MemberRow]) -> None:
        """Add a rollout with its devices."""
        self._connection.execute(insert(rollouts).values(id=rollout.id, **_rollout_values(rollout)))
        self.add_members(members)

    def get(self, rollout_id: str) -> RolloutRow | None:
        """One rollout."""
        row = self._connection.execute(select(rollouts).where(rollouts.c.id == rollout_id)).one_or_none()
        return None if row is None else _rollout(row)

    def all(self, phases: Collection[Phase] | None = None) -> list[RolloutRow]:
        """Rollouts (in these phases), newest first."""
        query = select(rollouts).order_by(rollouts.c.number.desc())
        if phases is not None:
            query = query.where(rollouts.c.phase.in_([phase.value for phase in phases]))
        return [_rollout(row) for row in self._connection.execute(query)]

    def latest(self, blueprint: str) -> RolloutRow | None:
        """The newest rollout of a blueprint."""
        query = (
            select(rollouts)
            .where(rollouts.c.blueprint == blueprint)
            .order_by(rollouts.c.number.desc())
            .limit(1)
        )
        row = self._connection.execute(query).one_or_none()
        return None if row is None else _rollout(row)

    def save(self, rollout: RolloutRow) -> None:
        """Write state, judgement and end of a rollout."""
        values = _rollout_values(rollout)
        values["row_version"] = rollout.row_version + 1
        changed = self._connection.execute(
            update(rollouts)
            .where(rollouts.c.id == rollout.id, rollouts.c.row_version == rollout.row_version)
            .values(values)
        )
        if changed.rowcount != 1:
            raise ConflictError(f"rollout {rollout.id} was changed meanwhile", hint="read it again")

    def members(self, rollout_id: str) -> list[MemberRow]:
        """Devices of a rollout by wave and position."""
        query = (
            select(members)
            .where(members.c.rollout_id == rollout_id)
            .order_by(members.c.wave, members.c.position, members.c.device_id)
        )
        return [_member(row) for row in self._connection.execute(query)]

    def add_members(self, rows: Sequence[MemberRow]) -> None:
        """Take devices in."""
        if rows:
            self._connection.execute(insert(members), [_member_values(row) for row in rows])

    def save_members(self, rows: Sequence[MemberRow]) -> None:
        """Write devices of a rollout."""
        if rows:
            values = [{f"b_{name}": value for name, value in _member_values(row).items()} for row in rows]
            self._connection.execute(_SAVE_MEMBER, values)

    def unsettled_after_end(self, since: datetime) -> list[str]:
        """Rollouts that ended after ``since``, of which some device has not reported its outcome yet."""
        query = (
            select(members.c.rollout_id)
            .join(rollouts, rollouts.c.id == members.c.rollout_id)
            .where(
                rollouts.c.phase.in_([phase.value for phase in ENDED]),
                rollouts.c.ended_at > since,
                members.c.status.in_([DeviceStatus.OFFERED.value, DeviceStatus.IN_PROGRESS.value]),
            )
            .distinct()
        )
        return sorted(str(name) for name in self._connection.execute(query).scalars())

    def reverting(self) -> set[str]:
        """Devices that some rollout is taking back now."""
        query = (
            select(members.c.device_id)
            .join(rollouts, rollouts.c.id == members.c.rollout_id)
            .where(rollouts.c.phase == Phase.ROLLING_BACK.value, members.c.revert.in_(["wanted", "ordered"]))
        )
        return {str(name) for name in self._connection.execute(query).scalars()}

    def post(self, rollout_id: str, kind: str, arguments: Mapping[str, Any], at: datetime) -> None:
        """Put a command into the outbox."""
        self._connection.execute(
            insert(outbox).values(
                rollout_id=rollout_id, kind=kind, arguments=to_text(dict(arguments)), posted_at=at
            )
        )

    def outbox(self, rollout_id: str | None = None) -> list[OutboxRow]:
        """Commands that are not done, oldest first."""
        query = select(outbox).where(outbox.c.done_at.is_(None)).order_by(outbox.c.id)
        if rollout_id is not None:
            query = query.where(outbox.c.rollout_id == rollout_id)
        return [
            OutboxRow(row.id, row.rollout_id, row.kind, from_text(row.arguments, dict[str, Any]))
            for row in self._connection.execute(query)
        ]

    def done(self, outbox_id: int, at: datetime) -> None:
        """Mark a command as carried out."""
        self._connection.execute(update(outbox).where(outbox.c.id == outbox_id).values(done_at=at))


def _rollout_values(rollout: RolloutRow) -> dict[str, Any]:
    state = rollout.state
    return {
        "blueprint": rollout.blueprint,
        "revision": rollout.revision,
        "model": rollout.model,
        "version": rollout.version,
        "release_digest": rollout.release_digest,
        "phase": state.phase.value,
        "wave": state.wave,
        "since": state.since,
        "approved_by": to_text(state.approved_by),
        "reason": state.reason,
        "resume_to": None if state.resume_to is None else state.resume_to.value,
        "created_at": rollout.created_at,
        "created_by": rollout.created_by,
        "row_version": rollout.row_version,
        "holdback": to_text(rollout.holdback),
        "ended_at": rollout.ended_at,
        "judgement": None if rollout.judgement is None else to_text(rollout.judgement),
    }


def _rollout(row: Row[Any]) -> RolloutRow:
    state = RolloutState(
        phase=Phase(row.phase),
        wave=row.wave,
        since=row.since,
        approved_by=from_text(row.approved_by, tuple[str, ...]),
        reason=row.reason,
        resume_to=None if row.resume_to is None else Phase(row.resume_to),
    )
    return RolloutRow(
        id=row.id,
        blueprint=row.blueprint,
        revision=row.revision,
        model=row.model,
        version=row.version,
        release_digest=row.release_digest,
        state=state,
        created_at=row.created_at,
        created_by=row.created_by,
        row_version=row.row_version,
        holdback=from_text(row.holdback, tuple[str, ...]),
        ended_at=row.ended_at,
        judgement=None if row.judgement is None else from_text(row.judgement, JudgementRow),
    )


def _member_values(member: MemberRow) -> dict[str, Any]:
    values = {name: getattr(member, name) for name in MemberRow.__dataclass_fields__}
    values["status"] = member.status.value
    values["tried"] = to_text(member.tried)
    values["running_matches"] = int(member.running_matches)
    values["golden"] = None if member.golden is None else to_text(member.golden)
    values["ratios"] = to_text(member.ratios)
    return values


def _member(row: Row[Any]) -> MemberRow:
    values = {name: getattr(row, name) for name in MemberRow.__dataclass_fields__}
    values["status"] = DeviceStatus(row.status)
    values["tried"] = from_text(row.tried, tuple[str, ...])
    values["running_matches"] = bool(row.running_matches)
    values["golden"] = None if row.golden is None else from_text(row.golden, GoldenReport)
    values["ratios"] = from_text(row.ratios, dict[str, float])
    return MemberRow(**values)

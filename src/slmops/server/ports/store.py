"""The store: transactions over the tables of one subject each.

``with store.write() as tx`` commits at the end of the block or not at all; ``store.read()`` sees one moment. Adapters
let only ``SlmopsError`` out: BusyError when the database is locked or gone, NoSpaceError when its disk is full.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Protocol

from slmops.core.rollout.machine import Phase
from slmops.protocol.messages import Assignment
from slmops.server.ports.rows import (
    AuditRow,
    BlueprintRow,
    ChannelRow,
    CheckinWrite,
    DeviceRow,
    EnrolmentTokenRow,
    EventRow,
    MemberRow,
    OperatorTokenRow,
    OutboxRow,
    OutcomeRow,
    ReleaseRow,
    RolloutRow,
    SessionRow,
)


class DeviceTable(Protocol):
    """Devices, their orders and what they reported."""

    def add(self, device: DeviceRow) -> None:
        """Add a device.

        Raises:
            ConflictError: the id is taken.
        """

    def get(self, device_id: str) -> DeviceRow | None:
        """One device."""

    def by_enrolment(self, token_sha256: str, public_key_pem: str) -> DeviceRow | None:
        """The device that was enrolled with this token and key."""

    def ids_with_prefix(self, prefix: str) -> set[str]:
        """Ids that begin so."""

    def all(self, ids: Collection[str] | None = None) -> list[DeviceRow]:
        """All devices (or these) by id, retired ones too."""

    def set_labels(self, device_id: str, labels: Mapping[str, str]) -> None:
        """Replace a device's labels."""

    def retire(self, device_id: str, at: datetime) -> None:
        """Mark a device as retired."""

    def assign(self, device_id: str, assignment: Assignment, at: datetime) -> None:
        """Make this the device's current order, and keep it in the history.

        Raises:
            ConflictError: its generation is not above the device's.
        """

    def ahead(self) -> list[DeviceRow]:
        """Devices that acted upon a generation which this database never issued: it was restored from a backup."""

    def set_generation(self, device_id: str, generation: int) -> None:
        """Skip generations, so that the next order is above what the device has seen."""

    def assigned(self, assignment_digest: str) -> Assignment | None:
        """The newest ``run`` order with this digest, whoever got it."""

    def record(self, checkins: Sequence[CheckinWrite]) -> None:
        """Write accepted check-ins, in order; the same outcome twice is one."""

    def outcomes(self, device_id: str, limit: int = 50) -> list[OutcomeRow]:
        """A device's outcomes, newest first."""

    def rollout_outcomes(self, rollout_id: str) -> list[OutcomeRow]:
        """All outcomes of a rollout, oldest first."""

    def latest_commit(self, device_id: str, assignment_digest: str) -> OutcomeRow | None:
        """The newest commit of this digest on this device that carries a golden result."""


class AccessTable(Protocol):
    """Tokens and sessions."""

    def add_enrolment_token(self, token: EnrolmentTokenRow) -> None:
        """Add an enrolment token."""

    def enrolment_token(self, sha256: str) -> EnrolmentTokenRow | None:
        """An enrolment token by its hash."""

    def use_enrolment_token(self, sha256: str) -> bool:
        """Count one use; False when none is left."""

    def add_operator_token(self, token: OperatorTokenRow) -> None:
        """Add an operator token.

        Raises:
            ConflictError: the name is taken.
        """

    def operator_token(self, sha256: str) -> OperatorTokenRow | None:
        """An operator token by its hash."""

    def add_session(self, session: SessionRow) -> None:
        """Add a browser session."""

    def expire_sessions(self, now: datetime) -> None:
        """Forget sessions whose time is over."""

    def session(self, sha256: str) -> SessionRow | None:
        """A session by its hash."""

    def end_session(self, sha256: str) -> None:
        """Forget a session."""


class ReleaseTable(Protocol):
    """Releases and channels."""

    def add(self, release: ReleaseRow) -> None:
        """Add a release.

        Raises:
            ConflictError: digest or model and version are taken.
        """

    def get(self, digest: str) -> ReleaseRow | None:
        """A release by digest."""

    def named(self, model: str, version: str) -> ReleaseRow | None:
        """A release by name."""

    def all(self, model: str | None = None) -> list[ReleaseRow]:
        """Releases, newest first."""

    def set_channel(self, entry: ChannelRow) -> None:
        """Add to a channel's history."""

    def channel(self, model: str, channel: str) -> ChannelRow | None:
        """Where a channel points now."""

    def channels(self) -> list[ChannelRow]:
        """Where every channel points now."""

    def channel_history(self, model: str, channel: str) -> list[ChannelRow]:
        """A channel's history, newest first."""


class BlueprintTable(Protocol):
    """Blueprints, all revisions."""

    def add(self, blueprint: BlueprintRow) -> None:
        """Add a revision.

        Raises:
            ConflictError: the revision exists.
        """

    def current(self, name: str) -> BlueprintRow | None:
        """The newest revision."""

    def revision(self, name: str, revision: int) -> BlueprintRow | None:
        """One revision."""

    def history(self, name: str) -> list[BlueprintRow]:
        """All revisions, newest first."""

    def all_current(self) -> list[BlueprintRow]:
        """The newest revision of every blueprint, by name."""


class RolloutTable(Protocol):
    """Rollouts, their devices and their outbox."""

    def add(self, rollout: RolloutRow, members: Sequence[MemberRow]) -> None:
        """Add a rollout with its devices."""

    def get(self, rollout_id: str) -> RolloutRow | None:
        """One rollout."""

    def all(self, phases: Collection[Phase] | None = None) -> list[RolloutRow]:
        """Rollouts (in these phases), newest first."""

    def latest(self, blueprint: str) -> RolloutRow | None:
        """The newest rollout of a blueprint."""

    def save(self, rollout: RolloutRow) -> None:
        """Write state, judgement and end of a rollout.

        Raises:
            ConflictError: it was written by somebody else since it was read.
        """

    def members(self, rollout_id: str) -> list[MemberRow]:
        """Devices of a rollout by wave and position."""

    def add_members(self, members: Sequence[MemberRow]) -> None:
        """Take devices in."""

    def save_members(self, members: Sequence[MemberRow]) -> None:
        """Write devices of a rollout."""

    def unsettled_after_end(self, since: datetime) -> list[str]:
        """Rollouts that ended after ``since``, of which some device has not reported its outcome yet."""

    def reverting(self) -> set[str]:
        """Devices that some rollout is taking back now."""

    def post(self, rollout_id: str, kind: str, arguments: Mapping[str, Any], at: datetime) -> None:
        """Put a command into the outbox."""

    def outbox(self, rollout_id: str | None = None) -> list[OutboxRow]:
        """Commands that are not done, oldest first."""

    def done(self, outbox_id: int, at: datetime) -> None:
        """Mark a command as carried out."""


class JournalTable(Protocol):
    """Events, the audit trail, and a few named facts about the server itself."""

    def event(self, at: datetime, kind: str, subject: str, detail: Mapping[str, Any]) -> None:
        """Add an event."""

    def events(self, after: int, limit: int = 500) -> list[EventRow]:
        """Events after an id, oldest first."""

    def last_event_id(self) -> int:
        """The newest event's id; 0 when there is none."""

    def audit(self, at: datetime, actor: str, action: str, subject: str, detail: Mapping[str, Any]) -> None:
        """Add to the audit trail."""

    def audit_trail(self, limit: int = 100) -> list[AuditRow]:
        """Newest entries first."""

    def fact(self, name: str) -> str | None:
        """A named fact."""

    def set_fact(self, name: str, value: str | None) -> None:
        """Set or forget a named fact."""


class Transaction(Protocol):
    """Everything that can be read or written within one transaction."""

    @property
    def devices(self) -> DeviceTable:
        """Devices."""

    @property
    def access(self) -> AccessTable:
        """Tokens and sessions."""

    @property
    def releases(self) -> ReleaseTable:
        """Releases and channels."""

    @property
    def blueprints(self) -> BlueprintTable:
        """Blueprints."""

    @property
    def rollouts(self) -> RolloutTable:
        """Rollouts."""

    @property
    def journal(self) -> JournalTable:
        """Events and audit."""


class Store(Protocol):
    """A database."""

    def read(self) -> AbstractContextManager[Transaction]:
        """A transaction that only reads."""

    def write(self) -> AbstractContextManager[Transaction]:
        """A transaction that commits at the end of the block; nested blocks of one thread are an error."""

    def close(self) -> None:
        """Close all connections."""

"""Rows as the services see them: frozen values, times UTC-aware, documents already decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from slmops.core.rollout.judge import DeviceStatus
from slmops.core.rollout.machine import RolloutState
from slmops.protocol.messages import Assignment, Facts, GoldenReport, OutcomeReport


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device: what it was enrolled as, what it should run, and what it last said.

    Attributes:
        enrolment_token_sha256: the token it came with; lets a retried enrolment find its device again.
        generation: highest generation ever issued for it. ``reported_generation`` above it means that this database
            is older than what the device has seen: it was restored from a backup.
        delivered_generation: highest generation that was put into a response.
        assignment: its current order.
        seq: of the last accepted check-in; ``content_sha256`` is that check-in's digest, for repeated requests.
        reported_generation: highest generation that it acted upon.
        release_sha256: release digest behind ``running``, as reported.
    """

    id: str
    profile: str
    labels: dict[str, str]
    public_key_pem: str
    enrolment_token_sha256: str
    enrolled_at: datetime
    facts: Facts
    retired_at: datetime | None = None
    generation: int = 0
    delivered_generation: int = 0
    assignment: Assignment | None = None
    last_seen_at: datetime | None = None
    boot_id: str = ""
    seq: int = 0
    content_sha256: str = ""
    reported_generation: int = 0
    phase: str = ""
    running: str = ""
    release_sha256: str = ""
    candidate: str = ""
    fetched_bytes: int = 0
    requests: int = 0
    failed_requests: int = 0
    stale_since: str = ""

    def selector_labels(self) -> dict[str, str]:
        """Labels for selectors: the device's own, and its profile and id, which no label can forge."""
        return {**self.labels, "profile": self.profile, "id": self.id}


@dataclass(frozen=True, slots=True)
class CheckinWrite:
    """Everything that one accepted check-in changes.

    Attributes:
        facts: only when they changed.
        outcome: only when the device sent one; the same one may come many times.
    """

    device_id: str
    at: datetime
    boot_id: str
    seq: int
    content_sha256: str
    delivered_generation: int
    reported_generation: int
    phase: str
    running: str
    release_sha256: str
    candidate: str
    fetched_bytes: int
    requests: int
    failed_requests: int
    stale_since: str
    facts: Facts | None = None
    outcome: OutcomeReport | None = None


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """An outcome report with the time at which it was taken."""

    id: int
    device_id: str
    received_at: datetime
    report: OutcomeReport


@dataclass(frozen=True, slots=True)
class EnrolmentTokenRow:
    """An enrolment token; only its hash is kept."""

    sha256: str
    uses: int
    used: int
    expires_at: datetime
    labels: dict[str, str]
    created_by: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class OperatorTokenRow:
    """An operator's token; only its hash is kept."""

    sha256: str
    name: str
    role: str
    created_at: datetime
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A signed-in browser; only the hash of its cookie is kept."""

    sha256: str
    token_sha256: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class ReleaseRow:
    """A published release; the manifest is its canonical text."""

    digest: str
    model: str
    version: str
    release_seq: int
    target_path: str
    manifest: str
    published_at: datetime
    published_by: str


@dataclass(frozen=True, slots=True)
class ChannelRow:
    """One entry of a channel's history; the newest one is where it points."""

    model: str
    channel: str
    release_digest: str
    set_at: datetime
    set_by: str


@dataclass(frozen=True, slots=True)
class BlueprintRow:
    """One revision of a blueprint, as text."""

    name: str
    revision: int
    source: str
    source_name: str
    applied_at: datetime
    applied_by: str


@dataclass(frozen=True, slots=True)
class JudgementRow:
    """What the judge said last, for people: (gate, verdict, reason, needed) per finding."""

    at: datetime
    verdict: str
    findings: tuple[tuple[str, str, str, int], ...]


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """A rollout: what moves where, and the machine's state.

    Attributes:
        row_version: grows with every write; a write on an older one is a conflict.
        holdback: devices that get nothing, as the control group.
    """

    id: str
    blueprint: str
    revision: int
    model: str
    version: str
    release_digest: str
    state: RolloutState
    created_at: datetime
    created_by: str
    row_version: int = 0
    holdback: tuple[str, ...] = ()
    ended_at: datetime | None = None
    judgement: JudgementRow | None = None


@dataclass(frozen=True, slots=True)
class MemberRow:
    """One device inside one rollout.

    Attributes:
        wave: index; ``position``: place in the salted order.
        generation: of the order that this rollout gave it last; 0 before the first.
        tried: digests of the variants that it refused for not fitting.
        prior_running: assignment digest that it ran when it was offered this one.
        revert: empty, ``wanted``, ``ordered``, ``done``, ``failed`` or ``unreached``.
        revert_generation: of the revert order.
    """

    rollout_id: str
    device_id: str
    wave: int
    position: int
    status: DeviceStatus = DeviceStatus.WAITING
    generation: int = 0
    assignment_digest: str = ""
    variant_sha256: str = ""
    variant_profile: str = ""
    tried: tuple[str, ...] = ()
    prior_running: str = ""
    running_matches: bool = False
    cause: str = ""
    code: str = ""
    detail: str = ""
    offered_at: datetime | None = None
    acknowledged_at: datetime | None = None
    settled_at: datetime | None = None
    golden: GoldenReport | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    revert: str = ""
    revert_generation: int = 0


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A command that was decided and must be carried out; carrying it out twice changes nothing."""

    id: int
    rollout_id: str
    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something that happened."""

    id: int
    at: datetime
    kind: str
    subject: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Who did what."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]

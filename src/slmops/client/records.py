"""What the control plane answers to operators: one definition, encoded by the server and decoded by the client.

All times are UTC, RFC 3339; digests are SHA-256 in lower-case hex. Unknown fields are ignored, so either side may be newer.
"""

from __future__ import annotations

from typing import Any

import msgspec

from slmops.artifact.manifest import Base, Measured, Waiver
from slmops.protocol.messages import Facts, GoldenReport


class OutcomeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How one offer ended on one device, as it was reported."""

    received_at: str
    device_id: str
    rollout_id: str
    assignment_digest: str
    generation: int
    status: str
    cause: str = ""
    code: str = ""
    detail: str = ""
    golden: GoldenReport | None = None
    ratios: dict[str, float] = {}
    fetched_bytes: int = 0
    failed_requests: int = 0


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the control plane knows it.

    Attributes:
        state: ``active`` or ``retired``.
        phase: of the device machine, as last reported; empty before the first check-in.
        running: assignment digest that it serves; ``running_release``: release digest; ``release``: ``model version`` of it.
        candidate: assignment digest that it is moving to.
        assigned: assignment digest of its current order; ``action``: run, withdraw or revert; ``rollout_id``: who gave it.
        generation: of the current order; ``reported_generation``: the highest one that the device acted upon.
        fetched_bytes: over the network since enrolment; ``requests``, ``failed_requests``: since the agent's start.
        stale_since: since when the device's signed metadata is expired; empty when fresh.
    """

    id: str
    profile: str
    labels: dict[str, str]
    state: str
    enrolled_at: str
    last_seen_at: str
    phase: str
    running: str
    running_release: str
    release: str
    candidate: str
    assigned: str
    action: str
    rollout_id: str
    generation: int
    reported_generation: int
    fetched_bytes: int
    requests: int
    failed_requests: int
    stale_since: str
    facts: Facts


class DeviceDetail(DeviceRecord, frozen=True, kw_only=True):
    """A device with its history, newest first."""

    outcomes: tuple[OutcomeRecord, ...]


class DeviceTokenCreated(msgspec.Struct, frozen=True, kw_only=True):
    """A new enrolment token; the only time that it is shown."""

    token: str
    expires_at: str
    uses: int
    labels: dict[str, str]


class VariantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One variant of a release with what was measured of its shipped file."""

    profile: str
    runtime: str
    runtime_version: str
    sha256: str
    artifact_bytes: int
    also_for: tuple[str, ...]
    quantised: dict[str, int]
    measured: Measured
    predicted_decode_tps: float | None = None


class ReleaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A published release; ``channels`` are those that point to it now."""

    digest: str
    model: str
    version: str
    release_seq: int
    target_path: str
    published_at: str
    published_by: str
    licence: str
    channels: tuple[str, ...]
    profiles: tuple[str, ...]
    waivers: tuple[Waiver, ...]


class GoldenPackRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The golden pack of a release in numbers; ``weakened`` says how it asks less than the one before."""

    sha256: str
    prompts: int
    max_drop_ratio: float
    weakened: str


class ReleaseDetail(ReleaseRecord, frozen=True, kw_only=True):
    """A release with its variants and the build's own evidence document."""

    base: Base
    created: str
    variants: tuple[VariantRecord, ...]
    golden_pack: GoldenPackRecord
    evidence: Any


class Promotion(msgspec.Struct, frozen=True, kw_only=True):
    """Where a channel points now, and the rollouts that this began."""

    model: str
    channel: str
    release: str
    version: str
    changed: bool
    rollouts: tuple[str, ...]


class RefusedVariant(msgspec.Struct, frozen=True, kw_only=True):
    """Why a variant is not for a device, with the numbers."""

    profile: str
    reasons: tuple[str, ...]


class DeviceChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Which variant a device would get; ``variant`` is empty when none fits, and ``refused`` says why."""

    device_id: str
    wave: int
    profile: str
    variant: str
    variant_sha256: str
    artifact_bytes: int
    predicted_decode_tps: float
    speed_is_measured: bool
    memory_bytes: int
    swap: str
    refused: tuple[RefusedVariant, ...] = ()


class PlannedWave(msgspec.Struct, frozen=True, kw_only=True):
    """One wave as it would be laid out now."""

    index: int
    rule: str
    devices: tuple[str, ...]


class BlueprintPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What applying a blueprint would do.

    Attributes:
        release: digest; empty when the channel points nowhere yet.
        unchanged: the same document and release are rolling out or rolled out already.
        supersedes: live rollouts that own some of the same devices.
        contested: device to another blueprint that selects it with the same priority: applying is refused.
        pinned: devices that stay on what they run.
        notes: what a person should know before (an empty wave, a waived gate).
    """

    blueprint: str
    model: str
    version: str
    release: str
    unchanged: bool
    waves: tuple[PlannedWave, ...]
    holdback: tuple[str, ...]
    choices: tuple[DeviceChoice, ...]
    supersedes: tuple[str, ...]
    notes: tuple[str, ...]
    contested: dict[str, str] = {}
    pinned: tuple[str, ...] = ()


class BlueprintApplied(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an apply; ``rollout_id`` is empty when there is nothing to roll out yet."""

    blueprint: str
    revision: int
    rollout_id: str
    plan: BlueprintPlan


class BlueprintRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One revision of a blueprint."""

    name: str
    revision: int
    applied_at: str
    applied_by: str
    selector: str
    model: str
    channel: str
    version: str
    source: str
    source_name: str
    rollout_id: str


class CountsRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Devices of a rollout or of one wave by what they came to; ``untouched`` were never offered anything."""

    devices: int = 0
    untouched: int = 0
    in_flight: int = 0
    committed: int = 0
    failed: int = 0
    reverted: int = 0
    refused: int = 0
    withdrawn: int = 0
    presumed_failed: int = 0
    not_reached: int = 0


class FindingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One gate's verdict with the sentence that explains it."""

    gate: str
    verdict: str
    reason: str
    needed: int = 0


class MemberRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One device inside a rollout.

    Attributes:
        status: waiting, offered, in_progress, committed, failed, reverted, refused, withdrawn.
        phase: of the device machine now; ``running_matches``: it runs what this rollout assigned.
        revert: empty, ``wanted``, ``ordered``, ``done``, ``failed`` or ``unreached`` once the rollout takes it back.
    """

    device_id: str
    profile: str
    wave: int
    status: str
    phase: str
    running_matches: bool
    variant: str
    assignment_digest: str
    generation: int
    cause: str
    code: str
    detail: str
    offered_at: str
    acknowledged_at: str
    settled_at: str
    revert: str
    golden: GoldenReport | None = None
    ratios: dict[str, float] = {}


class WaveRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A wave with its devices; ``status`` is closed, open, baking or passed."""

    index: int
    rule: str
    status: str
    counts: CountsRecord
    devices: tuple[MemberRecord, ...]


class RolloutRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout in one line; ``wave`` counts from 0 and is -1 before the first."""

    id: str
    blueprint: str
    revision: int
    model: str
    version: str
    release: str
    phase: str
    wave: int
    waves_total: int
    reason: str
    since: str
    created_at: str
    created_by: str
    ended_at: str
    counts: CountsRecord


class RolloutDetail(RolloutRecord, frozen=True, kw_only=True):
    """A rollout with its waves, the last judgement and what it allows."""

    approvals: int
    approved_by: tuple[str, ...]
    on_abort: str
    verdict: str
    findings: tuple[FindingRecord, ...]
    judged_at: str
    waves: tuple[WaveRecord, ...]
    holdback: tuple[str, ...]
    actions: tuple[str, ...]


class EventRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened, in order of ``id``."""

    id: int
    at: str
    kind: str
    subject: str
    detail: dict[str, Any] = {}


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Who did what; rows are only ever added."""

    id: int
    at: str
    actor: str
    action: str
    subject: str
    detail: dict[str, Any] = {}


class FleetSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet in numbers; ``quiet`` devices have missed three polls."""

    devices: int
    retired: int
    quiet: int
    by_phase: dict[str, int]
    by_profile: dict[str, int]
    by_release: dict[str, int]
    requests: int
    failed_requests: int
    fetched_bytes: int

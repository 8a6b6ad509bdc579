"""From what devices report to what the judge weighs. Pure: rows in, rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slmops.core.device.machine import RESTING, Phase
from slmops.core.evidence.statistics import PairedCounts
from slmops.core.rollout.judge import DeviceEvidence, DeviceStatus
from slmops.protocol.messages import GoldenReport
from slmops.server.ports.rows import DeviceRow, MemberRow, OutcomeRow

#: the refusal after which the next variant is offered
DOES_NOT_FIT = "device.does_not_fit"
#: no variant of the release is left to offer, by the device's word or by our arithmetic: nothing that it says changes that
NO_VARIANT = "rollout.no_variant"

_STATUS = {
    "committed": DeviceStatus.COMMITTED,
    "reverted": DeviceStatus.REVERTED,
    "refused": DeviceStatus.REFUSED,
    "failed": DeviceStatus.FAILED,
    "withdrawn": DeviceStatus.WITHDRAWN,
    "fallback": DeviceStatus.FAILED,
}
_RESTING = frozenset(phase.value for phase in RESTING)


def is_resting(device: DeviceRow) -> bool:
    """Whether the device is between updates."""
    return device.phase in _RESTING


def observe(member: MemberRow, device: DeviceRow, outcomes: Sequence[OutcomeRow]) -> MemberRow:
    """What this device's last words make of its place in the rollout.

    Args:
        member: as last written.
        device: as last reported.
        outcomes: the device's outcomes in this rollout, oldest first.
    """
    if member.status is DeviceStatus.WAITING or member.code == NO_VARIANT:
        return member
    matches = device.running == member.assignment_digest
    if matches is not member.running_matches:
        member = replace(member, running_matches=matches)
    if member.acknowledged_at is None and device.reported_generation >= member.generation:
        member = replace(member, acknowledged_at=device.last_seen_at)
        if member.status is DeviceStatus.OFFERED:
            member = replace(member, status=DeviceStatus.IN_PROGRESS)
    for outcome in reversed(outcomes):
        report = outcome.report
        if report.assignment_digest == member.assignment_digest and report.generation >= member.generation:
            return _settled(member, outcome)
    return member


def _settled(member: MemberRow, outcome: OutcomeRow) -> MemberRow:
    report = outcome.report
    return replace(
        member,
        status=_STATUS[report.status],
        # The device says what broke it first: damage on its own disk is not the release's, even in safe_fallback.
        cause=report.cause,
        code=report.code,
        detail=report.detail,
        acknowledged_at=member.acknowledged_at or outcome.received_at,
        settled_at=outcome.received_at,
        golden=report.golden or member.golden,
        ratios=dict(report.ratios) or member.ratios,
    )


def refused_for_fit(member: MemberRow) -> bool:
    """Whether the next variant may be offered."""
    return member.status is DeviceStatus.REFUSED and member.code == DOES_NOT_FIT


def evidence_of(member: MemberRow) -> DeviceEvidence:
    """A device as the judge sees it."""
    return DeviceEvidence(
        device_id=member.device_id,
        status=member.status,
        running_matches=member.running_matches,
        cause=member.cause,
        detail=member.detail,
        offered_at=member.offered_at,
        acknowledged_at=member.acknowledged_at,
        settled_at=member.settled_at,
        golden=None if member.golden is None else paired(member.golden),
        ratios=member.ratios,
    )


def paired(golden: GoldenReport) -> PairedCounts:
    """A golden report as paired outcomes.

    On a device's first release there is no committed pack to compare with. Its own pack then stands in: the unquantised
    reference passes it by construction, so a prompt that failed here is one that only the reference kept.
    """
    counts = PairedCounts(golden.both, golden.only_old, golden.only_new, golden.neither)
    return counts if counts.n else PairedCounts(golden.own_passed, golden.own_failed, 0, 0)


def unsettled(member: MemberRow) -> bool:
    """Whether an offer is out whose end was not reported."""
    return member.status in (DeviceStatus.OFFERED, DeviceStatus.IN_PROGRESS)


def safe_fallback(device: DeviceRow) -> bool:
    """Whether the device has nothing left to serve."""
    return device.phase == Phase.SAFE_FALLBACK.value

"""Taking a release back from one device: what its last words mean, and whether an order is due. Pure.

A device has come back when it rests, neither runs nor prepares the release, and spoke after it was told (or never heard of
the offer at all). Devices that were still preparing get a withdrawal first; only one that runs the release gets a revert.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from slmops.core.rollout.judge import Deadlines
from slmops.server.ports.rows import DeviceRow, MemberRow
from slmops.server.services.evidence import is_resting

OUTSTANDING = ("wanted", "ordered")
#: an answer that was on its way while the offer was withdrawn is on disk as delivered by then
IN_THE_AIR = timedelta(seconds=2)


def take_back(
    member: MemberRow, device: DeviceRow, since: datetime, deadlines: Deadlines, now: datetime
) -> MemberRow:
    """The member with its ``revert`` brought up to date; ``wanted`` with ``needs_order`` asks for a revert.

    Args:
        member: with ``revert`` in :data:`OUTSTANDING`.
        device: as last reported.
        since: when the rollback began; withdrawals were issued then.
        deadlines: how long silence is only silence.
        now: UTC.
    """
    if device.retired_at is not None or not _ours(member, device):
        return replace(member, revert="done")
    if device.delivered_generation < member.generation and now - since > IN_THE_AIR:
        return replace(member, revert="done")
    spoke = device.last_seen_at is not None and device.last_seen_at > since
    runs = device.running == member.assignment_digest
    if is_resting(device) and not runs and device.candidate != member.assignment_digest and spoke:
        return replace(member, revert="done")
    acted = member.revert == "ordered" and device.reported_generation >= member.revert_generation
    if acted and is_resting(device) and runs:
        return replace(member, revert="failed", detail="it has no previous release to go back to")
    heard = member.revert == "wanted" or device.delivered_generation >= member.revert_generation
    allowed_s = deadlines.update_s if heard and spoke else deadlines.acknowledge_s
    if now - since > timedelta(seconds=allowed_s):
        return replace(member, revert="unreached")
    return member


def needs_order(member: MemberRow, device: DeviceRow) -> bool:
    """Whether a revert has to be ordered: the device runs the release and has not been told to go back."""
    return member.revert == "wanted" and is_resting(device) and device.running == member.assignment_digest


def _ours(member: MemberRow, device: DeviceRow) -> bool:
    """A newer rollout's order on this device is not ours to undo."""
    return device.assignment is not None and device.assignment.rollout_id == member.rollout_id

"""Offers: which waiting devices may be offered the release now, and the orders that do it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from slmops.core.rollout.judge import DeviceStatus, count
from slmops.core.rollout.plan import next_offers
from slmops.protocol.messages import SCHEMA, Assignment
from slmops.server.ports.rows import DeviceRow, MemberRow, RolloutRow
from slmops.server.ports.store import Transaction
from slmops.server.services import assign
from slmops.server.services.catalogue import Catalogue, OpenRelease
from slmops.server.services.evidence import NO_VARIANT, evidence_of, unsettled
from slmops.server.services.rollout_plan import RolloutPlan, is_pinned

#: a device that may still be offered something, or has an offer out
OPEN = frozenset({DeviceStatus.WAITING, DeviceStatus.OFFERED, DeviceStatus.IN_PROGRESS})


def next_devices(
    plan: RolloutPlan,
    wave: int,
    members: Sequence[MemberRow],
    devices: Mapping[str, DeviceRow],
    busy: Collection[str],
    now: datetime,
) -> list[str]:
    """Devices to offer the release to now.

    Args:
        plan: limits and disruption budget.
        wave: the open wave; earlier ones stay open.
        members: of the rollout, by wave and position.
        devices: by id.
        busy: devices that another rollout is taking back.
        now: UTC; a device that fell silent past its deadline does not hold a place any more.
    """
    opened = [member for member in members if member.wave <= wave]
    evidence = {member.device_id: evidence_of(member) for member in opened}
    waiting = [
        member.device_id
        for member in opened
        if member.status is DeviceStatus.WAITING
        and member.device_id not in busy
        and not is_pinned(devices[member.device_id])
    ]
    in_flight = [
        member.device_id
        for member in opened
        if unsettled(member) and count([evidence[member.device_id]], plan.deadlines, now).in_flight
    ]
    committed = count(list(evidence.values()), plan.deadlines, now).committed
    budget = plan.blueprint.rollout.budget
    group_of = None
    if budget is not None:
        group_of = {
            member.device_id: devices[member.device_id].selector_labels().get(budget.group_by, "")
            for member in opened
        }
    limit = plan.in_flight.limit(committed)
    unavailable = None if budget is None else budget.max_unavailable
    return next_offers(waiting, in_flight, limit, group_of=group_of, max_unavailable=unavailable)


def offer(  # noqa: PLR0913 - what is offered to whom, by whom, when
    tx: Transaction,
    catalogue: Catalogue,
    release: OpenRelease,
    plan: RolloutPlan,
    member: MemberRow,
    device: DeviceRow,
    now: datetime,
) -> None:
    """Give one device its order, or settle it as refused when no variant fits."""
    current = tx.devices.assigned(device.running) if device.running else None
    running = None if current is None else catalogue.variant(current.variant_sha256)
    serving = plan.serving_for(device)
    choice = assign.choose(release, serving, device, running=running, tried=member.tried)
    if choice.variant is None:
        refused = replace(
            member,
            status=DeviceStatus.REFUSED,
            cause="environment",
            code=NO_VARIANT,
            detail=choice.why_none(),
            settled_at=now,
        )
        tx.rollouts.save_members([refused])
        detail = {"rollout": member.rollout_id, "status": "refused", "cause": "environment"}
        tx.journal.event(now, "device.status", device.id, {**detail, "detail": refused.detail})
        return
    generation = max(device.generation, device.reported_generation) + 1
    order = assign.order(
        release, choice.variant, serving, plan.blueprint.rollout, member.rollout_id, generation
    )
    tx.devices.assign(device.id, order, now)
    offered = replace(
        member,
        status=DeviceStatus.OFFERED,
        generation=generation,
        assignment_digest=order.assignment_digest,
        variant_sha256=order.variant_sha256,
        variant_profile=choice.variant.variant.profile,
        prior_running=device.running,
        running_matches=False,
        cause="",
        code="",
        detail="",
        offered_at=now,
        acknowledged_at=None,
        settled_at=None,
    )
    tx.rollouts.save_members([offered])
    tx.journal.event(
        now, "device.offered", device.id, {"rollout": member.rollout_id, "variant": offered.variant_profile}
    )


def put_back(member: MemberRow) -> MemberRow:
    """A device that refused a variant for not fitting waits for the next one."""
    return replace(member, status=DeviceStatus.WAITING, tried=(*member.tried, member.variant_sha256))


def take_back_order(device: DeviceRow, member: MemberRow) -> Assignment:
    """The order to go back, valid only while the device runs what this rollout gave it."""
    return Assignment(
        schema=SCHEMA,
        generation=max(device.generation, device.reported_generation) + 1,
        action="revert",
        assignment_digest=member.assignment_digest,
        rollout_id=member.rollout_id,
    )


def late_comers(
    plan: RolloutPlan,
    rollout: RolloutRow,
    members: Sequence[MemberRow],
    devices: Iterable[DeviceRow],
    elsewhere: Collection[str],
) -> list[DeviceRow]:
    """Devices of the cohort that are in no wave and not held back, in the rollout's own order.

    Args:
        plan: of the rollout.
        rollout: that they may join.
        members: it has already.
        devices: all of them.
        elsewhere: devices that another blueprint owns or claims as well.
    """
    placed = {member.device_id for member in members} | set(rollout.holdback)
    spec = plan.waves[-1]
    joined = {
        device.id: device
        for device in plan.cohort(devices)
        if device.id not in placed
        and device.id not in elsewhere
        and (spec.selector is None or spec.selector.matches(device.selector_labels()))
    }
    order = plan.lay_out(rollout.id, joined.values()).waves
    known = [device_id for wave in order for device_id in wave]
    return [joined[device_id] for device_id in (*known, *(d for d in joined if d not in known))]

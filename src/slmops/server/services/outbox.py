"""Commands of the rollout machine, carried out inside one transaction together with their mark."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from slmops.core.errors import BugError
from slmops.core.rollout.judge import DeviceStatus
from slmops.protocol.messages import SCHEMA, Assignment
from slmops.server.ports.rows import OutboxRow
from slmops.server.ports.store import Transaction
from slmops.server.services.evidence import unsettled


def carry_out(tx: Transaction, command: OutboxRow, now: datetime) -> list[str]:
    """Do what a command says; the result names the devices whose orders changed."""
    if command.kind == "open_wave":
        tx.journal.event(now, "rollout.wave", command.rollout_id, {"wave": command.arguments["wave"]})
        return []
    if command.kind == "withdraw":
        return _withdraw(tx, command.rollout_id, now)
    if command.kind == "revert_devices":
        return _want_back(tx, command.rollout_id, everyone=command.arguments["scope"] == "all")
    if command.kind == "close":
        tx.journal.event(now, "rollout.closed", command.rollout_id, {"phase": command.arguments["phase"]})
        return []
    raise BugError(f"outbox holds an unknown command {command.kind!r}")


def _withdraw(tx: Transaction, rollout_id: str, now: datetime) -> list[str]:
    """Devices with an open offer of this rollout are told to forget it; the others are simply never offered it."""
    open_offers = [member for member in tx.rollouts.members(rollout_id) if unsettled(member)]
    devices = {device.id: device for device in tx.devices.all([member.device_id for member in open_offers])}
    touched: list[str] = []
    for member in open_offers:
        device = devices[member.device_id]
        current = device.assignment
        if current is None or current.generation != member.generation or current.rollout_id != rollout_id:
            continue  # withdrawn already, or a newer rollout has given its own order
        order = Assignment(
            schema=SCHEMA,
            generation=max(device.generation, device.reported_generation) + 1,
            action="withdraw",
            assignment_digest=member.assignment_digest,
            rollout_id=rollout_id,
        )
        tx.devices.assign(device.id, order, now)
        tx.journal.event(now, "device.withdrawn", device.id, {"rollout": rollout_id})
        touched.append(device.id)
    return touched


def _want_back(tx: Transaction, rollout_id: str, *, everyone: bool) -> list[str]:
    """Mark the devices that must come back; the tick orders each revert when the device rests."""
    marked = [
        replace(member, revert="wanted", revert_generation=0)
        for member in tx.rollouts.members(rollout_id)
        if member.generation > 0
        and member.prior_running != member.assignment_digest
        and (everyone or member.status is not DeviceStatus.COMMITTED)
    ]
    tx.rollouts.save_members(marked)
    return []

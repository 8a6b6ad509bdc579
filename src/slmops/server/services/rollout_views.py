"""Rollouts as operators see them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from slmops.client.records import (
    CountsRecord,
    FindingRecord,
    MemberRecord,
    RolloutDetail,
    RolloutRecord,
    WaveRecord,
)
from slmops.core.rollout.judge import Deadlines, DeviceStatus, count
from slmops.core.rollout.machine import ENDED, RUNNING, TABLE, Phase
from slmops.server.ports.rows import DeviceRow, MemberRow, RolloutRow
from slmops.server.ports.store import Store
from slmops.server.ports.world import Clock
from slmops.server.services.decisions import ACTIONS
from slmops.server.services.evidence import evidence_of, unsettled
from slmops.server.services.rollouts import Rollouts
from slmops.server.services.words import rfc3339


class RolloutViews:
    """Reads rollouts."""

    def __init__(self, store: Store, rollouts: Rollouts, clock: Clock) -> None:
        """Keep the ports."""
        self._store = store
        self._rollouts = rollouts
        self._clock = clock

    def records(self) -> list[RolloutRecord]:
        """All rollouts, newest first."""
        now = self._clock.now()
        with self._store.read() as tx:
            found = []
            for row in tx.rollouts.all():
                plan = self._rollouts.plan_of(tx, row)
                members = tx.rollouts.members(row.id)
                found.append(_record(row, len(plan.waves), members, plan.deadlines, now))
            return found

    def record(self, rollout_id: str) -> RolloutRecord:
        """One rollout in one line."""
        now = self._clock.now()
        with self._store.read() as tx:
            row = self._rollouts.required(tx, rollout_id)
            plan = self._rollouts.plan_of(tx, row)
            return _record(row, len(plan.waves), tx.rollouts.members(row.id), plan.deadlines, now)

    def detail(self, rollout_id: str) -> RolloutDetail:
        """One rollout with waves, devices and the last judgement."""
        now = self._clock.now()
        with self._store.read() as tx:
            row = self._rollouts.required(tx, rollout_id)
            plan = self._rollouts.plan_of(tx, row)
            members = tx.rollouts.members(rollout_id)
            devices = {d.id: d for d in tx.devices.all([member.device_id for member in members])}
        line = _record(row, len(plan.waves), members, plan.deadlines, now)
        waves = []
        for index in range(len(plan.waves)):
            here = [member for member in members if member.wave == index]
            waves.append(
                WaveRecord(
                    index=index,
                    rule=plan.rule(index),
                    status=_wave_status(row, index),
                    counts=_counts(here, plan.deadlines, now),
                    devices=tuple(_member(member, devices[member.device_id]) for member in here),
                )
            )
        judgement = row.judgement
        findings = () if judgement is None else judgement.findings
        return RolloutDetail(
            **{name: getattr(line, name) for name in RolloutRecord.__struct_fields__},
            approvals=plan.policy.approvals,
            approved_by=row.state.approved_by,
            on_abort=plan.policy.on_abort,
            verdict="" if judgement is None else judgement.verdict,
            findings=tuple(
                FindingRecord(gate=gate, verdict=verdict, reason=reason, needed=needed)
                for gate, verdict, reason, needed in findings
            ),
            judged_at="" if judgement is None else rfc3339(judgement.at),
            waves=tuple(waves),
            holdback=row.holdback,
            actions=allowed_actions(row.state.phase),
        )


def allowed_actions(phase: Phase) -> tuple[str, ...]:
    """What a person may do in this phase, by the machine's own table."""
    return tuple(name for name, (_, event_of) in ACTIONS.items() if phase in TABLE[type(event_of("", ""))][0])


def _record(
    row: RolloutRow, waves: int, members: Sequence[MemberRow], deadlines: Deadlines, now: datetime
) -> RolloutRecord:
    return RolloutRecord(
        id=row.id,
        blueprint=row.blueprint,
        revision=row.revision,
        model=row.model,
        version=row.version,
        release=row.release_digest,
        phase=row.state.phase.value,
        wave=row.state.wave,
        waves_total=waves,
        reason=row.state.reason,
        since=rfc3339(row.state.since),
        created_at=rfc3339(row.created_at),
        created_by=row.created_by,
        ended_at=rfc3339(row.ended_at),
        counts=_counts(members, deadlines, now),
    )


def _counts(members: Sequence[MemberRow], deadlines: Deadlines, now: datetime) -> CountsRecord:
    judged = count([evidence_of(member) for member in members], deadlines, now)
    statuses = [member.status for member in members]
    silent = judged.presumed_failed + judged.not_reached - statuses.count(DeviceStatus.WITHDRAWN)
    return CountsRecord(
        devices=len(members),
        untouched=sum(member.generation == 0 for member in members),
        in_flight=max(sum(unsettled(member) for member in members) - silent, 0),
        committed=judged.committed,
        failed=statuses.count(DeviceStatus.FAILED),
        reverted=statuses.count(DeviceStatus.REVERTED),
        refused=statuses.count(DeviceStatus.REFUSED),
        withdrawn=statuses.count(DeviceStatus.WITHDRAWN),
        presumed_failed=judged.presumed_failed,
        not_reached=judged.not_reached - statuses.count(DeviceStatus.WITHDRAWN),
    )


def _wave_status(row: RolloutRow, index: int) -> str:
    state = row.state
    if index > state.wave:
        return "closed"
    if index < state.wave or state.phase in (Phase.COMPLETED, Phase.COMPLETED_PARTIAL):
        return "passed"
    if state.phase in RUNNING:
        return str(state.phase.value)
    return "stopped" if state.phase in ENDED | {Phase.ROLLING_BACK} else "paused"


def _member(member: MemberRow, device: DeviceRow) -> MemberRecord:
    return MemberRecord(
        device_id=member.device_id,
        profile=device.profile,
        wave=member.wave,
        status=member.status.value,
        phase=device.phase,
        running_matches=member.running_matches,
        variant=member.variant_profile,
        assignment_digest=member.assignment_digest,
        generation=member.generation,
        cause=member.cause,
        code=member.code,
        detail=member.detail,
        offered_at=rfc3339(member.offered_at),
        acknowledged_at=rfc3339(member.acknowledged_at),
        settled_at=rfc3339(member.settled_at),
        revert=member.revert,
        golden=member.golden,
        ratios=dict(member.ratios),
    )

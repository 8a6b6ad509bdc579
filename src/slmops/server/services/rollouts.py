"""Rollouts: load, ask the core, write state and outbox in one transaction, then act.

Every public method holds one lock: within a process, one thread at a time decides about rollouts. Between processes the
row's version decides. ``tick`` is what the worker calls; it takes the time as an argument.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from slmops.core.errors import NotFoundError, PermissionDeniedError, UsageError
from slmops.core.rollout.judge import DeviceStatus, count, judge
from slmops.core.rollout.machine import (
    ENDED,
    EXPOSED,
    RUNNING,
    Event,
    Judged,
    PauseOrdered,
    Phase,
    RevertsSettled,
    Started,
    Superseded,
    begin,
    step,
)
from slmops.server.ports.rows import DeviceRow, JudgementRow, MemberRow, RolloutRow
from slmops.server.ports.store import Store, Transaction
from slmops.server.ports.world import Bell, Clock, Names
from slmops.server.services import offers, reverts
from slmops.server.services.catalogue import Catalogue, OpenRelease
from slmops.server.services.decisions import (
    ACTIONS,
    ALIVE,
    COMPLETE,
    by_device,
    judgement_row,
    sentence,
    written,
)
from slmops.server.services.evidence import evidence_of, observe, refused_for_fit
from slmops.server.services.outbox import carry_out
from slmops.server.services.ownership import claims
from slmops.server.services.registry import Registry
from slmops.server.services.rollout_plan import RolloutPlan, remembered_plan
from slmops.server.services.words import SERVER, Caller

#: how long an ended rollout still takes in the outcomes of its last devices, for the record
AFTERMATH = timedelta(days=1)


class Rollouts:
    """The life of all rollouts."""

    def __init__(
        self, store: Store, catalogue: Catalogue, registry: Registry, clock: Clock, names: Names, bell: Bell
    ) -> None:
        """Keep the ports; nothing happens before the first tick."""
        self._store = store
        self._catalogue = catalogue
        self._registry = registry
        self._clock = clock
        self._names = names
        self._bell = bell
        self.lock = threading.RLock()

    # ---- birth ----------------------------------------------------------------------------------------------------

    def new_id(self) -> str:
        """An id; it salts the order of the devices, so it is chosen before the plan is made."""
        return self._names.rollout_id()

    def birth(  # noqa: PLR0913 - a rollout has this many independent parts
        self,
        tx: Transaction,
        caller: Caller,
        rollout_id: str,
        plan: RolloutPlan,
        revision: int,
        release: OpenRelease,
        cohort: Sequence[DeviceRow],
    ) -> RolloutRow:
        """Begin a rollout inside the caller's transaction; the caller holds ``lock`` and acts afterwards.

        Live rollouts that own some of the same devices are superseded.
        """
        now = self._clock.now()
        laid_out = plan.lay_out(rollout_id, cohort)
        members = [
            MemberRow(rollout_id, device_id, wave, position)
            for wave, devices in enumerate(laid_out.waves)
            for position, device_id in enumerate(devices)
        ]
        row = RolloutRow(
            id=rollout_id,
            blueprint=plan.blueprint.metadata.name,
            revision=revision,
            model=release.release.model,
            version=release.release.version,
            release_digest=release.digest,
            state=begin(plan.policy, now),
            created_at=now,
            created_by=caller.name,
            holdback=laid_out.holdback,
        )
        for older in self.overlapping(tx, {member.device_id for member in members}, row.blueprint):
            self._step(tx, older, Superseded(rollout_id), now)
        tx.rollouts.add(row, members)
        tx.journal.event(
            now, "rollout.created", rollout_id, {"blueprint": row.blueprint, "version": row.version}
        )
        return row

    def overlapping(self, tx: Transaction, device_ids: set[str], blueprint: str) -> list[RolloutRow]:
        """Live rollouts that own some of these devices, or belong to this blueprint."""
        return [
            rollout
            for rollout in tx.rollouts.all(ALIVE)
            if rollout.blueprint == blueprint
            or any(member.device_id in device_ids for member in tx.rollouts.members(rollout.id))
        ]

    # ---- what a person orders -------------------------------------------------------------------------------------

    def act_on(self, caller: Caller, rollout_id: str, action: str, reason: str = "") -> RolloutRow:
        """Approve, reject, pause, resume, abort or roll back.

        Raises:
            UsageError: there is no such action.
            NotFoundError: there is no such rollout.
            PermissionDeniedError: the caller's role is too low, or approves what it began itself.
            IllegalTransitionError: the rollout's phase does not allow it.
        """
        if action not in ACTIONS:
            raise UsageError(f"action {action!r} is not known", hint=f"one of {', '.join(ACTIONS)}")
        role, event_of = ACTIONS[action]
        caller.require(role, f"to {action} a rollout")
        now = self._clock.now()
        with self.lock:
            with self._store.write() as tx:
                rollout = self.required(tx, rollout_id)
                if action == "approve" and rollout.created_by == caller.name:
                    raise PermissionDeniedError(
                        f"{caller.name} began this rollout and cannot approve it", hint="ask another approver"
                    )
                self._step(tx, rollout, event_of(caller.name, reason), now)
                tx.journal.audit(now, caller.name, f"rollout.{action}", rollout_id, {"reason": reason})
            self.act(now)
            with self._store.read() as tx:
                result = self.required(tx, rollout_id)
        self._bell.ring()
        return result

    def required(self, tx: Transaction, rollout_id: str) -> RolloutRow:
        """A rollout, or the error that there is none."""
        rollout = tx.rollouts.get(rollout_id)
        if rollout is None:
            raise NotFoundError(f"no rollout {rollout_id}", hint="slmops rollout list shows them")
        return rollout

    # ---- the worker's turn ----------------------------------------------------------------------------------------

    def tick(self, now: datetime) -> None:
        """One turn: finish what was decided, take in reports, judge, decide, act, offer."""
        with self.lock:
            self.act(now)
            self._pause_after_restore(now)
            with self._store.read() as tx:
                alive = [rollout.id for rollout in reversed(tx.rollouts.all(ALIVE))]
                late = tx.rollouts.unsettled_after_end(now - AFTERMATH)
                standing = [row.id for row in self._standing(tx)]
            for rollout_id in alive:
                self._advance(rollout_id, now)
            for rollout_id in dict.fromkeys((*late, *standing)):
                self._observe(rollout_id, now)
            for rollout_id in standing:
                self._take_in(rollout_id, now)
                self._offer(rollout_id, now)

    def _advance(self, rollout_id: str, now: datetime) -> None:
        with self._store.read() as tx:
            phase = self.required(tx, rollout_id).state.phase
        if phase is Phase.SCHEDULED:
            self._decide(rollout_id, Started(), now)
        self._take_in(rollout_id, now)
        self._observe(rollout_id, now)
        self._judge(rollout_id, now)
        self._offer(rollout_id, now)

    def _decide(
        self, rollout_id: str, event: Event, now: datetime, judgement: JudgementRow | None = None
    ) -> None:
        with self._store.write() as tx:
            rollout = self.required(tx, rollout_id)
            self._step(
                tx, rollout if judgement is None else replace(rollout, judgement=judgement), event, now
            )
        self.act(now)

    def _step(self, tx: Transaction, rollout: RolloutRow, event: Event, now: datetime) -> None:
        """Ask the machine; write its state and its commands together."""
        state, commands = step(rollout.state, event, self.plan_of(tx, rollout).policy, now)
        ended_at = now if state.phase in ENDED and rollout.ended_at is None else rollout.ended_at
        before = tx.rollouts.get(rollout.id)
        changed = replace(rollout, state=state, ended_at=ended_at)
        if before is None or replace(changed, row_version=before.row_version) != before:
            tx.rollouts.save(changed)
        for command in commands:
            kind, arguments = written(command)
            tx.rollouts.post(rollout.id, kind, arguments, now)
        if state.phase is not rollout.state.phase:
            detail = {"from": rollout.state.phase.value, "phase": state.phase.value, "reason": state.reason}
            tx.journal.event(now, "rollout.phase", rollout.id, {**detail, "wave": state.wave})

    def act(self, now: datetime) -> None:
        """Carry out what was decided: each command and its mark in one transaction, so it happens exactly once."""
        with self._store.read() as tx:
            waiting = tx.rollouts.outbox()
        for command in waiting:
            with self._store.write() as tx:
                touched = carry_out(tx, command, now)
                tx.rollouts.done(command.id, now)
            self._registry.refresh(touched)
            self._bell.ring()

    # ---- evidence -------------------------------------------------------------------------------------------------

    def _observe(self, rollout_id: str, now: datetime) -> None:
        """Take in what the devices reported since."""
        with self._store.read() as tx:
            rollout = self.required(tx, rollout_id)
            plan = self.plan_of(tx, rollout)
            members, devices = self._load(tx, rollout_id)
            outcomes = by_device(tx.devices.rollout_outcomes(rollout_id))
            changed: list[MemberRow] = []
            for member in members:
                device = devices[member.device_id]
                seen = observe(member, device, outcomes.get(member.device_id, ()))
                if seen.status is DeviceStatus.COMMITTED and seen.golden is None:
                    earlier = tx.devices.latest_commit(device.id, seen.assignment_digest)
                    seen = seen if earlier is None else replace(seen, golden=earlier.report.golden)
                if refused_for_fit(seen) and rollout.state.phase in ALIVE:
                    seen = offers.put_back(seen)
                if device.retired_at is not None and seen.status in offers.OPEN:
                    seen = replace(seen, status=DeviceStatus.WITHDRAWN, code="device.retired", settled_at=now)
                if rollout.state.phase is Phase.ROLLING_BACK and seen.revert in reverts.OUTSTANDING:
                    seen = reverts.take_back(seen, device, rollout.state.since, plan.deadlines, now)
                if seen != member:
                    changed.append(seen)
        if changed:
            before = {member.device_id: member for member in members}
            with self._store.write() as tx:
                tx.rollouts.save_members(changed)
                for seen in changed:
                    if seen.status is not before[seen.device_id].status:
                        detail = {"rollout": rollout_id, "status": seen.status.value, "cause": seen.cause}
                        tx.journal.event(
                            now, "device.status", seen.device_id, {**detail, "detail": seen.detail}
                        )
            self._bell.ring()

    def _judge(self, rollout_id: str, now: datetime) -> None:
        with self._store.read() as tx:
            rollout = self.required(tx, rollout_id)
            plan = self.plan_of(tx, rollout)
            members = tx.rollouts.members(rollout_id)
        state = rollout.state
        if state.phase is Phase.ROLLING_BACK:
            self._settle_reverts(rollout, members, now)
            return
        if state.phase not in EXPOSED or state.wave < 0:
            return
        wave = [evidence_of(member) for member in members if member.wave == state.wave]
        everyone = [evidence_of(member) for member in members if member.wave <= state.wave]
        spec = plan.waves[state.wave]
        judgement = judge(
            plan.gates
            if wave
            else (),  # an empty wave has nothing to say; later waves are judged by their own devices
            wave,
            everyone,
            max_failures=spec.max_failures,
            min_devices=spec.min_devices,
            deadlines=plan.deadlines,
            now=now,
        )
        unreached = count(everyone, plan.deadlines, now).not_reached
        event = Judged(judgement.verdict, judgement.complete, sentence(judgement), unreached)
        self._decide(rollout_id, event, now, judgement_row(rollout.judgement, judgement, now))

    def _settle_reverts(self, rollout: RolloutRow, members: Sequence[MemberRow], now: datetime) -> None:
        with self._store.read() as tx:
            pending = tx.rollouts.outbox(rollout.id)
        if pending:
            return
        touched: list[str] = []
        with self._store.write() as tx:
            devices = {
                device.id: device for device in tx.devices.all([member.device_id for member in members])
            }
            for member in members:
                device = devices[member.device_id]
                if reverts.needs_order(member, device):
                    order = offers.take_back_order(device, member)
                    tx.devices.assign(device.id, order, now)
                    tx.rollouts.save_members(
                        [replace(member, revert="ordered", revert_generation=order.generation)]
                    )
                    tx.journal.event(now, "device.revert_ordered", device.id, {"rollout": rollout.id})
                    touched.append(device.id)
        self._registry.refresh(touched)
        if not touched and not any(member.revert in reverts.OUTSTANDING for member in members):
            complete = not any(member.revert in ("failed", "unreached") for member in members)
            self._decide(rollout.id, RevertsSettled(complete), now)

    # ---- offers ---------------------------------------------------------------------------------------------------

    def _offer(self, rollout_id: str, now: datetime) -> None:
        """Offer the release to as many waiting devices of the open waves as the evidence allows."""
        with self._store.read() as tx:
            rollout = self.required(tx, rollout_id)
            if rollout.state.phase not in RUNNING | COMPLETE:
                return
            plan = self.plan_of(tx, rollout)
            members, devices = self._load(tx, rollout_id)
            busy = tx.rollouts.reverting()
        chosen = offers.next_devices(plan, rollout.state.wave, members, devices, busy, now)
        if not chosen:
            return
        release = self._catalogue.open(rollout.release_digest)
        with self._store.write() as tx:
            for device in tx.devices.all(chosen):
                member = next(member for member in members if member.device_id == device.id)
                offers.offer(tx, self._catalogue, release, plan, member, device, now)
        self._registry.refresh(chosen)
        self._bell.ring()

    def _take_in(self, rollout_id: str, now: datetime) -> None:
        """Devices that joined the cohort since: into the last wave, when that is dynamic."""
        with self._store.read() as tx:
            rollout = self.required(tx, rollout_id)
            plan = self.plan_of(tx, rollout)
            if rollout.state.phase not in EXPOSED | COMPLETE or not plan.waves[-1].dynamic:
                return
            members = tx.rollouts.members(rollout_id)
            devices = tx.devices.all()
            elsewhere = claims(plan, devices, tx.blueprints.all_current()).elsewhere
            joined = offers.late_comers(plan, rollout, members, devices, elsewhere)
            if rollout.state.phase in COMPLETE:
                # Nobody judges any more: only a device that nobody has ever given anything is taken in.
                joined = [device for device in joined if device.assignment is None]
        if joined:
            last = len(plan.waves) - 1
            with self._store.write() as tx:
                begin_at = len(members)
                tx.rollouts.add_members(
                    [MemberRow(rollout_id, device.id, last, begin_at + i) for i, device in enumerate(joined)]
                )
                for device in joined:
                    tx.journal.event(now, "rollout.joined", rollout_id, {"device": device.id})
            self._bell.ring()

    # ---- how ------------------------------------------------------------------------------------------------------

    def _pause_after_restore(self, now: datetime) -> None:
        """A device knows a generation that we never issued: our database is older than the fleet. Stop and ask."""
        with self._store.read() as tx:
            ahead = tx.devices.ahead()
        if not ahead:
            return
        first = ahead[0]
        reason = (
            f"server restored: {first.id} acted upon generation {first.reported_generation}, "
            f"this database has issued {first.generation} ({len(ahead)} devices are ahead)"
        )
        with self._store.write() as tx:
            for device in ahead:
                tx.devices.set_generation(device.id, device.reported_generation)
            for rollout in tx.rollouts.all(RUNNING | {Phase.SCHEDULED}):
                self._step(tx, rollout, PauseOrdered(reason), now)
            tx.journal.event(now, "server.restored", first.id, {"reason": reason, "devices": len(ahead)})
            tx.journal.audit(now, SERVER.name, "server.restored", first.id, {"reason": reason})
        self._registry.refresh([device.id for device in ahead])
        self._bell.ring()

    def _standing(self, tx: Transaction) -> list[RolloutRow]:
        """Completed rollouts that are still their blueprint's newest word, with a dynamic last wave."""
        rows = (tx.rollouts.latest(blueprint.name) for blueprint in tx.blueprints.all_current())
        return [
            row
            for row in rows
            if row is not None and row.state.phase in COMPLETE and self.plan_of(tx, row).waves[-1].dynamic
        ]

    def _load(self, tx: Transaction, rollout_id: str) -> tuple[list[MemberRow], dict[str, DeviceRow]]:
        members = tx.rollouts.members(rollout_id)
        devices = tx.devices.all([member.device_id for member in members])
        return members, {device.id: device for device in devices}

    def plan_of(self, tx: Transaction, rollout: RolloutRow) -> RolloutPlan:
        """The blueprint revision that a rollout follows."""
        blueprint = tx.blueprints.revision(rollout.blueprint, rollout.revision)
        if blueprint is None:
            raise NotFoundError(
                f"rollout {rollout.id} follows {rollout.blueprint} revision {rollout.revision}, which is gone",
                hint="the database was edited by hand",
            )
        return remembered_plan(blueprint.source)

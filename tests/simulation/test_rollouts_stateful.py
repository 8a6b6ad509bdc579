"""Random operators, random devices, random time: what must hold after every step, and which states were really reached."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.support.control_plane import SimDevice, VariantSpec, blueprint
from tests.support.simulated_fleet import APPROVER, OPERATOR, world

from slmops.client.records import RolloutRecord
from slmops.core.device.machine import Failure
from slmops.core.errors import IllegalTransitionError, PermissionDeniedError
from slmops.core.rollout.judge import DeviceStatus
from slmops.core.rollout.machine import ENDED, RUNNING, Phase
from slmops.protocol.messages import Assignment
from slmops.server.services.decisions import ACTIONS, ALIVE

FATES: dict[str, Failure | str | None] = {
    "good": None,
    "content": Failure("content", "golden.own_pack", "answers changed"),
    "disk": Failure("environment", "device.no_space", "full"),
    "stuck": "stuck",
    "refuse": "refuse",
}
VERSIONS = ("1.0.0", "1.1.0", "1.2.0")
REACHED: Counter[str] = Counter()


class RolloutService(RuleBasedStateMachine):
    """One control plane with up to six devices and two blueprints."""

    @initialize()
    def begin(self) -> None:
        """Releases are there; devices come by rules."""
        self.exit = contextlib.ExitStack()
        folder = self.exit.enter_context(tempfile.TemporaryDirectory(prefix="slmops-stateful-"))
        self.world = self.exit.enter_context(world(Path(folder) / "data"))
        variants = (VariantSpec("pi5-8gb", 0.01), VariantSpec("n100-16gb", 0.02))
        for seq, version in enumerate(VERSIONS, 1):
            self.world.publish(version, seq, variants)
        self.fates: dict[tuple[str, str], str] = {}
        self.issued: dict[str, int] = {}
        self.turns = 3
        self.priority, self.text = 0, ""
        self._enroll(3)

    def teardown(self) -> None:
        """Close the world."""
        if hasattr(self, "exit"):
            self.exit.close()

    def _enroll(self, count: int) -> None:
        def fate(device: SimDevice, order: Assignment) -> Failure | str | None:
            return FATES[self.fates.get((device.name, order.version), "good")]

        prefix = f"d{len(self.world.devices)}"
        self.world.enroll(count, prefix=prefix, labels={"site": f"s{len(self.world.devices) % 2}"}, fate=fate)

    # ---- what may happen ----

    @precondition(lambda self: len(self.world.devices) < 6)
    @rule()
    def a_device_joins(self) -> None:
        """One more."""
        self._enroll(1)

    @rule(data=st.data(), version=st.sampled_from(VERSIONS), kind=st.sampled_from(sorted(FATES)))
    def fate_is_set(self, data: st.DataObject, version: str, kind: str) -> None:
        """A version will end so on a device."""
        device = data.draw(st.sampled_from([device.name for device in self.world.devices]))
        self.fates[(device, version)] = kind

    @precondition(lambda self: self.turns > 2)
    @rule(
        name=st.sampled_from(["all", "half"]),
        version=st.sampled_from(VERSIONS),
        on_abort=st.sampled_from(["hold", "revert_all", "hold", "revert_uncommitted"]),
        approvals=st.sampled_from([0, 0, 0, 1]),
        again=st.sampled_from([False, False, True]),
    )
    def a_blueprint_is_applied(
        self, name: str, version: str, on_abort: str, approvals: int, again: bool
    ) -> None:
        """A change begins, or is found to be no change; the newest blueprint has the highest priority."""
        self.priority += not again or not self.text
        text = (
            self.text
            if again and self.text
            else blueprint(
                name,
                version=version,
                selector="" if name == "all" else "site = s0",
                on_abort=on_abort,
                approvals=approvals,
                deadlines="{acknowledge_s: 400, update_s: 200}",
                priority=self.priority,
            )
        )
        self.text = text
        self.world.apply(text)
        self.turns = 0  # give it time before the next change: a walk of changes alone reaches nothing

    @precondition(lambda self: self.turns > 0)
    @rule(data=st.data(), allowed=st.sampled_from([True, True, True, False]))
    def a_person_acts(self, data: st.DataObject, allowed: bool) -> None:
        """On a recent rollout; what the machine does not allow is refused and changes nothing."""
        rollouts = [record.id for record in self.world.services.rollout_views.records()][:2]
        if not rollouts:
            return
        rollout_id = data.draw(st.sampled_from(rollouts))
        before = self.world.rollout(rollout_id)
        choices = sorted(before.actions) if allowed and before.actions else sorted(ACTIONS)
        action = data.draw(st.sampled_from(choices))
        try:
            self.world.act(rollout_id, action, APPROVER if action in ("approve", "reject") else OPERATOR)
        except (IllegalTransitionError, PermissionDeniedError):
            assert self.world.rollout(rollout_id) == before
            REACHED["refused action"] += 1
        else:
            REACHED[action] += 1

    def newest(self) -> RolloutRecord | None:
        """The newest rollout."""
        with self.world.services.store.read() as tx:
            rows = tx.rollouts.all()[:1]
        return self.world.services.rollout_views.record(rows[0].id) if rows else None

    def newest_is(self, *phases: str) -> bool:
        """Whether the newest rollout is in one of these phases."""
        newest = self.newest()
        return newest is not None and newest.phase in phases

    @precondition(lambda self: self.newest_is("scheduled", "open", "baking", "paused"))
    @rule(version=st.sampled_from(VERSIONS))
    def a_change_overtakes_another(self, version: str) -> None:
        """A blueprint of higher priority takes the same devices: the older rollout ends as superseded, at once."""
        older = self.newest()
        assert older is not None
        self.priority += 1
        self.world.apply(blueprint(f"over-{older.id}", version=version, priority=self.priority))
        if older.counts.devices:  # one whose devices all belong to a higher priority has nothing to lose
            assert self.world.rollout(older.id).phase == "superseded"

    @precondition(lambda self: self.newest_is("awaiting_approval"))
    @rule()
    def an_approver_approves(self) -> None:
        """And the rollout may start."""
        newest = self.newest()
        assert newest is not None
        self.world.act(newest.id, "approve", APPROVER)
        assert self.world.rollout(newest.id).phase == "scheduled"

    @precondition(lambda self: self.newest_is("open", "baking", "paused"))
    @rule()
    def somebody_aborts(self) -> None:
        """By the blueprint's own policy."""
        newest = self.newest()
        assert newest is not None
        self.world.act(newest.id, "abort")
        REACHED["abort"] += 1
        assert self.world.rollout(newest.id).phase in ("aborted", "rolling_back")

    @precondition(lambda self: self.newest_is("completed", "completed_partial"))
    @rule()
    def somebody_rolls_back(self) -> None:
        """What was completed."""
        newest = self.newest()
        assert newest is not None
        self.world.act(newest.id, "rollback")
        REACHED["rollback"] += 1
        assert self.world.rollout(newest.id).phase == "rolling_back"

    @precondition(lambda self: self.turns > 0)
    @rule()
    def work_stops_and_later_goes_on(self) -> None:
        """A pause of what runs now, some time, and a resume; nothing is offered in between."""
        running = [r.id for r in self.world.services.rollout_views.records() if Phase(r.phase) in RUNNING]
        if not running:
            return
        self.world.act(running[0], "pause")
        REACHED["pause"] += 1
        untouched = self.world.rollout(running[0]).counts.untouched
        self.world.round()
        paused = self.world.rollout(running[0])
        REACHED[paused.phase] += 1
        if paused.phase == "paused":
            assert paused.counts.untouched >= untouched
            self.world.act(running[0], "resume")
            REACHED["resume"] += 1

    @rule(seconds=st.sampled_from([1, 10, 10, 300]), data=st.data())
    def time_passes(self, seconds: int, data: st.DataObject) -> None:
        """Some devices check in, then the worker takes a turn."""
        silent = data.draw(st.sets(st.integers(0, 5), max_size=2))
        present = [device for index, device in enumerate(self.world.devices) if index not in silent]
        self.world.round(seconds, present)
        self.turns += 1

    @rule(limit=st.sampled_from([2, 12]))
    def the_fleet_gets_time(self, limit: int) -> None:
        """Everybody checks in until the newest rollout has ended, or for a while."""
        for _ in range(limit):
            self.world.round()
            self.turns += 1
            newest = self.newest()
            if newest is None:
                break
            REACHED[newest.phase] += 1
            if newest.ended_at:
                break

    # ---- what must hold ----

    @invariant()
    def generations_only_grow(self) -> None:
        """In the database, and as each device saw its orders."""
        if not hasattr(self, "world"):
            return
        with self.world.services.store.read() as tx:
            rows = tx.devices.all()
        for row in rows:
            assert row.generation >= self.issued.get(row.id, 0)
            assert row.assignment is None or row.assignment.generation <= row.generation
            assert row.reported_generation <= row.generation
            self.issued[row.id] = row.generation
        for device in self.world.devices:
            generations = [generation for generation, _ in device.generations]
            assert generations == sorted(generations)
            runs = [generation for generation, action in device.generations if action == "run"]
            assert len(runs) == len(set(runs)), "an order to run was delivered twice after it had been taken"

    @invariant()
    def the_books_balance(self) -> None:
        """Every device is counted once, the outbox is empty, and a device belongs to one live rollout at most."""
        if not hasattr(self, "world"):
            return
        services = self.world.services
        with services.store.read() as tx:
            assert tx.rollouts.outbox() == []
            owners: Counter[str] = Counter()
            for row in tx.rollouts.all()[:6]:
                members = tx.rollouts.members(row.id)
                REACHED[row.state.phase.value] += 1
                if row.state.phase in ALIVE - {Phase.ROLLING_BACK}:
                    owners.update(member.device_id for member in members)
                if row.state.wave < 0:
                    assert all(member.generation == 0 for member in members)
                opened = [member for member in members if member.status is not DeviceStatus.WAITING]
                assert all(member.wave <= row.state.wave or row.state.phase in ENDED for member in opened)
                assert (row.ended_at is not None) == (
                    row.state.phase in ENDED
                ) or row.state.phase is Phase.ROLLING_BACK
            recent = [row.id for row in tx.rollouts.all()[:2]]
        assert not owners or max(owners.values()) == 1
        for rollout_id in recent:
            c = services.rollout_views.record(rollout_id).counts
            settled = c.committed + c.failed + c.reverted + c.refused + c.withdrawn
            assert settled + c.in_flight + c.presumed_failed + c.not_reached <= c.devices

    @invariant()
    def nothing_that_failed_by_content_stays(self) -> None:
        """A device never serves a release that its own probation refused."""
        if not hasattr(self, "world"):
            return
        for device in self.world.devices:
            if device.state.committed is not None:
                assert device.state.committed.assignment_digest not in device.state.quarantine


@pytest.mark.slow
def test_the_rollout_service_keeps_its_books_whatever_happens() -> None:
    """And the walk really reached the states that matter (a walk that only ever completes proves nothing)."""
    REACHED.clear()
    run_state_machine_as_test(RolloutService, settings=settings(max_examples=20, stateful_step_count=50))
    wanted = {phase.value for phase in RUNNING} | {
        "completed",
        "rolled_back",
        "aborted",
        "superseded",
        "paused",
        "awaiting_approval",
        "refused action",
        "abort",
        "rollback",
        "pause",
        "resume",
    }
    assert wanted <= set(REACHED), f"never reached: {sorted(wanted - set(REACHED))} of {dict(REACHED)}"

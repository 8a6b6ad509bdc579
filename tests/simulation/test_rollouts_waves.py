"""Rollouts from birth to end, with real devices machines, the real HTTP surface and simulated time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.support.control_plane import FACTS, MiB, SimDevice, VariantSpec, blueprint
from tests.support.simulated_fleet import APPROVER, OPERATOR, World, world

from slmops.core.device.machine import Failure
from slmops.core.errors import (
    ConflictError,
    DocumentError,
    IllegalTransitionError,
    NotFoundError,
    PermissionDeniedError,
)
from slmops.protocol.messages import Assignment

CONTENT = Failure("content", "golden.committed_pack", "lost 1 of 1 answers")
DISK = Failure("environment", "device.no_space", "needs 85 MB, 1 MB free")


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[World]:
    """A world with release 1.0.0."""
    with world(tmp_path / "data") as made:
        made.publish("1.0.0", 1)
        yield made


def bad(version: str, failure: Failure | str = CONTENT, only: str = ""):
    """A fate: this version fails (on this device only)."""

    def fate(device: SimDevice, order: Assignment) -> Failure | str | None:
        return failure if order.version == version and only in device.name else None

    return fate


def running(world: World) -> set[str]:
    """Versions that the fleet runs, by the devices' own journals."""
    return {
        device.orders[device.state.committed.assignment_digest].version
        if device.state.committed
        else "nothing"
        for device in world.devices
    }


def test_a_good_release_reaches_every_device_wave_by_wave(plane: World) -> None:
    """Canary first, then the rest; success is what the devices report, and the reasons say so."""
    plane.enroll(6)
    rollout_id = plane.apply(blueprint(version="1.0.0"))
    plane.round()
    early = plane.rollout(rollout_id)
    assert (early.phase, early.wave, early.counts.untouched) == ("open", 0, 5)
    done = plane.until_ended(rollout_id)
    assert done.phase == "completed"
    assert done.counts.committed == 6
    assert running(plane) == {"1.0.0"}
    assert [wave.status for wave in done.waves] == ["passed", "passed"]
    assert {finding.verdict for finding in done.findings} == {"pass"}
    assert all(device.generations == [(1, "run")] for device in plane.devices)


def test_a_bad_canary_stops_the_rollout_and_no_other_device_is_touched(plane: World) -> None:
    """The canary goes back by itself, the rollout aborts by itself, five devices never heard of it."""
    plane.enroll(6)
    plane.until_ended(plane.apply(blueprint(version="1.0.0")))
    plane.publish("1.1.0", 2)
    for device in plane.devices:
        device.fate = bad("1.1.0")
    done = plane.until_ended(plane.apply(blueprint(version="1.1.0")))
    assert done.phase == "rolled_back"
    assert (done.counts.reverted, done.counts.untouched, done.counts.committed) == (1, 5, 0)
    assert "1 content failures in this wave, 0 tolerated" in done.reason
    assert running(plane) == {"1.0.0"}
    touched = [device for device in plane.devices if len(device.generations) > 1]
    assert len(touched) == 1


def test_committed_devices_go_back_when_a_later_wave_fails(plane: World) -> None:
    """revert_all: every device that the rollout touched returns to what it ran before."""
    plane.enroll(6)
    plane.until_ended(plane.apply(blueprint(version="1.0.0")))
    plane.publish("1.1.0", 2)
    waves = "[{limit: 2, max_failures: 0}, {limit: 100%, max_failures: 0}]"
    rollout_id = plane.apply(blueprint(version="1.1.0", waves=waves))
    while plane.rollout(rollout_id).wave < 1:
        plane.round()
    for device in plane.devices:
        device.fate = bad("1.1.0")
    done = plane.until_ended(rollout_id)
    assert done.phase == "rolled_back"
    assert running(plane) == {"1.0.0"}
    went_back = [member for wave in done.waves for member in wave.devices if member.revert]
    assert {member.revert for member in went_back} == {"done"}
    assert sum(("revert" in dict(map(reversed, d.generations))) for d in plane.devices) == 2


def test_on_abort_hold_leaves_committed_devices_where_they_are(plane: World) -> None:
    """hold: nobody is taken back, open offers are withdrawn."""
    plane.enroll(4)
    plane.until_ended(plane.apply(blueprint(version="1.0.0")))
    plane.publish("1.1.0", 2)
    rollout_id = plane.apply(blueprint(version="1.1.0", on_abort="hold"))
    while plane.rollout(rollout_id).counts.committed < 1:
        plane.round()
    plane.act(rollout_id, "abort")
    plane.rounds(3)
    done = plane.rollout(rollout_id)
    assert done.phase == "aborted"
    assert running(plane) == {"1.0.0", "1.1.0"}


def test_a_full_disk_stops_nobody(plane: World) -> None:
    """An environment failure is not counted against max_failures."""
    plane.enroll(10)
    plane.until_ended(plane.apply(blueprint(version="1.0.0")))
    plane.publish("1.1.0", 2)
    victim = plane.devices[3]
    victim.fate = bad("1.1.0", DISK)
    gates = "  gates: [{metric: device.failed, kind: binary, p0: 0.2, p1: 0.5}]\n"
    done = plane.until_ended(plane.apply(blueprint(version="1.1.0", extra=gates)))
    assert done.phase == "completed"
    assert (done.counts.committed, done.counts.reverted) == (9, 1)


def test_a_silent_device_is_presumed_failed_and_one_never_heard_of_is_only_not_reached(plane: World) -> None:
    """Silence never promotes by itself, and never blocks for ever."""
    plane.enroll(6, fate=bad("1.0.0", "silent", "pi-2"))
    gone = plane.devices[4]
    gone.silent = True
    gates = "  gates: [{metric: device.failed, kind: binary, p0: 0.3, p1: 0.6}]\n"
    waves = "[{limit: 100%}]"
    rollout_id = plane.apply(blueprint(version="1.0.0", waves=waves, extra=gates))
    plane.rounds(5)
    waiting = plane.rollout(rollout_id)
    assert (waiting.phase, waiting.counts.in_flight) == ("open", 2)
    # pi-2 took the offer, but a device reports an order as taken only at its next check-in: it never came.
    done = plane.until_ended(rollout_id, seconds=700)
    assert done.phase == "completed_partial"
    assert (done.counts.committed, done.counts.not_reached) == (4, 2)


def test_a_device_that_falls_silent_in_probation_counts_as_failed(plane: World) -> None:
    """It acknowledged, then nothing came until the deadline."""
    plane.enroll(3)
    plane.until_ended(plane.apply(blueprint(version="1.0.0")))
    plane.publish("1.1.0", 2)
    for device in plane.devices:
        device.fate = bad("1.1.0", "stuck")
    rollout_id = plane.apply(blueprint(version="1.1.0"))
    plane.rounds(3)
    for device in plane.devices:
        device.silent = True
    plane.rounds(70, seconds=10)
    counts = plane.rollout(rollout_id).counts
    assert (counts.presumed_failed, counts.committed) == (1, 0)
    assert plane.rollout(rollout_id).phase == "rolling_back"  # 1 of 1 failed: more than 0.02 do


def test_two_rollouts_with_different_cohorts_run_side_by_side(plane: World) -> None:
    """Disjoint selectors do not disturb one another."""
    plane.enroll(3, prefix="hki", labels={"site": "hki"})
    plane.enroll(3, prefix="tmp", labels={"site": "tmp"})
    plane.publish("1.1.0", 2)
    first = plane.apply(blueprint("north", version="1.0.0", selector="site = hki"))
    second = plane.apply(blueprint("south", version="1.1.0", selector="site = tmp"))
    plane.until_ended(first)
    plane.until_ended(second)
    assert {plane.rollout(first).phase, plane.rollout(second).phase} == {"completed"}
    versions = {
        device.name[:3]: device.orders[device.state.committed.assignment_digest].version
        for device in plane.devices
    }
    assert versions == {"hki": "1.0.0", "tmp": "1.1.0"}


def test_a_newer_rollout_on_the_same_devices_supersedes_the_older_one(plane: World) -> None:
    """The plan says so before, the older one ends as superseded, every device ends on the newer release."""
    plane.enroll(4, fate=bad("1.0.0", "stuck"))
    older = plane.apply(blueprint("first", version="1.0.0"))
    plane.rounds(2)
    plane.publish("1.1.0", 2)
    text = blueprint("first", version="1.1.0")
    assert plane.services.blueprints.plan(OPERATOR, text, "b.yaml").supersedes == (older,)
    newer = plane.apply(text)
    assert plane.rollout(older).phase == "superseded"
    plane.until_ended(newer)
    assert running(plane) == {"1.1.0"}
    for device in plane.devices:
        generations = [generation for generation, _ in device.generations]
        assert generations == sorted(set(generations))


def test_the_next_variant_is_offered_when_a_device_refuses_one(tmp_path: Path) -> None:
    """By the device's own word; when none is left, it is an environment failure with the reasons."""
    variants = (VariantSpec("pi5-8gb", 0.01, 90 * MiB), VariantSpec("pi-zero2-512mb", 0.05, 60 * MiB))
    with world(tmp_path / "data") as plane:
        made = plane.publish("1.0.0", 1, variants)
        large = made.variants["pi5-8gb"]
        picky, hopeless = plane.enroll(2)
        picky.fate = lambda device, order: "refuse" if order.variant_sha256 == large else None
        hopeless.fate = lambda device, order: "refuse"
        gates = "  gates: [{metric: device.failed, kind: binary, p0: 0.6, p1: 0.9}]\n"
        done = plane.until_ended(
            plane.apply(blueprint(version="1.0.0", waves="[{limit: 100%}]", extra=gates))
        )
        members = {member.device_id: member for wave in done.waves for member in wave.devices}
        assert members[picky.name].variant == "pi-zero2-512mb"
        assert members[picky.name].status == "committed"
        assert members[hopeless.name].status == "refused"
        assert members[hopeless.name].cause == "environment"
        assert "the device refused it" in members[hopeless.name].detail
        assert [action for _, action in hopeless.generations] == ["run", "run"]


def test_devices_get_the_best_variant_that_fits_before_the_first_byte(tmp_path: Path) -> None:
    """Own profile first, smallest KL first, and what does not fit is refused with numbers in the plan."""
    variants = (
        VariantSpec("pi5-8gb", 0.02, 90 * MiB),
        VariantSpec("pi-zero2-512mb", 0.05, 60 * MiB),
        VariantSpec("n100-16gb", 0.001, 3000 * MiB, also_for=("pi5-8gb",)),
    )
    with world(tmp_path / "data") as plane:
        plane.publish("1.0.0", 1, variants)
        plane.enroll(1, prefix="five")
        plane.enroll(1, prefix="zero", profile="pi-zero2-512mb")
        tiny = msgspec.structs.replace(FACTS, ram_limit_bytes=100 * MiB)
        plane.enroll(1, prefix="tiny", facts=tiny)
        plan = plane.services.blueprints.plan(OPERATOR, blueprint(version="1.0.0"), "b.yaml")
        chosen = {choice.device_id: choice for choice in plan.choices}
        assert chosen["five-0"].variant == "pi5-8gb"
        assert "memory: needs" in chosen["five-0"].refused[0].reasons[0]
        assert chosen["zero-0"].variant == "pi-zero2-512mb"
        assert chosen["tiny-0"].variant == ""
        assert any("no variant fits tiny-0" in note for note in plan.notes)


def test_a_channel_moves_every_blueprint_that_follows_it(plane: World) -> None:
    """Promotion begins one rollout per follower; promoting the same release again begins none."""
    plane.enroll(2)
    applied = plane.services.blueprints.apply(OPERATOR, blueprint(), "b.yaml")
    assert applied.rollout_id == ""
    assert "points nowhere yet" in applied.plan.notes[0]
    promoted = plane.services.blueprints.promote(OPERATOR, "home-intents", "1.0.0", "stable")
    assert len(promoted.rollouts) == 1
    plane.until_ended(promoted.rollouts[0])
    again = plane.services.blueprints.promote(OPERATOR, "home-intents", "1.0.0", "stable")
    assert (again.changed, again.rollouts) == (False, ())


def test_applying_the_same_blueprint_again_changes_nothing(plane: World) -> None:
    """Idempotent while it lives and after it completed."""
    plane.enroll(2)
    text = blueprint(version="1.0.0")
    first = plane.apply(text)
    assert plane.apply(text) == first
    plane.until_ended(first)
    assert plane.apply(text) == first
    assert len(plane.services.rollout_views.records()) == 1


def test_a_dynamic_last_wave_takes_in_devices_that_come_later(plane: World) -> None:
    """While the rollout runs, and after it has completed."""
    plane.enroll(2)
    rollout_id = plane.apply(blueprint(version="1.0.0"))
    plane.rounds(2)
    plane.enroll(2, prefix="late")
    done = plane.until_ended(rollout_id)
    assert done.counts.committed == 4
    plane.enroll(1, prefix="later")
    plane.rounds(4)
    assert plane.rollout(rollout_id).counts.committed == 5
    assert running(plane) == {"1.0.0"}


def test_approval_needs_somebody_else(plane: World) -> None:
    """The author cannot approve; another approver can; nothing is offered before."""
    plane.enroll(2)
    rollout_id = plane.apply(blueprint(version="1.0.0", approvals=1))
    plane.rounds(3)
    assert plane.rollout(rollout_id).phase == "awaiting_approval"
    assert all(device.generations == [] for device in plane.devices)
    with pytest.raises(PermissionDeniedError, match="cannot approve it"):
        plane.act(rollout_id, "approve")
    plane.act(rollout_id, "approve", APPROVER)
    assert plane.until_ended(rollout_id).approved_by == ("arne",)


def test_pause_stops_offers_and_resume_goes_on(plane: World) -> None:
    """And a pause of a finished rollout is refused by the machine."""
    plane.enroll(4)
    rollout_id = plane.apply(blueprint(version="1.0.0"))
    plane.round()
    plane.act(rollout_id, "pause")
    plane.rounds(5)
    assert plane.rollout(rollout_id).counts.untouched == 3
    plane.act(rollout_id, "resume")
    plane.until_ended(rollout_id)
    with pytest.raises(IllegalTransitionError):
        plane.act(rollout_id, "pause")


def test_a_person_can_roll_back_a_completed_rollout(plane: World) -> None:
    """Every device returns to the release before."""
    plane.enroll(3)
    plane.until_ended(plane.apply(blueprint(version="1.0.0")))
    plane.publish("1.1.0", 2)
    rollout_id = plane.apply(blueprint(version="1.1.0"))
    plane.until_ended(rollout_id)
    assert running(plane) == {"1.1.0"}
    plane.act(rollout_id, "rollback")
    plane.rounds(4)
    done = plane.rollout(rollout_id)
    assert done.phase == "rolled_back"
    assert running(plane) == {"1.0.0"}
    assert (done.counts.committed, done.counts.reverted, done.counts.in_flight) == (0, 3, 0)


def test_a_first_release_that_cannot_be_taken_back_says_so(plane: World) -> None:
    """There is nothing to go back to: the rollback is incomplete and names why."""
    plane.enroll(2)
    rollout_id = plane.apply(blueprint(version="1.0.0"))
    plane.until_ended(rollout_id)
    plane.act(rollout_id, "rollback")
    plane.rounds(5)
    done = plane.rollout(rollout_id)
    assert done.phase == "rollback_incomplete"
    assert {member.detail for wave in done.waves for member in wave.devices} == {
        "it has no previous release to go back to"
    }


def test_a_budget_keeps_one_device_of_each_site_available(plane: World) -> None:
    """max_unavailable counts devices between offer and outcome, per group."""
    plane.enroll(3, prefix="hki", labels={"site": "hki"}, fate=bad("1.0.0", "stuck"))
    plane.enroll(3, prefix="tmp", labels={"site": "tmp"}, fate=bad("1.0.0", "stuck"))
    extra = "  budget: {group_by: site, max_unavailable: 1}\n"
    rollout_id = plane.apply(blueprint(version="1.0.0", waves="[{limit: 100%}]", extra=extra))
    plane.rounds(3)
    offered = [device.name[:3] for device in plane.devices if device.generations]
    assert sorted(offered) == ["hki", "tmp"]
    assert plane.rollout(rollout_id).counts.in_flight == 2


def test_exposure_grows_only_with_success(plane: World) -> None:
    """max_in_flight starts small and doubles as devices commit."""
    plane.enroll(12, fate=bad("1.0.0", "stuck"))
    extra = "  max_in_flight: {start: 2, growth: 2, max: 100}\n"
    rollout_id = plane.apply(blueprint(version="1.0.0", waves="[{limit: 100%}]", extra=extra))
    plane.rounds(3)
    assert plane.rollout(rollout_id).counts.in_flight == 2


def test_a_retired_device_is_left_alone(plane: World) -> None:
    """Its offer ends as withdrawn, and the rollout does not wait for it."""
    plane.enroll(3, fate=bad("1.0.0", "stuck", "pi-1"))
    rollout_id = plane.apply(blueprint(version="1.0.0", waves="[{limit: 100%}]"))
    plane.rounds(3)
    plane.services.fleet.retire(OPERATOR, "pi-1")
    plane.devices = [device for device in plane.devices if device.name != "pi-1"]
    done = plane.until_ended(rollout_id)
    assert (done.counts.committed, done.counts.withdrawn) == (2, 1)


def test_what_a_blueprint_gets_wrong_is_said_with_its_place(plane: World) -> None:
    """Line and column of a bad value; an unknown version; a prompt that the release does not have."""
    with pytest.raises(DocumentError, match=r"^b\.yaml:8:10: rollout\.waves"):
        plane.services.blueprints.plan(OPERATOR, blueprint(version="1.0.0", waves="[]"), "b.yaml")
    with pytest.raises(NotFoundError, match=r"no release home-intents 9\.9\.9; published: 1\.0\.0"):
        plane.apply(blueprint(version="9.9.9"))
    text = blueprint(version="1.0.0").replace(
        "context_tokens: 1024", "context_tokens: 1024, system_prompt: default"
    )
    with pytest.raises(NotFoundError, match="has no prompt 'default'"):
        plane.apply(text)


def test_prompts_are_part_of_the_assignment(tmp_path: Path) -> None:
    """A blueprint that names a signed prompt assigns its digest, and changing it is another rollout."""
    with world(tmp_path / "data") as plane:
        made = plane.publish("1.0.0", 1, prompts={"default": "Answer in JSON.", "short": "JSON."})
        plane.enroll(1)
        plain = blueprint(version="1.0.0")
        with_prompt = plain.replace("context_tokens: 1024", "context_tokens: 1024, system_prompt: default")
        plane.until_ended(plane.apply(plain))
        plane.until_ended(plane.apply(with_prompt))
        first, second = plane.devices[0].orders.values()
        assert first.release_sha256 == second.release_sha256 == made.digest
        assert first.assignment_digest != second.assignment_digest
        assert second.serving is not None
        assert second.serving.system_prompt == "default"
        assert [prompt.name for prompt in second.prompts] == ["default"]


def test_an_empty_first_wave_is_refused_and_leaves_nothing_behind(plane: World) -> None:
    """It could never pass; once a device is in it, the same text is applied."""
    plane.enroll(3)
    source = blueprint(version="1.0.0", waves='[{selector: "canary = always"}, {limit: 100%}]')
    with pytest.raises(ConflictError, match=r"first wave .* has no device"):
        plane.apply(source)
    assert plane.services.blueprints.records() == []
    plane.services.fleet.set_labels(OPERATOR, plane.devices[0].name, {"canary": "always"})
    assert plane.until_ended(plane.apply(source)).phase == "completed"


def test_a_plan_says_who_would_refuse_to_go_back(plane: World) -> None:
    plane.enroll(2)
    plane.publish("1.1.0", 2)
    plane.until_ended(plane.apply(blueprint(version="1.1.0")))
    planned = plane.services.blueprints.plan(OPERATOR, blueprint(version="1.0.0"), "blueprint.yaml")
    (note,) = [note for note in planned.notes if "will refuse" in note]
    assert "(1.1.0)" in note and "1.0.0" in note

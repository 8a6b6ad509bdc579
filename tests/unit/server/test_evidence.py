"""What a device's words make of its place in a rollout, and when it has come back."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from slmops.core.evidence.statistics import PairedCounts
from slmops.core.rollout.judge import Deadlines, DeviceStatus, count
from slmops.protocol.messages import SCHEMA, Assignment, Facts, GoldenReport, OutcomeReport
from slmops.server.ports.rows import DeviceRow, MemberRow, OutcomeRow
from slmops.server.services.checkins import is_pending
from slmops.server.services.evidence import NO_VARIANT, evidence_of, observe, paired
from slmops.server.services.reverts import needs_order, take_back

NOW = datetime(2026, 11, 8, tzinfo=timezone.utc)
MINE, OLD = "a" * 64, "b" * 64
FACTS = Facts("aarch64", 4, 1, 1, {}, "0")
ORDER = Assignment(SCHEMA, 5, "run", MINE, "r-1")
OFFERED = MemberRow(
    "r-1", "pi", 0, 0, DeviceStatus.OFFERED, generation=5, assignment_digest=MINE, offered_at=NOW
)
DEVICE = DeviceRow(
    "pi", "p", {}, "", "", NOW, FACTS, generation=5, delivered_generation=5, assignment=ORDER, last_seen_at=NOW,
    reported_generation=4, phase="committed", running=OLD,
)  # fmt: skip


def outcome(
    status: str = "committed", *, digest: str = MINE, generation: int = 5, **more: object
) -> OutcomeRow:
    """An outcome report."""
    report = OutcomeReport(digest, "r-1", generation, status, **more)  # type: ignore[arg-type]
    return OutcomeRow(1, "pi", NOW, report)


def test_an_offer_is_acknowledged_by_the_generation_that_the_device_reports() -> None:
    """Not by having been delivered."""
    assert observe(OFFERED, DEVICE, []).status is DeviceStatus.OFFERED
    working = observe(OFFERED, replace(DEVICE, reported_generation=5, phase="downloading"), [])
    assert (working.status, working.acknowledged_at) == (DeviceStatus.IN_PROGRESS, NOW)


def test_success_is_committed_and_running_what_was_assigned() -> None:
    """One without the other is not success."""
    device = replace(DEVICE, reported_generation=5)
    claimed = observe(OFFERED, device, [outcome()])
    assert (claimed.status, claimed.running_matches) == (DeviceStatus.COMMITTED, False)
    true = observe(OFFERED, replace(device, running=MINE), [outcome()])
    assert (true.status, true.running_matches) == (DeviceStatus.COMMITTED, True)


@pytest.mark.parametrize(
    "late", [outcome(digest=OLD), outcome(generation=4)], ids=["another assignment", "an older generation"]
)
def test_late_outcomes_of_other_offers_are_ignored(late: OutcomeRow) -> None:
    """They belong to another time."""
    assert observe(OFFERED, DEVICE, [late]) == OFFERED


def test_the_newest_outcome_counts() -> None:
    """Committed, then taken back by somebody at the device."""
    seen = observe(OFFERED, DEVICE, [outcome(), outcome("reverted", cause="operator")])
    assert (seen.status, seen.cause) == (DeviceStatus.REVERTED, "operator")


@pytest.mark.parametrize("cause", ["content", "environment"])
def test_a_device_that_could_not_even_go_back_failed_by_the_cause_that_it_names(cause: str) -> None:
    """A damaged disk is not held against the release; a bad release is, though the revert failed for another reason."""
    seen = observe(OFFERED, DEVICE, [outcome("fallback", cause=cause)])
    assert (seen.status, seen.cause) == (DeviceStatus.FAILED, cause)


def test_a_device_that_repaired_what_it_runs_counts_as_committed_again() -> None:
    """Lost by damage on its disk, then whole: the newest word holds."""
    seen = observe(
        OFFERED, replace(DEVICE, running=MINE), [outcome("fallback", cause="environment"), outcome()]
    )
    assert (seen.status, seen.running_matches) == (DeviceStatus.COMMITTED, True)


def test_an_order_to_go_back_given_at_the_device_settles_it_in_the_rollout() -> None:
    """Refused, by its operator: counted and complete, and not held against the release's content."""
    refused = outcome("refused", cause="operator", code="device.revert_ordered")
    seen = observe(OFFERED, DEVICE, [refused])
    counts = count([evidence_of(seen)], Deadlines(), NOW)
    assert (counts.failed_environment, counts.failed_content, counts.in_flight, counts.not_reached) == (
        1,
        0,
        0,
        0,
    )


def test_a_device_without_a_variant_stays_refused() -> None:
    """Its last word about the last variant does not put it back into the queue."""
    settled = replace(OFFERED, status=DeviceStatus.REFUSED, code=NO_VARIANT)
    assert observe(settled, DEVICE, [outcome("refused", code="device.does_not_fit")]) == settled


def test_a_first_release_is_compared_with_the_reference() -> None:
    """Where no committed pack exists, a failed own prompt is one that only the reference kept."""
    assert paired(GoldenReport(7, 1)) == PairedCounts(7, 1, 0, 0)
    assert paired(GoldenReport(8, 0, both=6, only_old=1, only_new=0, neither=1)) == PairedCounts(6, 1, 0, 1)


# ---- taking back --------------------------------------------------------------------------------------------------

WANTED = replace(OFFERED, status=DeviceStatus.COMMITTED, revert="wanted")
HELD = replace(DEVICE, reported_generation=5, running=MINE)
AFTER = NOW + timedelta(seconds=30)
DEADLINES = Deadlines(acknowledge_s=3600, update_s=600)


def back(member: MemberRow, device: DeviceRow, now: datetime = AFTER) -> str:
    """The member's revert after one look; the rollback began at NOW."""
    return take_back(member, device, NOW, DEADLINES, now).revert


@pytest.mark.parametrize(
    ("device", "now", "expected"),
    [
        (HELD, AFTER, "wanted"),  # it runs the release: an order is due
        (replace(HELD, running=OLD, last_seen_at=AFTER), AFTER, "done"),  # rests on the old one, spoke since
        (replace(HELD, running=OLD), AFTER, "wanted"),  # has not spoken since
        (replace(HELD, running=OLD, candidate=MINE, phase="downloading", last_seen_at=AFTER), AFTER, "wanted"),
        (replace(DEVICE, delivered_generation=4), AFTER, "done"),  # never heard of the offer
        (replace(DEVICE, delivered_generation=4), NOW, "wanted"),  # an answer may still be on its way
        (replace(HELD, retired_at=NOW), AFTER, "done"),
        (replace(HELD, assignment=Assignment(SCHEMA, 6, "run", OLD, "r-2")), AFTER, "done"),  # a newer rollout's device
        (HELD, NOW + timedelta(seconds=3601), "unreached"),
        (replace(HELD, last_seen_at=AFTER, phase="probation"), NOW + timedelta(seconds=601), "unreached"),
    ],
)  # fmt: skip
def test_a_device_has_come_back_when_it_rests_without_the_release_and_has_spoken(
    device: DeviceRow, now: datetime, expected: str
) -> None:
    """Or when it never had it; silence runs into its deadline."""
    assert back(WANTED, device, now) == expected


def test_a_revert_is_ordered_only_where_the_release_runs() -> None:
    """A device in trial gets the withdrawal, which reverts it by itself."""
    assert needs_order(WANTED, HELD)
    assert not needs_order(WANTED, replace(HELD, phase="probation"))
    assert not needs_order(WANTED, DEVICE)
    assert not needs_order(replace(WANTED, revert="ordered"), HELD)


def test_a_device_with_nothing_to_go_back_to_is_a_failed_revert() -> None:
    """It acted upon the order and still runs the release."""
    ordered = replace(WANTED, revert="ordered", revert_generation=6)
    told = replace(HELD, delivered_generation=6, last_seen_at=AFTER)
    assert back(ordered, told) == "ordered"
    assert back(ordered, replace(told, reported_generation=6)) == "failed"
    assert back(ordered, replace(told, reported_generation=6, running=OLD, phase="reverted")) == "done"


# ---- what a device still has to hear --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "generation", "candidate", "expected"),
    [
        ("run", 4, "", True),
        ("run", 5, "", False),
        ("revert", 4, "", True),
        ("withdraw", 4, MINE, True),
        ("withdraw", 4, "", False),  # nothing to forget
        ("withdraw", 4, OLD, False),
    ],
)
def test_an_order_is_sent_until_the_device_has_acted_upon_it(
    action: str, generation: int, candidate: str, expected: bool
) -> None:
    """A withdrawal only to a device that is moving to the withdrawn release."""
    from slmops.protocol.messages import CheckinRequest

    report = CheckinRequest(SCHEMA, "boot", 1, generation, "committed", candidate=candidate)
    order = Assignment(SCHEMA, 5, action, MINE, "r-1")  # type: ignore[arg-type]
    assert is_pending(order, report) is expected

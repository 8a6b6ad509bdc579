"""What silence, failures and successes of devices add up to."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from slmops.core.evidence.gates import BinaryGate, ContinuousGate, PairedGate, Verdict
from slmops.core.evidence.statistics import PairedCounts
from slmops.core.rollout.judge import (
    Counts,
    Deadlines,
    DeviceEvidence,
    DeviceStatus,
    Gate,
    Judgement,
    count,
    judge,
)

NOW = datetime(2026, 6, 1, 12, tzinfo=timezone.utc)
DEADLINES = Deadlines(acknowledge_s=3600, update_s=600)
GOOD = PairedCounts(8, 0, 0, 0)
BAD = PairedCounts(3, 5, 0, 0)
GATES: tuple[Gate, ...] = (BinaryGate("device.failed", 0.02, 0.10), PairedGate("golden.pass", 0.0))


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def device(name: str, status: str, **facts: object) -> DeviceEvidence:
    return DeviceEvidence(name, DeviceStatus(status), **facts)  # type: ignore[arg-type]


def well(name: str, **facts: object) -> DeviceEvidence:
    return device(name, "committed", running_matches=True, golden=GOOD, **facts)


def ask(
    wave: list[DeviceEvidence],
    earlier: list[DeviceEvidence] | None = None,
    *,
    gates: tuple[Gate, ...] = GATES,
    max_failures: int | None = 0,
    min_devices: int = 1,
) -> Judgement:
    everyone = [*(earlier or []), *wave]
    return judge(
        gates,
        wave,
        everyone,
        max_failures=max_failures,
        min_devices=min_devices,
        deadlines=DEADLINES,
        now=NOW,
    )


@pytest.mark.parametrize(
    ("evidence", "counted"),
    [
        (device("d", "waiting"), Counts(waiting=1)),
        (device("d", "offered", offered_at=ago(3600)), Counts(in_flight=1)),
        (device("d", "offered", offered_at=ago(3601)), Counts(not_reached=1)),
        (device("d", "offered"), Counts(in_flight=1)),
        (device("d", "in_progress", offered_at=ago(9000), acknowledged_at=ago(600)), Counts(in_flight=1)),
        (
            device("d", "in_progress", offered_at=ago(9000), acknowledged_at=ago(601)),
            Counts(presumed_failed=1),
        ),
        (device("d", "committed", running_matches=True), Counts(committed=1)),
        (device("d", "committed", acknowledged_at=ago(10)), Counts(in_flight=1)),
        (device("d", "committed", acknowledged_at=ago(601)), Counts(presumed_failed=1)),
        (device("d", "failed", cause="content"), Counts(failed_content=1)),
        (device("d", "reverted", cause="content"), Counts(failed_content=1)),
        (device("d", "refused", cause="environment"), Counts(failed_environment=1)),
        (device("d", "failed"), Counts(failed_environment=1)),
        (device("d", "withdrawn"), Counts(not_reached=1)),
    ],
    ids=lambda value: value.status.value if isinstance(value, DeviceEvidence) else "",
)
def test_every_device_is_counted_in_one_class(evidence: DeviceEvidence, counted: Counts) -> None:
    """A device that committed but runs something else has not succeeded; silence turns into a class of its own."""
    assert count([evidence], DEADLINES, NOW) == counted


def test_settled_devices_are_the_ratios_denominator() -> None:
    """Not reached is outside of every ratio; presumed failed is a failure."""
    counts = Counts(
        committed=5, failed_content=1, failed_environment=2, presumed_failed=3, not_reached=9, in_flight=4
    )
    assert (counts.settled, counts.failed) == (11, 6)


def test_a_wave_that_does_well_passes() -> None:
    judged = ask([well("a"), well("b")])
    assert (judged.verdict, judged.complete) == (Verdict.PASS, True)
    assert [finding.gate for finding in judged.findings] == [
        "wave.reached",
        "max_failures",
        "device.failed",
        "golden.pass",
    ]
    assert judged.findings[0].reason == "2 of 2 devices run the release"


def test_one_bad_model_stops_at_its_first_device() -> None:
    """A content failure beyond max_failures fails the wave at once, with the device's own words."""
    bad = device("canary-1", "reverted", cause="content", detail="golden pack lost 5 of 8")
    judged = ask([bad, device("canary-2", "waiting")])
    assert (judged.verdict, judged.complete) == (Verdict.FAIL, False)
    assert "canary-1 reverted, golden pack lost 5 of 8" in judged.findings[1].reason


def test_the_reason_names_the_device_even_without_details() -> None:
    judged = ask([device("canary-1", "failed", cause="content")])
    assert judged.findings[1].reason.endswith("tolerated: canary-1")


def test_one_full_disk_stops_nobody() -> None:
    """Environment failures do not count against max_failures."""
    full = device("a", "failed", cause="environment")
    judged = ask([full, well("b"), well("c"), well("d")], gates=(GATES[1],))
    assert judged.verdict is Verdict.PASS


def test_but_a_wave_of_full_disks_promotes_nothing() -> None:
    """No device runs the release, so nothing is known of it: inconclusive, however many have settled."""
    judged = ask([device(name, "failed", cause="environment") for name in "ab"], gates=())
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert judged.findings[0].needed == 1


def test_without_max_failures_only_the_statistics_stop() -> None:
    wave = [device("a", "failed", cause="content"), *(well(str(n)) for n in range(30))]
    assert ask(wave, max_failures=None, gates=(GATES[0],)).verdict is Verdict.PASS


def test_environment_failures_do_count_in_the_e_process() -> None:
    """When every third device fails for whatever reason, the rollout stops."""
    wave = [device(f"f{n}", "failed", cause="environment") for n in range(4)] + [
        well(str(n)) for n in range(8)
    ]
    assert ask(wave).verdict is Verdict.FAIL


@pytest.mark.parametrize("silent", [1, 2, 5])
def test_silence_never_promotes(silent: int) -> None:
    wave = [device(str(n), "offered", offered_at=ago(9000)) for n in range(silent)]
    judged = ask(wave)
    assert (judged.verdict, judged.complete) == (Verdict.INCONCLUSIVE, True)
    assert "nobody" in judged.findings[0].reason or f"{silent} not reached" in judged.findings[0].reason


def test_devices_that_cannot_be_reached_do_not_hold_a_wave_for_ever() -> None:
    """min_devices shrinks to the devices that answered; those that did not are shown."""
    wave = [well("a"), device("b", "offered", offered_at=ago(9000))]
    judged = ask(wave, min_devices=2)
    assert judged.verdict is Verdict.PASS
    assert "1 not reached" in judged.findings[0].reason


def test_a_wave_smaller_than_min_devices_can_finish() -> None:
    assert ask([well("a")], min_devices=5).verdict is Verdict.PASS


def test_min_devices_must_settle() -> None:
    wave = [well("a"), *(device(str(n), "in_progress", acknowledged_at=NOW) for n in range(9))]
    judged = ask(wave, min_devices=5)
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert judged.findings[0].needed == 4


def test_an_empty_first_wave_is_no_success() -> None:
    """A selector that matches nobody is a mistake to be seen, not a gate to be waved through."""
    judged = ask([], gates=GATES)
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert judged.findings[0].reason == "the wave has no devices"


def test_an_empty_later_wave_rests_on_the_earlier_ones() -> None:
    """A small fleet is used up before the last wave; the rollout must still be able to complete."""
    assert ask([], [well("a"), well("b")]).verdict is Verdict.PASS


def test_every_device_answers_for_itself_in_the_golden_pack() -> None:
    wave = [well("a"), device("b", "committed", running_matches=True, golden=BAD)]
    finding = ask(wave).findings[-1]
    assert finding.verdict is Verdict.FAIL
    assert finding.reason == "1 devices lost more than 0, b lost 0.62"


def test_a_committed_device_without_golden_result_is_missing_evidence() -> None:
    finding = ask([device("a", "committed", running_matches=True)]).findings[-1]
    assert (finding.verdict, finding.needed) == (Verdict.INCONCLUSIVE, 1)


@pytest.mark.parametrize("golden", [None, PairedCounts(0, 0, 0, 0)])
def test_no_golden_result_at_all_is_missing_evidence(golden: PairedCounts | None) -> None:
    wave = [device("a", "committed" if golden else "failed", running_matches=bool(golden), golden=golden)]
    assert ask(wave).findings[-1].verdict is Verdict.INCONCLUSIVE


def test_continuous_gates_use_the_devices_that_measured_both() -> None:
    gate = ContinuousGate("decode_tps", "decrease", 0.9, 0.7)
    fast, slow = well("a", ratios={"decode_tps": 1.0}), well("b", ratios={"decode_tps": 0.3})
    assert ask([fast, well("c")], gates=(gate,)).verdict is Verdict.PASS
    assert ask([slow], [fast], gates=(gate,)).verdict is Verdict.FAIL
    assert ask([well("c")], gates=(gate,)).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), -1.0])
def test_a_ratio_that_is_none_is_an_error_not_a_pass(ratio: float) -> None:
    gate = ContinuousGate("decode_tps", "decrease", 0.9, 0.7)
    assert ask([well("a", ratios={"decode_tps": ratio})], gates=(gate,)).verdict is Verdict.ERROR


def test_a_gate_that_cannot_be_computed_is_an_error_not_a_pass() -> None:
    """Whatever breaks inside a gate fails closed, and the finding says what."""
    broken = BinaryGate("device.failed", 0.02, 0.10)
    object.__setattr__(broken, "alpha", 0.0)
    finding = ask([well("a")], gates=(broken,)).findings[-1]
    assert finding.verdict is Verdict.ERROR
    assert "ZeroDivisionError" in finding.reason

"""Gates have four answers, and pass only on evidence."""

from __future__ import annotations

import math

import pytest

from slmops.core.errors import UsageError
from slmops.core.evidence.gates import (
    BinaryGate,
    ContinuousGate,
    Finding,
    PairedGate,
    ThresholdGate,
    Verdict,
    combine,
)
from slmops.core.evidence.statistics import PairedCounts

BINARY = BinaryGate("device.failed", 0.02, 0.10)
SPEED = ContinuousGate("decode_tps", "decrease", 0.9, 0.7)
MEMORY = ContinuousGate("rss_bytes", "increase", 1.1, 1.5)


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        ("", "inconclusive"),
        ("pass", "pass"),
        ("pass inconclusive pass", "inconclusive"),
        ("inconclusive error", "error"),
        ("error fail pass", "fail"),
    ],
)
def test_the_worst_finding_decides(verdicts: str, worst: str) -> None:
    """No gate at all is inconclusive, never a pass."""
    assert combine([Finding("g", Verdict(v), "") for v in verdicts.split()]) is Verdict(worst)


@pytest.mark.parametrize(
    ("failures", "settled", "needed", "verdict", "more"),
    [
        (0, 0, 1, "inconclusive", 1),
        (0, 0, 0, "pass", 0),
        (0, 4, 5, "inconclusive", 1),
        (0, 5, 5, "pass", 0),
        (1, 20, 5, "pass", 0),
        (3, 3, 5, "fail", 0),
        (500, 500, 5, "fail", 0),
    ],
)
def test_binary_gate(failures: int, settled: int, needed: int, verdict: str, more: int) -> None:
    """It fails as soon as the e-value says so, whether or not enough devices have settled."""
    finding = BINARY.judge(failures, settled, min_devices=needed)
    assert (finding.verdict, finding.needed) == (Verdict(verdict), more)
    assert f"{failures} of {settled} devices failed" in finding.reason


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        (PairedCounts(0, 0, 0, 0), "inconclusive"),
        (PairedCounts(300, 0, 0, 0), "pass"),
        (PairedCounts(20, 0, 0, 0), "inconclusive"),
        (PairedCounts(60, 40, 0, 0), "fail"),
        (PairedCounts(96, 2, 1, 1), "inconclusive"),
    ],
)
def test_paired_gate(counts: PairedCounts, verdict: str) -> None:
    """Non-inferiority: pass and fail both need their bound on the right side of the margin."""
    finding = PairedGate("task.exact_match", 0.02).judge(counts)
    assert finding.verdict is Verdict(verdict)
    assert (finding.needed > 0) == (finding.verdict is Verdict.INCONCLUSIVE)


def test_paired_gate_says_when_more_items_would_not_help() -> None:
    finding = PairedGate("task.exact_match", 0.02).judge(PairedCounts(98, 2, 0, 0))
    assert (finding.verdict, finding.needed) == (Verdict.INCONCLUSIVE, 0)
    assert "more items would not settle it" in finding.reason


def test_paired_gate_has_a_floor() -> None:
    """As good as before is not good enough when before was bad."""
    finding = PairedGate("task.exact_match", 0.02, minimum=0.6).judge(PairedCounts(50, 0, 0, 250))
    assert finding.verdict is Verdict.FAIL
    assert "below the floor 0.6" in finding.reason


@pytest.mark.parametrize(
    ("gate", "value", "verdict"),
    [
        (ThresholdGate("kld.mean", maximum=0.05), 0.05, "pass"),
        (ThresholdGate("kld.mean", maximum=0.05), 0.051, "fail"),
        (ThresholdGate("kld.mean", maximum=0.05), math.inf, "fail"),
        (ThresholdGate("kld.mean", maximum=0.05), math.nan, "inconclusive"),
        (ThresholdGate("kld.mean", maximum=0.05), None, "inconclusive"),
        (ThresholdGate("decode_tps", minimum=15), 15, "pass"),
        (ThresholdGate("decode_tps", minimum=15), 14.9, "fail"),
        (ThresholdGate("x", minimum=1, maximum=2), 1.5, "pass"),
    ],
)
def test_threshold_gate(gate: ThresholdGate, value: float | None, verdict: str) -> None:
    assert gate.judge(value).verdict is Verdict(verdict)


@pytest.mark.parametrize("value", [20.0, 1.0])
def test_a_prediction_never_settles_a_threshold(value: float) -> None:
    """What this machine cannot measure stays inconclusive until lab evidence comes, good or bad."""
    finding = ThresholdGate("decode_tps", minimum=15).judge(value, predicted=True)
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert "predicted" in finding.reason


@pytest.mark.parametrize(
    ("gate", "ratios", "needed", "verdict"),
    [
        (SPEED, [], 3, "inconclusive"),
        (SPEED, [1.0, 0.95, 1.05], 3, "pass"),
        (SPEED, [1.0], 3, "inconclusive"),
        (SPEED, [0.65], 3, "fail"),  # one device past the critical ratio is enough
        (SPEED, [0.8] * 4, 3, "inconclusive"),  # past the allowed ratio, but four devices are no proof
        (SPEED, [0.8] * 5, 3, "fail"),
        (SPEED, [2.0, 3.0, 4.0], 3, "pass"),
        (MEMORY, [1.0, 1.05, 1.0], 3, "pass"),
        (MEMORY, [1.6], 3, "fail"),
        (MEMORY, [1.2] * 5, 3, "fail"),
        (MEMORY, [1.2] * 4, 3, "inconclusive"),
        (SPEED, [math.nan], 1, "error"),
        (SPEED, [1.0, math.inf], 1, "error"),
        (MEMORY, [-1.0], 1, "error"),
    ],
)
def test_continuous_gate(gate: ContinuousGate, ratios: list[float], needed: int, verdict: str) -> None:
    assert gate.judge(ratios, min_devices=needed).verdict is Verdict(verdict)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BinaryGate("g", 0.1, 0.1),
        lambda: BinaryGate("g", 0.0, 0.1),
        lambda: BinaryGate("g", 0.02, 1.0),
        lambda: BinaryGate("g", 0.02, 0.1, alpha=0),
        lambda: BinaryGate("g", math.nan, 0.1),
        lambda: PairedGate("g", -0.1),
        lambda: PairedGate("g", 1.0),
        lambda: PairedGate("g", 0.02, minimum=1.1),
        lambda: PairedGate("g", 0.02, confidence=0.5),
        lambda: PairedGate("g", 0.02, minimum=math.nan),
        lambda: ThresholdGate("g"),
        lambda: ThresholdGate("g", maximum=math.nan),
        lambda: ContinuousGate("g", "decrease", 0.7, 0.9),
        lambda: ContinuousGate("g", "increase", 1.5, 1.1),
        lambda: ContinuousGate("g", "decrease", 0.9, 0.0),
        lambda: ContinuousGate("g", "decrease", math.nan, 0.1),
    ],
)
def test_a_gate_that_could_never_fire_is_refused_when_it_is_made(make: object) -> None:
    """Thresholds are checked at creation: a typo must not become a gate that always passes."""
    assert callable(make)
    with pytest.raises(UsageError) as caught:
        make()
    assert caught.value.hint

"""Build gates: measured figures pass or fail, a device's figures stay open, a broken gate is an error."""

from __future__ import annotations

from typing import Any

import pytest

from slmops.build.verdicts import judge
from slmops.core.evidence.gates import Verdict
from slmops.protocol.documents.recipe import Budget, GateSpec, Target

FIGURES = {
    "kld_mean": 0.04,
    "kld_p99": 0.5,
    "same_top_ratio": 0.93,
    "perplexity": 5.0,
    "rss_bytes": 200_000_000,
    "predicted_decode_tps": 12.0,
    "prefill_tps": 300.0,
    "load_s": 0.5,
    "exact_match_ratio": 0.5,
    "schema_valid_ratio": 0.9,
    "schema_valid_constrained_ratio": 1.0,
}


def answers(right: int, of: int, items: str = "i") -> dict[str, Any]:
    group = {
        "items": [f"{items}{n}" for n in range(of)],
        "exact": [n < right for n in range(of)],
        "valid": [True] * of,
    }
    return {"free": group, "constrained": group}


def verdict(spec: GateSpec, *, after: int = 60, budget: Budget | None = None, **figures: Any) -> Verdict:
    target = Target(profile="pi5-8gb", budget=budget or Budget(artifact_bytes=1))
    finding, *_ = judge([spec], target, FIGURES | figures, answers(after, 100), answers(60, 100))
    return finding.verdict


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (GateSpec(metric="kld.mean", max=0.05), Verdict.PASS),
        (GateSpec(metric="kld.mean", max=0.03), Verdict.FAIL),
        (GateSpec(metric="kld.p99", max=0.4), Verdict.FAIL),
        (GateSpec(metric="same_top.ratio", min=0.9), Verdict.PASS),
        (GateSpec(metric="perplexity", max=4.0), Verdict.FAIL),
        (GateSpec(metric="rss_bytes", max=3e8), Verdict.PASS),
        (GateSpec(metric="decode_tps", min=10), Verdict.INCONCLUSIVE),
        (GateSpec(metric="prefill_tps", min=1e6), Verdict.INCONCLUSIVE),
        (GateSpec(metric="load_s", max=0.1), Verdict.INCONCLUSIVE),
        (GateSpec(metric="task.schema_valid", min=0.95), Verdict.FAIL),
        (GateSpec(metric="task.schema_valid_constrained", min=0.95), Verdict.PASS),
        (GateSpec(metric="task.exact_match", min=0.6), Verdict.FAIL),
    ],
)
def test_thresholds(spec: GateSpec, expected: Verdict) -> None:
    """What was measured here decides; what belongs to a device waits for one."""
    assert verdict(spec) is expected


def test_a_paired_gate_compares_the_same_items() -> None:
    """No loss passes, a large one fails, and a floor or a ceiling may stop it as well."""
    spec = GateSpec(metric="task.exact_match", max_drop=0.1)
    assert verdict(spec, after=60) is Verdict.PASS
    assert verdict(spec, after=35) is Verdict.FAIL
    assert verdict(spec, after=52) is Verdict.INCONCLUSIVE
    assert verdict(GateSpec(metric="task.exact_match", max_drop=0.1, min=0.7), after=60) is Verdict.FAIL
    assert verdict(GateSpec(metric="task.exact_match", max_drop=0.1, max=0.4), after=60) is Verdict.FAIL


def test_different_items_are_an_error() -> None:
    """A comparison of other items than asked is none."""
    target = Target(profile="pi5-8gb", budget=Budget(artifact_bytes=1))
    spec = GateSpec(metric="task.exact_match", max_drop=0.1)
    (finding,) = judge([spec], target, FIGURES, answers(60, 100, "x"), answers(60, 100))
    assert finding.verdict is Verdict.ERROR


def test_missing_and_broken_figures_never_pass() -> None:
    """Nothing measured is inconclusive, NaN too, a gate that breaks is an error."""
    spec = GateSpec(metric="kld.mean", max=0.05)
    assert verdict(spec, kld_mean=None) is Verdict.INCONCLUSIVE
    assert verdict(spec, kld_mean=float("nan")) is Verdict.INCONCLUSIVE
    target = Target(profile="pi5-8gb", budget=Budget(artifact_bytes=1))
    (finding,) = judge(
        [GateSpec(metric="task.exact_match", max_drop=0.1)], target, FIGURES, {}, answers(1, 2)
    )
    assert finding.verdict is Verdict.ERROR


def test_a_speed_budget_is_a_gate_of_its_own() -> None:
    """The target's tokens a second are asked for, and stay open until a device has measured them."""
    target = Target(profile="pi5-8gb", budget=Budget(artifact_bytes=1, decode_tps=10))
    (finding,) = judge([], target, FIGURES, answers(1, 2), answers(1, 2))
    assert (finding.gate, finding.verdict) == ("decode_tps", Verdict.INCONCLUSIVE)
    assert "predicted" in finding.reason

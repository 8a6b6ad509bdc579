"""Build gates: measured figures pass or fail, a device's figures stay open, a broken gate is an error."""

from __future__ import annotations

from typing import Any

import pytest

from slmops.build.conversations import Item
from slmops.build.shipped import check_shipped
from slmops.build.verdicts import flips_estimate, judge, warnings_of
from slmops.core.errors import DigestError
from slmops.core.evidence.estimates import Estimate
from slmops.core.evidence.gates import Verdict
from slmops.protocol.documents.recipe import Budget, Target
from slmops.protocol.documents.recipe_gates import GateSpec, Slices, WarningLights

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
        "said": [str(n < right) for n in range(of)],
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


# ---- intervals, slices, order, warnings ------------------------------------------------------------------------

TARGET = Target(profile="pi5-8gb", budget=Budget(artifact_bytes=1))


def outcomes(right: list[bool]) -> dict[str, Any]:
    group = {
        "items": [f"i{n}" for n in range(len(right))],
        "exact": right,
        "valid": right,
        "said": list(map(str, right)),
    }
    return {"free": group, "constrained": group}


def items(count: int, intent: list[str], groups: list[str] | None = None) -> dict[str, Item]:
    return {
        f"i{n}": Item(
            f"i{n}", (), f'{{"intent":"{intent[n]}"}}', groups[n] if groups else None, (("room", intent[n]),)
        )
        for n in range(count)
    }


@pytest.mark.parametrize(
    ("maximum", "expected"), [(0.06, Verdict.PASS), (0.041, Verdict.INCONCLUSIVE), (0.03, Verdict.FAIL)]
)
def test_an_estimated_figure_is_judged_by_its_interval(maximum: float, expected: Verdict) -> None:
    """The point 0.04 alone would have passed 0.041."""
    estimates = {"kld_mean": Estimate(0.04, 40, "log", 0.1).document()}
    assert verdict(GateSpec(metric="kld.mean", max=maximum), estimates=estimates) is expected


def test_slices_find_what_the_whole_hides() -> None:
    """100 items lose 8 %, all in one intent: the whole passes 15 %, the slice fails, the others pass; rare ones are pooled."""
    intent = ["light"] * 60 + ["blind"] * 30 + [f"rare{n}" for n in range(40)]
    before, after = [True] * 130, [True] * 60 + [False] * 12 + [True] * 18 + [True] * 40
    for by in ("answer.intent", "room"):
        spec = GateSpec(metric="task.exact_match", max_drop=0.15, slices=Slices(by=by, min_items=25))
        found = judge([spec], TARGET, FIGURES, outcomes(after), outcomes(before), items(130, intent))
        assert {f.gate.removeprefix("task.exact_match"): f.verdict.value for f in found} == {
            "": "pass",
            f"[{by}=blind]": "fail",
            f"[{by}=light]": "pass",
            f"[{by}=(others)]": "pass",
        }
        assert all("one of 4 questions" in finding.reason for finding in found)


def test_a_slice_may_have_its_own_margin_and_says_when_it_is_too_small() -> None:
    intent = ["light"] * 60 + ["rare"] * 5
    spec = GateSpec(
        metric="task.exact_match", max_drop=0.02, slices=Slices(by="room", min_items=30, max_drop=0.1)
    )
    found = judge([spec], TARGET, FIGURES, outcomes([True] * 65), outcomes([True] * 65), items(65, intent))
    assert [finding.verdict.value for finding in found] == ["inconclusive", "pass", "inconclusive"]
    assert (found[2].needed, found[2].reason) == (25, "5 items, at least 30 are asked for")


def test_slices_that_are_all_too_small_are_no_answer() -> None:
    spec = GateSpec(metric="task.exact_match", max_drop=0.1, slices=Slices(by="room", min_items=30))
    same = outcomes([True] * 40)
    whole, parts = judge([spec], TARGET, FIGURES, same, same, items(40, [str(n) for n in range(40)]))
    assert (whole.verdict, parts.verdict) == (Verdict.PASS, Verdict.INCONCLUSIVE)
    assert parts.gate == "task.exact_match[room]"


def test_slices_by_a_field_that_nobody_has_are_an_error() -> None:
    spec = GateSpec(metric="task.exact_match", max_drop=0.1, slices=Slices(by="colour"))
    (finding,) = judge(
        [spec], TARGET, FIGURES, outcomes([True] * 9), outcomes([True] * 9), items(9, ["x"] * 9)
    )
    assert finding.verdict is Verdict.ERROR
    assert "'colour'" in finding.reason


def test_the_template_is_the_unit_of_a_gate() -> None:
    """40 items without a flip pass 10 %; made from four templates they are four observations."""
    spec = GateSpec(metric="task.exact_match", max_drop=0.1)
    same, alone = outcomes([True] * 40), items(40, ["x"] * 40)
    grouped = items(40, ["x"] * 40, [str(n % 4) for n in range(40)])
    assert judge([spec], TARGET, FIGURES, same, same, alone)[0].verdict is Verdict.PASS
    (finding,) = judge([spec], TARGET, FIGURES, same, same, grouped)
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert "4 groups of items, design effect 10.00" in finding.reason
    assert finding.needed > 200


def test_gates_are_reported_in_the_order_in_which_they_guard() -> None:
    """Validity before rightness before likelihood before speed; a pass behind a fail says so and stays a pass."""
    specs = [
        GateSpec(metric="kld.mean", max=0.05),
        GateSpec(metric="task.exact_match", min=0.4),
        GateSpec(metric="task.schema_valid", min=0.95),
    ]
    target = Target(profile="pi5-8gb", budget=Budget(artifact_bytes=1, decode_tps=1))
    found = judge(specs, target, FIGURES, answers(60, 100), answers(60, 100))
    assert [f.gate for f in found] == ["task.schema_valid", "task.exact_match", "kld.mean", "decode_tps"]
    assert [f.verdict.value for f in found] == ["fail", "pass", "pass", "inconclusive"]
    assert "stands behind task.schema_valid (fail)" in found[1].reason
    assert "stands behind" not in found[0].reason + found[3].reason


def test_flips_are_answers_that_differ_right_or_wrong() -> None:
    """Two items whose answers differ, one of them in a group of four."""
    before, after = outcomes([True] * 10), outcomes([True] * 8 + [False] * 2)
    estimate = flips_estimate(after, before, items(10, ["x"] * 10))
    assert estimate is not None
    assert (estimate.value, estimate.clusters) == (0.2, 10)
    grouped = flips_estimate(after, before, items(10, ["x"] * 10, ["a"] * 4 + [str(n) for n in range(6)]))
    assert grouped is not None
    assert grouped.clusters == 7
    assert flips_estimate(outcomes([True]), before, {}) is None


def test_early_warnings_need_no_gate_and_stop_nothing() -> None:
    """Traffic lights by the recipe's thresholds, and whether the whole interval agrees."""
    figures = {
        "kld_mean": 0.02,
        "flips_ratio": 0.05,
        "kld_p99": 1.9,
        "top_flips_ratio": None,
        "estimates": {
            "kld_mean": Estimate(0.02, 50, "log", 0.05).document(),
            "flips_ratio": Estimate(0.05, 96, "rate", effective=96.0).document(),
        },
    }
    found = {w["signal"]: (w["light"], w["sure"]) for w in warnings_of(figures, WarningLights())}
    assert found == {"kld_mean": ("green", True), "flips_ratio": ("amber", False), "kld_p99": ("red", True)}
    stricter = warnings_of(figures, WarningLights(kld_mean=(0.001, 0.01)))
    assert stricter[0]["light"] == "red"


def test_a_gate_may_ask_what_a_warning_shows() -> None:
    figures = {
        "flips_ratio": 0.2,
        "estimates": {"flips_ratio": Estimate(0.2, 96, "rate", effective=96.0).document()},
    }
    assert verdict(GateSpec(metric="flips.ratio", max=0.08), **figures) is Verdict.FAIL


def test_what_was_measured_must_be_what_ships() -> None:
    """One step that measured other bytes is enough; the message has both digests."""
    measured = {
        kind: {"model_sha256": "a" * 64} for kind in ("answers", "likelihood", "golden scores", "speed")
    }
    check_shipped("a" * 64, measured, "pi5-8gb")
    measured["likelihood"] = {"model_sha256": "b" * 64}
    with pytest.raises(DigestError, match=r"likelihood measured .*bbbb.* ships has aaaa"):
        check_shipped("a" * 64, measured, "pi5-8gb")

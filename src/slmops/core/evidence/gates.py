"""Gates: a question with four answers, and only one of them lets anything through.

``pass`` · ``fail`` · ``inconclusive`` (not enough evidence: says how much more) · ``error`` (the gate itself
broke). A gate never passes on missing evidence. Thresholds are checked when the gate is made, not when it is
asked.

A build asks many questions of one variant: metrics, and slices of its items. They are decided together
(:func:`decide`): a refusal by any of them refuses the variant, so the chance of a false one is shared (Holm);
acceptance needs every one of them, so a variant that is worse in any passes with the chance of a single test
(intersection-union, Berger 1982, Technometrics 24), and more questions make it no easier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from slmops.core.errors import UsageError
from slmops.core.evidence.estimates import Estimate
from slmops.core.evidence.paired import ClusteredCounts, items_still_needed, paired_test
from slmops.core.evidence.statistics import (
    PairedCounts,
    failure_e_value,
    holm_adjusted,
    median,
    median_bounds,
    upper_bound,
)


class Verdict(str, Enum):
    """What a gate says."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One gate's verdict with the sentence that explains it.

    Attributes:
        gate: name of the gate's metric.
        verdict: the answer.
        reason: one sentence with the numbers that decided.
        needed: further observations that would settle an inconclusive verdict; 0 when unknown or settled.
    """

    gate: str
    verdict: Verdict
    reason: str
    needed: int = 0


_SEVERITY = (Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.ERROR, Verdict.FAIL)


def combine(findings: Sequence[Finding]) -> Verdict:
    """The worst verdict of several gates; no gates at all is inconclusive, never a pass."""
    if not findings:
        return Verdict.INCONCLUSIVE
    return max((finding.verdict for finding in findings), key=_SEVERITY.index)


@dataclass(frozen=True, slots=True)
class Claim:
    """A statistical question before it is decided together with the others of its family.

    Attributes:
        gate: name of the question.
        accept_p: p-value of "it does not hold": small speaks for a pass.
        refuse_p: p-value of "it holds": small speaks for a fail.
        confidence: one-sided.
        text: the numbers.
        needed: further observations that would settle it; 0 when none would.
        unit: what ``needed`` counts.
        stop: a reason to fail whatever the statistics say (a floor that is missed).
    """

    gate: str
    accept_p: float
    refuse_p: float
    confidence: float
    text: str
    needed: int
    unit: str = "items"
    stop: str = ""


def decide(claims: Sequence[Claim | Finding]) -> list[Finding]:
    """Decide a family of questions about one variant, in the given order; findings are settled already and stay.

    Refusals err together with at most 1 - confidence (Holm); each acceptance with at most 1 - confidence.
    """
    asked = [claim for claim in claims if isinstance(claim, Claim)]
    adjusted = iter(holm_adjusted([claim.refuse_p for claim in asked]))
    return [
        _decide_one(claim, next(adjusted), len(asked)) if isinstance(claim, Claim) else claim
        for claim in claims
    ]


def _decide_one(claim: Claim, refuse_p: float, family: int) -> Finding:
    alpha = 1 - claim.confidence
    text = claim.text
    if family > 1:
        text += f"; one of {family} questions, refused together at {alpha:.2g} (Holm)"
    if claim.stop:
        return Finding(claim.gate, Verdict.FAIL, f"{claim.stop}; {text}")
    if refuse_p <= alpha:
        return Finding(claim.gate, Verdict.FAIL, text)
    if claim.accept_p <= alpha:
        return Finding(claim.gate, Verdict.PASS, text)
    more = (
        f"; about {claim.needed} more {claim.unit} would settle it"
        if claim.needed
        else f"; more {claim.unit} would not settle it"
    )
    return Finding(claim.gate, Verdict.INCONCLUSIVE, text + more, claim.needed)


@dataclass(frozen=True, slots=True)
class BinaryGate:
    """Stops when devices fail at a rate above what is tolerated.

    Attributes:
        metric: name, ``device.failed``.
        p0: tolerated failure rate.
        p1: rate worth stopping for.
        alpha: chance of ever stopping a release whose rate is at most p0.
    """

    metric: str
    p0: float
    p1: float
    alpha: float = 0.05

    def __post_init__(self) -> None:
        """Refuse thresholds under which the gate could never fire."""
        if not (0 < self.p0 < self.p1 < 1 and 0 < self.alpha < 1):
            raise UsageError(
                f"gate {self.metric}: needs 0 < p0 < p1 < 1 and 0 < alpha < 1, "
                f"got p0={self.p0} p1={self.p1} alpha={self.alpha}",
                hint="p0: 0.02, p1: 0.10, alpha: 0.05 is a good start",
            )

    def judge(self, failures: int, settled: int, *, min_devices: int) -> Finding:
        """Judge counted devices.

        Args:
            failures: settled devices that failed (silent ones past their deadline included).
            settled: devices with an outcome.
            min_devices: fewest settled devices for a pass.
        """
        e_value = failure_e_value(failures, settled, self.p0, self.p1)
        bound = upper_bound(failures, settled)
        counted = (
            f"{failures} of {settled} devices failed (rate below {bound:.2f} at 95 %), "
            f"e-value {e_value:.2f} of {1 / self.alpha:.0f}"
        )
        if e_value >= 1 / self.alpha:
            return Finding(self.metric, Verdict.FAIL, f"{counted}: more than {self.p0:g} fail")
        if settled < min_devices:
            return Finding(
                self.metric,
                Verdict.INCONCLUSIVE,
                f"{counted}; {min_devices} are needed",
                min_devices - settled,
            )
        return Finding(self.metric, Verdict.PASS, f"{counted}: nothing speaks for more than {self.p0:g}")


@dataclass(frozen=True, slots=True)
class PairedGate:
    """Non-inferiority on the same items: the new model may lose at most ``max_drop`` against the old one.

    Attributes:
        metric: name, for example ``task.exact_match``.
        max_drop: largest acceptable absolute drop, 0..1.
        minimum: smallest acceptable rate of the new model; None for no floor.
        confidence: one-sided confidence of both decisions.
    """

    metric: str
    max_drop: float
    minimum: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Refuse ratios outside 0..1."""
        if not (
            0 <= self.max_drop < 1
            and 0.5 < self.confidence < 1
            and (self.minimum is None or 0 <= self.minimum <= 1)
        ):
            raise UsageError(
                f"gate {self.metric}: max_drop {self.max_drop}, min {self.minimum}, "
                f"confidence {self.confidence} are not ratios in range",
                hint="max_drop: 0.02, min: 0.60, confidence: 0.95",
            )

    def judge(self, counts: PairedCounts) -> Finding:
        """Judge paired outcomes alone: pass when the drop is surely below max_drop, fail when it is surely above."""
        observed = ClusteredCounts(
            counts,
            ((1, 1, 0),) * counts.only_old
            + ((1, 0, 1),) * counts.only_new
            + ((1, 0, 0),) * (counts.both + counts.neither),
        )
        return decide([self.claim(observed)])[0]

    def claim(self, observed: ClusteredCounts, name: str | None = None) -> Claim | Finding:
        """The question, to be decided with others.

        Args:
            observed: outcomes, with the groups of the items that belong together.
            name: of the question; None takes the metric's.
        """
        name, counts = name or self.metric, observed.counts
        if counts.n == 0:
            return Finding(name, Verdict.INCONCLUSIVE, "no paired items", 1)
        test = paired_test(observed, self.max_drop, self.confidence)
        rate = (counts.both + counts.only_new) / counts.n
        text = (
            f"drop {test.drop:+.3f} (bounds {test.low:+.3f} to {test.high:+.3f} at {self.confidence:.0%}, {test.form}; "
            f"{counts.n} items, {counts.only_old} lost and {counts.only_new} gained, McNemar p {test.worse_p:.2g}), "
            f"{self.max_drop:g} allowed"
        )
        below = self.minimum is not None and rate < self.minimum
        return Claim(
            name,
            test.accept_p,
            test.refuse_p,
            self.confidence,
            text,
            items_still_needed(observed, self.max_drop, self.confidence),
            stop=f"rate {rate:.3f} is below the floor {self.minimum:g}" if below else "",
        )


@dataclass(frozen=True, slots=True)
class ThresholdGate:
    """A number must stay at or below ``maximum``, or at or above ``minimum``.

    Attributes:
        metric: name, for example ``kld.mean``.
        maximum: largest acceptable value; None for no ceiling.
        minimum: smallest acceptable value; None for no floor.
    """

    metric: str
    maximum: float | None = None
    minimum: float | None = None

    def __post_init__(self) -> None:
        """Refuse a gate that cannot fail: without a bound, or with one that is not a number."""
        bounds = [bound for bound in (self.maximum, self.minimum) if bound is not None]
        if not bounds or any(math.isnan(bound) for bound in bounds):
            raise UsageError(
                f"gate {self.metric}: max {self.maximum}, min {self.minimum}: it could never fail",
                hint="give max: or min: a number",
            )

    def judge(self, value: float | None, *, predicted: bool = False) -> Finding:
        """Judge one number; a missing or merely predicted one is inconclusive."""
        if value is None or math.isnan(value):
            return Finding(self.metric, Verdict.INCONCLUSIVE, "not measured")
        if self.maximum is not None and value > self.maximum:
            verdict, reason = Verdict.FAIL, f"{value:.4g} is above {self.maximum:g}"
        elif self.minimum is not None and value < self.minimum:
            verdict, reason = Verdict.FAIL, f"{value:.4g} is below {self.minimum:g}"
        else:
            verdict, reason = Verdict.PASS, f"{value:.4g} holds"
        if predicted:
            return Finding(
                self.metric,
                Verdict.INCONCLUSIVE,
                f"{reason}, but it is predicted, not measured on the device",
                1,
            )
        return Finding(self.metric, verdict, reason)

    def claim(self, estimate: Estimate, confidence: float, unit: str = "texts") -> Claim | Finding:
        """The question about an estimated figure: judged by its interval, to be decided with others.

        A bound inside the interval is inconclusive: the figure may lie on either side of it.

        Args:
            estimate: the figure with its uncertainty.
            confidence: one-sided.
            unit: what an estimate's clusters are.
        """
        if math.isnan(estimate.value):
            return Finding(self.metric, Verdict.INCONCLUSIVE, "not measured")
        low, high = estimate.bounds(confidence)
        above = 0.0 if self.maximum is None else estimate.at_least_p(self.maximum)
        below = 0.0 if self.minimum is None else estimate.at_most_p(self.minimum)
        refusals = ([] if self.maximum is None else [estimate.at_most_p(self.maximum)]) + (
            [] if self.minimum is None else [estimate.at_least_p(self.minimum)]
        )
        limits = [limit for limit in (self.maximum, self.minimum) if limit is not None]
        asked = " and ".join(
            f"{word} {limit:g}"
            for word, limit in (("at most", self.maximum), ("at least", self.minimum))
            if limit is not None
        )
        return Claim(
            self.metric,
            max(above, below),
            min(refusals),
            confidence,
            f"{estimate.value:.4g} (bounds {low:.4g} to {high:.4g} at {confidence:.0%}, {estimate.clusters} {unit}), "
            f"{asked} asked",
            max(estimate.clusters_needed(limit, confidence) for limit in limits),
            unit,
        )


@dataclass(frozen=True, slots=True)
class ContinuousGate:
    """Compares a number before and after on the same devices.

    Attributes:
        metric: name, for example ``decode_tps``.
        direction: the change that hurts.
        allowed_ratio: new/old that is still fine; ``critical_ratio``: new/old at which one device is enough.
    """

    metric: str
    direction: Literal["decrease", "increase"]
    allowed_ratio: float
    critical_ratio: float

    def __post_init__(self) -> None:
        """Refuse ratios on the wrong side of one another."""
        ordered = (
            self.critical_ratio <= self.allowed_ratio
            if self.direction == "decrease"
            else self.critical_ratio >= self.allowed_ratio
        )
        if not ordered or min(self.allowed_ratio, self.critical_ratio) <= 0:
            raise UsageError(
                f"gate {self.metric}: allowed_ratio {self.allowed_ratio} and critical_ratio "
                f"{self.critical_ratio} contradict direction {self.direction}",
                hint="for decrease: allowed_ratio: 0.9, critical_ratio: 0.7",
            )

    def judge(self, ratios: Sequence[float], *, min_devices: int) -> Finding:
        """Judge the new/old ratios of devices that measured both."""
        n = len(ratios)
        if n == 0:
            return Finding(
                self.metric,
                Verdict.INCONCLUSIVE,
                "no device measured it before and after",
                max(min_devices, 1),
            )
        if not all(math.isfinite(ratio) and ratio >= 0 for ratio in ratios):
            return Finding(
                self.metric, Verdict.ERROR, f"a device reported a new/old that is no ratio: {ratios}"
            )
        sign = 1.0 if self.direction == "decrease" else -1.0
        middle = median(ratios)
        low, high = median_bounds(ratios)
        text = f"median new/old {middle:.2f} over {n} devices"
        if sign * (middle - self.critical_ratio) < 0:
            return Finding(self.metric, Verdict.FAIL, f"{text} is past the critical {self.critical_ratio:g}")
        harmful_bound = high if self.direction == "decrease" else low
        if sign * (harmful_bound - self.allowed_ratio) < 0:
            return Finding(
                self.metric, Verdict.FAIL, f"{text} is past {self.allowed_ratio:g} with 95 % confidence"
            )
        if n < min_devices:
            return Finding(
                self.metric,
                Verdict.INCONCLUSIVE,
                f"{text}; {min_devices} devices are needed",
                min_devices - n,
            )
        if sign * (middle - self.allowed_ratio) < 0:
            return Finding(
                self.metric,
                Verdict.INCONCLUSIVE,
                f"{text} is past {self.allowed_ratio:g}, but not with 95 % confidence",
                n,
            )
        return Finding(self.metric, Verdict.PASS, f"{text} holds {self.allowed_ratio:g}")

"""Build gates: from measured figures to findings.

Figures that belong to a machine (speed, load time) were measured here and not on a device of the profile: they are judged as
*predicted*, so their gate is inconclusive until evidence from the lab or the fleet comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slmops.core.errors import SlmopsError
from slmops.core.evidence.gates import Finding, PairedGate, ThresholdGate, Verdict
from slmops.core.evidence.statistics import PairedCounts
from slmops.protocol.documents.recipe import GateSpec, Target

#: gate metric to (figure of the variant, whether it holds for this machine only)
_FIGURES: Mapping[str, tuple[str, bool]] = {
    "kld.mean": ("kld_mean", False),
    "kld.p99": ("kld_p99", False),
    "same_top.ratio": ("same_top_ratio", False),
    "perplexity": ("perplexity", False),
    "rss_bytes": ("rss_bytes", False),
    "decode_tps": ("predicted_decode_tps", True),
    "prefill_tps": ("prefill_tps", True),
    "load_s": ("load_s", True),
    "task.exact_match": ("exact_match_ratio", False),
    "task.schema_valid": ("schema_valid_ratio", False),
    "task.schema_valid_constrained": ("schema_valid_constrained_ratio", False),
}
#: gate metric to (which answers, which outcome)
_PAIRED: Mapping[str, tuple[str, str]] = {
    "task.exact_match": ("free", "exact"),
    "task.schema_valid": ("free", "valid"),
    "task.schema_valid_constrained": ("constrained", "valid"),
}


def judge(
    gates: Sequence[GateSpec],
    target: Target,
    figures: Mapping[str, Any],
    answers: Mapping[str, Any],
    reference: Mapping[str, Any],
) -> list[Finding]:
    """Judge a variant by every gate of the recipe and of its budget.

    Args:
        gates: of the recipe.
        target: its budget may add ``decode_tps``.
        figures: of the variant, see ``_FIGURES``.
        answers: what the variant answered; ``reference``: what the unquantised model answered, on the same items.
        reference: see above.
    """
    specs = list(gates)
    if target.budget.decode_tps is not None:
        specs.append(GateSpec(metric="decode_tps", min=target.budget.decode_tps))
    return [_judge_one(spec, figures, answers, reference) for spec in specs]


def _judge_one(
    spec: GateSpec, figures: Mapping[str, Any], answers: Mapping[str, Any], reference: Mapping[str, Any]
) -> Finding:
    try:
        if spec.max_drop is not None:
            kind, outcome = _PAIRED[spec.metric]
            before, after = reference[kind], answers[kind]
            if before["items"] != after["items"]:
                return Finding(
                    spec.metric, Verdict.ERROR, "variant and unquantised model answered different items"
                )
            counts = PairedCounts.of(before[outcome], after[outcome])
            finding = PairedGate(spec.metric, spec.max_drop, spec.min, spec.confidence).judge(counts)
            if finding.verdict is Verdict.FAIL or spec.max is None:
                return finding
            return _worse(
                finding,
                ThresholdGate(spec.metric, maximum=spec.max).judge(figures.get(_FIGURES[spec.metric][0])),
            )
        name, predicted = _FIGURES[spec.metric]
        return ThresholdGate(spec.metric, maximum=spec.max, minimum=spec.min).judge(
            figures.get(name), predicted=predicted
        )
    except (
        SlmopsError,
        KeyError,
        ValueError,
        ZeroDivisionError,
    ) as error:  # a gate that breaks must not let anything through
        return Finding(spec.metric, Verdict.ERROR, f"the gate broke: {type(error).__name__}: {error}")


def _worse(first: Finding, second: Finding) -> Finding:
    severity = (Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.ERROR, Verdict.FAIL)
    return max((first, second), key=lambda finding: severity.index(finding.verdict))

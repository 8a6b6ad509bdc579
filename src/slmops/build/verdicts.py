"""Build gates: from measured figures to findings, and early warnings that need no labels.

All statistical questions about one variant, its slices included, are one family (:func:`slmops.core.evidence.gates.decide`). They
are reported in the order in which they guard: valid answers, right answers, likelihoods, the machine's figures; one that stands
behind another that did not pass says so, because its pass admits nothing.

Figures that belong to a machine (speed, load time) were measured here and not on a device of the profile: they are judged as
*predicted*, so their gate is inconclusive until evidence from the lab or the fleet comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slmops.build.conversations import Item
from slmops.core.errors import SlmopsError
from slmops.core.evidence.estimates import Estimate, rate_estimate
from slmops.core.evidence.gates import Claim, Finding, PairedGate, ThresholdGate, Verdict, decide
from slmops.core.evidence.paired import ClusteredCounts
from slmops.protocol.documents.recipe import Target
from slmops.protocol.documents.recipe_gates import GateSpec, Slices, WarningLights

#: gate metric to (figure of the variant, whether it holds for this machine only)
_FIGURES: Mapping[str, tuple[str, bool]] = {
    "kld.mean": ("kld_mean", False),
    "kld.p99": ("kld_p99", False),
    "same_top.ratio": ("same_top_ratio", False),
    "flips.ratio": ("flips_ratio", False),
    "perplexity": ("perplexity", False),
    "rss_bytes": ("rss_bytes", False),
    "decode_tps": ("predicted_decode_tps", True),
    "prefill_tps": ("prefill_tps", True),
    "load_s": ("load_s", True),
    "task.exact_match": ("exact_match_ratio", False),
    "task.schema_valid": ("schema_valid_ratio", False),
    "task.schema_valid_constrained": ("schema_valid_constrained_ratio", False),
}
#: metrics that only a device of the profile can settle
MACHINE_METRICS = frozenset(metric for metric, (_, of_machine) in _FIGURES.items() if of_machine)
#: gate metric to (which answers, which outcome)
_PAIRED: Mapping[str, tuple[str, str]] = {
    "task.exact_match": ("free", "exact"),
    "task.schema_valid": ("free", "valid"),
    "task.schema_valid_constrained": ("constrained", "valid"),
}
#: gatekeeping order: what a metric's name begins with, first to last
_ORDER = ("task.schema_valid", "task.", "kld.", "same_top.", "flips.", "perplexity", "")
_OTHERS = "(others)"


def judge(
    gates: Sequence[GateSpec],
    target: Target,
    figures: Mapping[str, Any],
    answers: Mapping[str, Any],
    reference: Mapping[str, Any],
    items: Mapping[str, Item] | None = None,
) -> list[Finding]:
    """Judge a variant by every gate of the recipe and of its budget, in gatekeeping order.

    Args:
        gates: of the recipe.
        target: its budget may add ``decode_tps``.
        figures: of the variant, see ``_FIGURES``; ``estimates`` in it: figures with bounds.
        answers: what the variant answered; ``reference``: what the unquantised model answered, on the same items.
        reference: see above.
        items: of the evaluation set by id, for groups and slices; None: each item stands alone.
    """
    specs = list(gates)
    if target.budget.decode_tps is not None:
        specs.append(GateSpec(metric="decode_tps", min=target.budget.decode_tps))
    specs.sort(key=lambda spec: _rank(spec.metric))  # stable: the recipe's order within
    claims: list[Claim | Finding] = []
    for spec in specs:
        try:
            claims += _ask(spec, figures, answers, reference, items or {})
        except (SlmopsError, KeyError, ValueError, ArithmeticError) as error:
            # a gate that breaks must not let anything through
            claims.append(
                Finding(spec.metric, Verdict.ERROR, f"the gate broke: {type(error).__name__}: {error}")
            )
    return _in_order(decide(claims))


def flips_estimate(
    answers: Mapping[str, Any], reference: Mapping[str, Any], items: Mapping[str, Item]
) -> Estimate | None:
    """Share of greedy answers that are not the unquantised model's; None where the same items were not asked."""
    before, after = reference["free"], answers["free"]
    if not before["items"] or before["items"] != after["items"]:
        return None
    units: dict[str, list[bool]] = {}
    for name, old, new in zip(before["items"], before["said"], after["said"], strict=True):
        group = items[name].group if name in items else None
        units.setdefault(f"item:{name}" if group is None else f"group:{group}", []).append(old != new)
    return rate_estimate([sum(unit) for unit in units.values()], [len(unit) for unit in units.values()])


def warnings_of(figures: Mapping[str, Any], lights: WarningLights) -> list[dict[str, Any]]:
    """Early warnings: each label-free figure with its traffic light.

    A light is what the point says; ``sure`` tells whether its whole interval is on one side of the thresholds.
    """
    found = []
    for name in type(lights).model_fields:
        value, (amber, red) = figures.get(name), getattr(lights, name)
        if value is None:
            continue
        document = figures.get("estimates", {}).get(name)
        bounds = Estimate.read(document).bounds() if document else (value, value)
        found.append(
            {
                "signal": name,
                "value": value,
                "light": _light(value, amber, red),
                "sure": len({_light(bound, amber, red) for bound in bounds}) == 1,
                "amber_from": amber,
                "red_from": red,
            }
        )
    return found


def _light(value: float, amber: float, red: float) -> str:
    return "green" if value < amber else "amber" if value < red else "red"


def _rank(metric: str) -> int:
    return next(rank for rank, prefix in enumerate(_ORDER) if metric.startswith(prefix))


def _in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Say of each pass that stands behind a question that did not pass; verdicts stay."""
    result: list[Finding] = []
    for finding in findings:
        earlier = next(
            (f for f in result if f.verdict is not Verdict.PASS and _rank(f.gate) < _rank(finding.gate)), None
        )
        behind = earlier is not None and finding.verdict is Verdict.PASS
        reason = (
            f"{finding.reason}; stands behind {earlier.gate} ({earlier.verdict.value})" if earlier else ""
        )
        result.append(replace(finding, reason=reason) if behind else finding)
    return result


def _ask(
    spec: GateSpec,
    figures: Mapping[str, Any],
    answers: Mapping[str, Any],
    reference: Mapping[str, Any],
    items: Mapping[str, Item],
) -> list[Claim | Finding]:
    name, predicted = _FIGURES[spec.metric]
    if spec.max_drop is None:
        gate = ThresholdGate(spec.metric, maximum=spec.max, minimum=spec.min)
        document = figures.get("estimates", {}).get(name)
        if document is None:
            return [gate.judge(figures.get(name), predicted=predicted)]
        unit = "groups of answers" if name == "flips_ratio" else "texts"
        return [gate.claim(Estimate.read(document), spec.confidence, unit)]
    kind, outcome = _PAIRED[spec.metric]
    before, after = reference[kind], answers[kind]
    if before["items"] != after["items"]:
        return [Finding(spec.metric, Verdict.ERROR, "variant and unquantised model answered different items")]
    paired = PairedGate(spec.metric, spec.max_drop, spec.min, spec.confidence)
    names: list[str] = before["items"]
    rows = list(range(len(names)))

    def counted(chosen: Sequence[int]) -> ClusteredCounts:
        return ClusteredCounts.of(
            [before[outcome][row] for row in chosen],
            [after[outcome][row] for row in chosen],
            [items[names[row]].group if names[row] in items else None for row in chosen],
        )

    whole = paired.claim(counted(rows))
    if spec.max is not None and isinstance(whole, Claim):
        ceiling = ThresholdGate(spec.metric, maximum=spec.max).judge(figures.get(name))
        if ceiling.verdict is not Verdict.PASS and not whole.stop:
            whole = replace(whole, stop=ceiling.reason)
    claims: list[Claim | Finding] = [whole]
    if spec.slices is not None:
        part_gate = replace(
            paired,
            max_drop=spec.max_drop if spec.slices.max_drop is None else spec.slices.max_drop,
            minimum=None,
        )
        parts = _parts(spec.slices, names, items)
        if not parts:
            text = f"no part of the {len(names)} items by {spec.slices.by} has {spec.slices.min_items} items"
            claims.append(Finding(f"{spec.metric}[{spec.slices.by}]", Verdict.INCONCLUSIVE, text))
        for part, chosen in parts:
            question = f"{spec.metric}[{spec.slices.by}={part}]"
            if len(chosen) < spec.slices.min_items:
                lacking = spec.slices.min_items - len(chosen)
                text = f"{len(chosen)} items, at least {spec.slices.min_items} are asked for"
                claims.append(Finding(question, Verdict.INCONCLUSIVE, text, lacking))
            else:
                claims.append(part_gate.claim(counted(chosen), question))
    return claims


def _parts(slices: Slices, names: Sequence[str], items: Mapping[str, Item]) -> list[tuple[str, list[int]]]:
    """Rows of each part, by name; parts that are too small, and items without the field, are one part at the end.

    Nothing when all are too small: together they are the whole, which is asked already.

    Raises:
        ValueError: no item has the field.
    """
    values = [items[name].field(slices.by) if name in items else None for name in names]
    counts = Counter(value for value in values if value is not None)
    if not counts:
        raise ValueError(f"no item of the evaluation set has the field {slices.by!r} that slices go by")
    large = sorted(value for value, count in counts.items() if count >= slices.min_items)
    parts = [(value, [row for row, found in enumerate(values) if found == value]) for value in large]
    rest = [row for row, found in enumerate(values) if found is None or counts[found] < slices.min_items]
    return [*parts, (_OTHERS, rest)] if rest and parts else parts

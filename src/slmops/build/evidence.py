"""What a build says of itself: the figures of its variants, ``evidence.json`` and ``provenance.json``.

Everything is taken from results by name; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from slmops.artifact.build_index import BuiltBase, BuiltVariant
from slmops.artifact.digest import digest_of
from slmops.build.cache import StepResult
from slmops.build.conversations import Item, read_items
from slmops.build.export.exported import LOG
from slmops.build.export.formats import format_of
from slmops.build.first_steps import BASE
from slmops.build.graph import Step
from slmops.build.plan import Plan
from slmops.build.recipe_files import ReadRecipe, serving_of
from slmops.build.step_names import (
    ASKED_REFERENCE,
    DISTRIBUTIONS,
    GOLDEN_REFERENCE,
    LIKELIHOOD_REFERENCE,
    PACK,
    SPARSITY,
    SPEEDS,
    of_target,
)
from slmops.build.verdicts import flips_estimate
from slmops.core.device.fit import ModelShape, Serving, effective_bandwidth, predict_decode_tps
from slmops.protocol.documents.recipe import Target

SCHEMA = 1


def evidence_document(
    read: ReadRecipe,
    plan: Plan,
    results: Mapping[str, StepResult],
    variants: Sequence[BuiltVariant],
    scores: Mapping[str, Any],
    *,
    fast: bool,
) -> dict[str, Any]:
    """The content of ``evidence.json``.

    Args:
        read: the recipe.
        plan: its graph.
        results: of every step, by name.
        variants: of the index, in the order of the plan's targets.
        scores: of the models that answered beside the variants.
        fast: the evaluation was cut down.
    """
    rows = []
    items = {item.id: item for item in read_items(read.sources["eval"].path)}
    for target, variant in zip(plan.targets, variants, strict=True):
        rows.append(
            {
                "profile": target.profile,
                "runtime": target.runtime,
                "sha256": variant.model.sha256,
                "artifact_bytes": variant.artifact_bytes,
                "figures": figures_of(read, target, results, items),
                "speed": None,
                **(_exported_row(target, results) if target.is_export else _searched_row(target, results)),
                "quantised": variant.quantised,
                "golden": results[of_target("expectations", target)].value,
                "gates": msgspec.to_builtins(variant.findings),
                "warnings": msgspec.to_builtins(variant.warnings),
                "measured_on": "the build machine, one thread",
                "measured_through": results[of_target("speed", target)].value.get("through", "port"),
                "predicted": ["predicted_decode_tps"],
            }
        )
    searched = [target for target in plan.targets if not target.is_export]
    choice = results[of_target("choose", searched[0])].value if searched else {}
    return {
        "schema": SCHEMA,
        "model": read.recipe.metadata.name,
        "recipe_sha256": read.sha256,
        "fast": fast,
        "evaluation": plan.evaluation.model_dump(),
        "text": results["render text"].value,
        "task_kind": read.recipe.task.kind,
        "split": read.split,
        "chat_template": results[BASE].value["chat_template"],
        "reference": {**scores["reference"], **results[DISTRIBUTIONS].value},
        "compared_with": compared_with(plan),
        "dense": scores.get("dense"),
        "weight_steps": weight_figures(plan, results),
        "base": scores.get("base"),
        "golden": {**results[PACK].value, "reference": results[GOLDEN_REFERENCE].value["scores"]},
        "damage": choice.get("damage"),
        "sensitivity": choice.get("sensitivity"),
        "speed_table": results[SPEEDS].value if SPEEDS in results else None,
        "variants": rows,
    }


def _searched_row(target: Target, results: Mapping[str, StepResult]) -> dict[str, Any]:
    """What is known of a variant whose types were searched."""
    choice = results[of_target("choose", target)].value
    quantised = results[of_target("quantise", target)].value
    budget = of_target("budget", target)
    return {
        "budget": {
            "artifact_bytes": target.budget.artifact_bytes,
            "allowed_bytes": choice["budget_bytes"],
            "bound": choice["bound"],
            "smallest_bytes": choice["smallest_bytes"],
            "derived": results[budget].value if budget in results else None,
        },
        "expected_kld": choice["expected_kld"],
        "verified": _verified(results, target),
        "speed": choice["speed"],
        "memory": choice["memory"],
        "serving": choice["serving"],
        "kv_cache_kld": choice["kv_cache_kld"],
        "ways": quantised["ways"],
        "fallbacks": quantised["fallbacks"],
    }


def _exported_row(target: Target, results: Mapping[str, StepResult]) -> dict[str, Any]:
    """What is known of a variant that another runtime's exporter made: how, and how it compares with its source."""
    made_by = results[of_target("export", target)]
    return {
        "budget": {
            "artifact_bytes": target.budget.artifact_bytes,
            "allowed_bytes": target.budget.artifact_bytes,
            "bound": "precision",
            "smallest_bytes": None,
            "derived": None,
        },
        "fallbacks": [],
        "export": {
            "precision": format_of(target.runtime, target.precision).precision,
            "files": made_by.value["files"],
            "options": made_by.value["options"],
            "toolchain": made_by.value["toolchain"],
            "export_s": made_by.seconds,
        },
        "parity": results[of_target("parity", target)].value,
        "archive": results[archive].value if (archive := of_target("archive", target)) in results else None,
    }


def _verified(results: Mapping[str, StepResult], target: Target) -> dict[str, Any] | None:
    """What the best choices really cost, when they were measured before one was taken."""
    step = results.get(of_target("verify", target))
    verified: dict[str, Any] | None = step.value["verified"] if step is not None else None
    return verified


def provenance_document(
    read: ReadRecipe, plan: Plan, results: Mapping[str, StepResult], base: BuiltBase, reference_sha256: str
) -> dict[str, Any]:
    """Base -> steps -> files. Deterministic: no times, no paths of this machine; measured figures only by their digest's name."""

    def record(step: Step) -> dict[str, Any]:
        result = results[step.name]
        measured = (step.exclusive and step.name != SPEEDS) or step.name.startswith("expectations")
        outputs = {name: file.sha256 for name, file in sorted(result.files.items()) if name != LOG}
        return {
            "name": step.name,
            "run": result.run,
            "params": result.params,
            "inputs": dict(sorted(result.inputs.items())),
            "outputs": outputs,
            "value_sha256": None if measured else digest_of(result.value),
        }

    return {
        "schema": SCHEMA,
        "model": read.recipe.metadata.name,
        "recipe_sha256": read.sha256,
        "base": {**msgspec.to_builtins(base), "source": read.recipe.base.model_dump(exclude_none=True)},
        "sources": {role: source.sha256 for role, source in sorted(read.sources.items())},
        "reference_sha256": reference_sha256,
        "steps": [record(step) for step in plan.steps],
        "tools": results[BASE].tools,
    }


def figures_of(
    read: ReadRecipe, target: Target, results: Mapping[str, StepResult], items: Mapping[str, Item]
) -> dict[str, Any]:
    """Everything that was measured or predicted of one variant, by name."""
    made_by = results[made_of(target)].value
    speed = results[of_target("speed", target)].value
    profile = read.profiles[target.profile]
    serving = Serving(**serving_with(read, target, results))
    predicted = predict_decode_tps(
        ModelShape(**made_by["shape"]), serving, effective_bandwidth(None, profile)
    )
    likelihood = results[of_target("likelihood", target)].value
    answers = results[of_target("answers", target)].value
    flips = flips_estimate(answers, results[ASKED_REFERENCE].value, items)
    estimates = likelihood["estimates"] | ({"flips_ratio": flips.document()} if flips else {})
    return {
        **likelihood,
        "estimates": estimates,
        "flips_ratio": flips.value if flips else None,
        **task_figures(read, answers),
        **{
            name: speed[name]
            for name in (
                "load_s",
                "prefill_tps",
                "decode_tps",
                "rss_bytes",
                "private_bytes",
                "busy_ratio",
                "predicted_rss_bytes",
            )
        },
        "bits_per_weight": made_by["bits_per_weight"],
        "predicted_decode_tps": round(predicted, 2),
    }


def task_figures(read: ReadRecipe, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of a model's answers: exact and valid, free and held to the schema; None where nothing was asked.

    Of plain text without a schema, nothing is asked of its form either.
    """
    free, held = answers["free"], answers["constrained"]
    formed = read.recipe.task.kind != "text" or "schema" in read.sources
    return {
        "items": len(free["items"]),
        "exact_match_ratio": _rate(free["exact"]),
        "schema_valid_ratio": _rate(free["valid"]) if formed else None,
        "constrained_items": len(held["items"]),
        "exact_match_constrained_ratio": _rate(held["exact"]),
        "schema_valid_constrained_ratio": _rate(held["valid"]),
    }


def _rate(outcomes: Sequence[bool]) -> float | None:
    return sum(outcomes) / len(outcomes) if outcomes else None


def serving_with(read: ReadRecipe, target: Target, results: Mapping[str, StepResult]) -> dict[str, Any]:
    """Settings that a variant's memory was reckoned with: a search may choose them, an export takes the recipe's."""
    if target.is_export:
        return serving_of(read.recipe)
    return dict(results[of_target("choose", target)].value["serving"])


def weight_figures(plan: Plan, results: Mapping[str, StepResult]) -> dict[str, dict[str, Any]]:
    """What each step that cuts or trains says of itself, what all of them cost together, and what zeros are worth."""
    names = [*plan.weights.steps, *(name for name in (LIKELIHOOD_REFERENCE, SPARSITY) if name in results)]
    return {name: dict(results[name].value) for name in names}


def compared_with(plan: Plan) -> str:
    """In plain words, what divergences are taken from."""
    if not plan.weights.is_cut:
        return "the unquantised model"
    kept = plan.weights.kept_tokens
    return "the model before it was cut" + (
        "" if kept is None else f", over the {kept} tokens that were kept (its probabilities renormalised)"
    )


def made_of(target: Target) -> str:
    """Name of the step that made a target's files."""
    return of_target("export" if target.is_export else "quantise", target)

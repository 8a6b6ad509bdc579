"""Choosing types under a budget: what is known about losses, what is allowed, and the exact optimum of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, NewTensor, file_bytes, open_gguf, padded, tensor_bytes
from slmops.build.graph import StepContext
from slmops.build.speeds import budget_seconds, rates_of, speed_table
from slmops.build.step_names import PROJECTION
from slmops.build.steps.memory import binds, budget_of, ways
from slmops.build.steps.sensitivity import PROBE_TYPE, fits, is_quantisable
from slmops.core.device.fit import KV_CHOICES, ModelShape
from slmops.core.errors import BudgetError
from slmops.core.search.knapsack import Option, smallest, solve, solve_within_time
from slmops.core.search.sensitivity import (
    Group,
    corrections,
    options,
    rank_correlation,
    scales,
    swallow_prices,
)

USES = (
    "slmops.artifact.gguf_layout",
    "slmops.build.gguf_file",
    "slmops.build.speeds",
    "slmops.build.steps.memory",
    "slmops.build.steps.sensitivity",
    "slmops.core.device.fit",
    "slmops.core.search.knapsack",
    "slmops.core.search.sensitivity",
)
#: metadata of the reference that is not true of a variant with mixed types
DROPPED: dict[str, int | None] = {"general.file_type": None}
#: how far measured damage corrects predictions: most of the way, and for other readings of the tables not at all and fully
CORRECTION, CORRECTIONS = 0.75, (0.0, 1.0)
#: what predicts losses, in words
PREDICTED_BY = {
    "kfac": "gradients and inputs (KFAC)",
    "fisher": "gradients projected on errors (Fisher information by row)",
    "errors": "errors weighted by the importance matrix",
}
#: contexts that are only shown are not halved below this
LEAST_CONTEXT = 256
_SHOWN_TENSORS = 4


@dataclass(frozen=True)
class Space:
    """What can be chosen.

    Attributes:
        names: of the quantisable tensors; ``table``: their options, in the same order.
        sizes: tensor to type to bytes, of types whose loss is known, and F16; ``fixed_bytes``: of everything else in the file.
        shape: of the model; ``header_bytes``: before its tensors.
        sensitivity: what the losses rest on.
    """

    names: tuple[str, ...]
    table: list[list[Option]]
    sizes: dict[str, dict[str, int]]
    fixed_bytes: int
    shape: ModelShape
    header_bytes: int
    sensitivity: Sensitivity


def possible(context: StepContext) -> dict[str, Any]:
    """Refuse a budget that no choice can meet, as soon as the shapes are known: before anything is measured.

    Files in: ``model`` (the F16 reference). Value in: maybe ``budget``. Params: as :func:`choose` takes them. Value:
    ``smallest_bytes``.

    Raises:
        BudgetError: as :func:`choose` says it.
    """
    params = budget_of(context.params, context.values.get("budget"))
    with open_gguf(context.files["model"]) as model:
        sizes = {
            t.name: sizes_of(t, [*params["types"], "F16"]) for t in model.layout.tensors if is_quantisable(t)
        }
        fixed_bytes = fixed_bytes_of(model)
        found = ways(params, model.layout.shape(), model.layout.tensors_start, None)
    least_of = {name: min(row.values()) for name, row in sizes.items()}
    least_bytes = fixed_bytes + sum(least_of.values())
    allowed = max(found, key=lambda way: way.budget_bytes).allowed
    if least_bytes > min(allowed.values()):
        raise _too_small(params, allowed, least_bytes, fixed_bytes, least_of)
    return {"smallest_bytes": least_bytes}


def choose(context: StepContext) -> dict[str, Any]:
    """Choose a type for every tensor, and how the model is served: least expected divergence within bytes and memory.

    Files in: ``model`` (the F16 reference). Values in: ``errors``; ``damage-1``... unless nothing was probed (then relative
    errors count alike everywhere); ``predictions-1``... and ``projections`` where there are gradients. A speed table comes as
    value or file ``speed-table``; ``kv-caches`` (:func:`slmops.build.steps.memory.prices`) where the cache type may be
    chosen. Params: ``types``, ``artifact_bytes``, ``ram_bytes``, ``serving``, maybe ``sensitivity`` (which prediction to take),
    ``kv_caches`` and ``least_context_tokens``, and with a speed table ``decode_tps``. Value: ``types`` of all quantised tensors,
    ``size_bytes``, ``expected_kld``, ``serving``, and what bounded the choice.

    Raises:
        BudgetError: no choice fits: names the bound, the smallest possible file and the tensors that make it.
    """
    # a target without a budget of its own: it follows from the profile
    params = budget_of(context.params, context.values.get("budget"))
    with open_gguf(context.files["model"]) as model:
        timed = speed_table(context.files, context.values)
        space = space_of(model, context.values, params, speeds=timed)
    least_bytes = space.fixed_bytes + smallest(space.table)
    budget_s = budget_seconds(timed, params)
    tried = [
        (way, solve_within_time(space.table, way.budget_bytes - space.fixed_bytes, budget_s))
        for way in ways(params, space.shape, space.header_bytes, context.values.get("kv-caches"))
    ]
    # the first of equals: as asked
    best = min(
        ((way, found) for way, found in tried if found is not None),
        key=lambda pair: pair[0].worth(pair[1][0].loss),
        default=None,
    )
    if best is None:
        allowed = max((way for way, _ in tried), key=lambda way: way.budget_bytes).allowed
        least_of = {name: min(space.sizes[name].values()) for name in space.names}
        raise _too_small(params, allowed, least_bytes, space.fixed_bytes, least_of)
    way, (choice, took_s) = best
    allowed, budget_bytes = way.allowed, way.budget_bytes
    bound = min(allowed, key=lambda name: allowed[name])
    if budget_s < math.inf:
        free = solve(space.table, budget_bytes - space.fixed_bytes)
        bound = "decode_tps" if free is not None and free.picks != choice.picks else bound
    picked = zip(space.names, space.table, choice.picks, strict=True)
    return {
        "types": {name: row[pick].name for name, row, pick in picked},
        "size_bytes": space.fixed_bytes + choice.size_bytes,
        "budget_bytes": budget_bytes,
        "bound": bound,
        "smallest_bytes": least_bytes,
        "expected_kld": choice.loss,
        "undone_kld": space.sensitivity.undone,
        "damage": _damage_summary(space.sensitivity.groups),
        "sensitivity": space.sensitivity.report,
        "speed": None
        if timed is None
        else {
            "machine": timed["machine"],
            "asked_decode_tps": params.get("decode_tps"),
            "predicted_decode_tps": 1 / (timed["fixed_s"] + took_s)
            if timed["fixed_s"] + took_s > 0
            else None,
            "met": took_s <= budget_s,
        },
        "serving": way.serving,
        "kv_cache_kld": way.price,
        "memory": _memory(params, space, tried[0][0].allowed, context.values.get("kv-caches")),
    }


def _memory(
    params: Mapping[str, Any], space: Space, allowed: Mapping[str, int], measured: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """What other cache types and contexts would leave for weights, and what the divergence would be expected to be then.

    Only where memory is the bound of what was asked for. ``kv_cache_kld``: of the cache type, which comes on top; None where it
    was not measured.
    """
    if not binds(allowed):
        return []
    asked = params["serving"]
    shorter = {"least_context_tokens": max(asked["context_tokens"] // 2, LEAST_CONTEXT)}
    known = measured["kld"] if measured is not None else {}
    rows = []
    for way in ways(
        {"kv_caches": KV_CHOICES, **shorter, **params}, space.shape, space.header_bytes, measured
    )[1:]:
        found = solve(space.table, way.budget_bytes - space.fixed_bytes)
        rows.append(
            {
                "kv_cache": way.serving["kv_cache"],
                "context_tokens": way.serving["context_tokens"],
                "allowed_bytes": way.budget_bytes,
                "expected_kld": None if found is None else found.loss,
                "kv_cache_kld": known.get(way.serving["kv_cache"]),
            }
        )
    return rows


def space_of(
    model: GgufFile,
    values: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    correction: float = CORRECTION,
    speeds: Mapping[str, Any] | None = None,
) -> Space:
    """Every tensor's options.

    Args:
        model: the F16 reference.
        values: the tables, as :func:`choose` takes them.
        params: ``types``, maybe ``sensitivity`` (which prediction to take).
        correction: how far measured damage corrects predictions, 0..1.
        speeds: a speed table; types that it does not know count as its slowest, F16 by its bytes against Q8_0.
    """
    measured = values["errors"]
    sensitivity = sensitivity_of(values, correction, params.get("sensitivity", "auto"))
    prices = swallow_prices({name: row["change"] for name, row in measured.items()}, sensitivity.undone)
    tensors = [tensor for tensor in model.layout.tensors if is_quantisable(tensor)]
    rates = rates_of(speeds, [*params["types"], "F16"]) if speeds is not None else {}
    untied = model.tensor("output.weight") is not None

    def read_each_token(tensor: Tensor) -> bool:
        return not (untied and tensor.name == "token_embd.weight")

    sizes = {
        t.name: sizes_of(
            t, [name for name in params["types"] if name in sensitivity.losses[t.name]] + ["F16"]
        )
        for t in tensors
    }
    table = [
        options(
            sizes[t.name],
            sensitivity.losses[t.name],
            measured[t.name]["swallowed"],
            1.0,
            prices[t.name],
            seconds={name: rate * t.elements for name, rate in rates.items()} if read_each_token(t) else None,
        )
        for t in tensors
    ]
    return Space(
        tuple(t.name for t in tensors),
        table,
        sizes,
        fixed_bytes_of(model),
        model.layout.shape(),
        model.layout.tensors_start,
        sensitivity,
    )


@dataclass(frozen=True)
class Sensitivity:
    """What is known about losses before anything is written.

    Attributes:
        losses: tensor to type to expected divergence; ``groups``: what was measured; ``undone``: divergence of the base.
        report: for the evidence: the method, why not a better one, and how well predictions rank what was measured.
    """

    losses: Mapping[str, Mapping[str, float]]
    groups: list[Group]
    undone: float
    report: dict[str, Any]


def sensitivity_of(
    values: Mapping[str, Any], correction: float = CORRECTION, prefer: str = "auto"
) -> Sensitivity:
    """Put the tables together: predictions from gradients where there are some, else measured damage times errors.

    Args:
        values: the tables.
        correction: how far measured damage corrects predictions, 0..1.
        prefer: ``kfac`` or ``fisher`` takes that prediction; else the one that ranks measured damage better.
    """
    measured = values["errors"]
    errors: dict[str, dict[str, float]] = {name: row["error"] for name, row in measured.items()}
    parts = [values[name] for name in sorted(values) if name.startswith("damage")]
    groups = [
        Group(tuple(group["tensors"]), float(group["damage"])) for part in parts for group in part["groups"]
    ]
    undone = next((float(part["undone"]) for part in parts if part["undone"] is not None), 1.0)
    predictions, reason = _predictions(values)
    ranked = {"errors": {name: row[PROBE_TYPE] for name, row in errors.items()}}
    ranked |= {method: one.probe for method, one in predictions.items()}
    correlations = {
        method: rank_correlation(
            [group.damage for group in groups],
            [sum(probe[name] for name in group.tensors) for group in groups],
        )
        for method, probe in ranked.items()
    }
    if predictions:
        # without enough groups to tell, the one that has served longest
        method = (
            prefer if prefer in predictions else max(predictions, key=lambda name: correlations[name] or -1.0)
        )
        factor = corrections(groups, ranked[method], correction) if groups else {}
        losses = {
            name: {kind: factor.get(name, 1.0) * value for kind, value in row.items()}
            for name, row in predictions[method].kld.items()
        }
        predicted_by = PREDICTED_BY[method]
    else:
        scale = scales(groups, errors, PROBE_TYPE) if groups else dict.fromkeys(errors, 1.0)
        losses = {
            name: {kind: scale[name] * value for kind, value in row.items()} for name, row in errors.items()
        }
        method = "measured damage" if groups else "errors"
        predicted_by = PREDICTED_BY["errors"]
        reason = reason or "torch is not installed, or gradients were not asked for"
    report = {
        "method": method,
        "reason": reason,
        "predicted_by": predicted_by,
        "rank_correlation": correlations[method if method in correlations else "errors"],
        "rank_correlations": correlations,
        "measured_groups": len(groups),
    }
    return Sensitivity(losses, groups, undone, report)


@dataclass(frozen=True)
class _Prediction:
    """By tensor: ``kld`` in each type, and ``probe``, in the type that damage is measured with."""

    kld: dict[str, dict[str, float]]
    probe: dict[str, float]


def _predictions(values: Mapping[str, Any]) -> tuple[dict[str, _Prediction], str]:
    """Predictions from gradients by method, and why there are none."""
    found: dict[str, _Prediction] = {}
    reason = ""
    for method, prefix in (("kfac", "predictions"), ("fisher", PROJECTION)):
        tables = [values[name] for name in sorted(values) if name.startswith(prefix)]
        missing = next((table["reason"] for table in tables if not table["available"]), "")
        reason = reason or missing
        if tables and not missing:
            found[method] = _Prediction(
                {name: row for table in tables for name, row in table["kld"].items()},
                {name: value for table in tables for name, value in table["probe"].items()},
            )
    return found, reason


def sizes_of(tensor: Tensor, types: Sequence[str]) -> dict[str, int]:
    """Bytes of a tensor, padding included, in each type that its shape allows."""
    return {name: padded(tensor_bytes(name, tensor.shape)) for name in types if fits(name, tensor)}


def fixed_bytes_of(model: GgufFile) -> int:
    """Bytes of everything in the file that no choice changes: header, vectors."""
    whole_bytes = file_bytes(model, [kept(model, t) for t in model.layout.tensors], DROPPED)
    return whole_bytes - sum(padded(t.size_bytes) for t in model.layout.tensors if is_quantisable(t))


def kept(model: GgufFile, tensor: Tensor) -> NewTensor:
    """A tensor as it is."""
    return NewTensor(tensor.name, tensor.type_name, tensor.shape, lambda: bytes(model.blob(tensor)))


def _too_small(
    params: Mapping[str, Any],
    allowed: Mapping[str, int],
    least_bytes: int,
    fixed_bytes: int,
    least_of: Mapping[str, int],
) -> BudgetError:
    bound = min(allowed, key=lambda name: allowed[name])
    largest = sorted(least_of, key=lambda name: -least_of[name])[:_SHOWN_TENSORS]
    tensors = ", ".join(f"{name} {least_of[name] / 1e6:.2f} MB" for name in largest)
    rest = sum(least_of.values()) - sum(least_of[name] for name in largest)
    if bound != "artifact_bytes":
        asked = f"ram_bytes {params['ram_bytes']} leaves {max(allowed[bound], 0)} bytes for the file, so it"
    elif "because" in params:
        asked = f"the profile leaves {allowed[bound]} bytes for the file ({params['because']}), so it"
    else:
        asked = f"artifact_bytes {params['artifact_bytes']}"
    return BudgetError(
        f"target {params['profile']}: {asked} cannot be met: the smallest possible file has {least_bytes} bytes "
        f"(at least: {tensors}, {len(least_of) - len(largest)} other matrices {rest / 1e6:.2f} MB, "
        f"header and vectors {fixed_bytes / 1e6:.2f} MB)",
        hint=f"set {bound} of the budget to at least {params[bound] + least_bytes - allowed[bound]}, cut the model first "
        "(docs/howto/make-a-model-smaller.md), or use a smaller base",
        smallest_bytes=least_bytes,
        allowed_bytes=allowed[bound],
        bound=bound,
    )


def _damage_summary(groups: list[Group]) -> list[dict[str, Any]]:
    """What was measured, worst first."""
    return [
        {"first": g.tensors[0], "count": len(g.tensors), "kld": round(g.damage, 6)}
        for g in sorted(groups, key=lambda g: -g.damage)
    ]

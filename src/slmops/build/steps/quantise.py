"""Choosing types under a budget, and writing the variant's file tensor by tensor."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from slmops.artifact.chunkmap import encode_chunk_map, make_chunk_map
from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import (
    GgufFile,
    NewTensor,
    file_bytes,
    open_gguf,
    padded,
    tensor_bytes,
    write_gguf,
)
from slmops.build.graph import StepContext
from slmops.build.memo import Memo
from slmops.build.steps.calibrate import Hessians, read_imatrix
from slmops.build.steps.sensitivity import PROBE_TYPE, fits, is_quantisable
from slmops.build.steps.tensors import RUN, TensorQuantiser, frozen_blocks
from slmops.core.device.fit import ModelShape, Serving, memory_needed
from slmops.core.errors import BudgetError, BuildError
from slmops.core.search.knapsack import smallest, solve
from slmops.core.search.sensitivity import Group, options, scales, swallow_prices

USES = (
    "slmops.artifact.chunkmap",
    "slmops.artifact.fastcdc",
    "slmops.build.feedback",
    "slmops.build.gguf_file",
    "slmops.build.steps.calibrate",
    "slmops.build.steps.sensitivity",
    "slmops.build.steps.tensors",
    "slmops.core.device.fit",
    "slmops.core.search.knapsack",
    "slmops.core.search.sensitivity",
    "slmops.runtimes.llama_cpp.blocks",
    "slmops.runtimes.llama_cpp.quantise",
)
#: metadata of the reference that is not true of a variant with mixed types
DROPPED: dict[str, int | None] = {"general.file_type": None}
_SHOWN_TENSORS = 4


def choose(context: StepContext) -> dict[str, Any]:
    """Choose a type for every tensor: least expected divergence within the byte and memory budgets.

    Files in: ``model`` (the F16 reference). Values in: ``errors``, and ``damage-1``... unless nothing was probed (then relative
    errors count alike everywhere). Params: ``types``, ``artifact_bytes``, ``ram_bytes``, ``serving``. Value: ``types`` of all
    quantised tensors, ``size_bytes``, ``expected_kld`` and what bounded the choice.

    Raises:
        BudgetError: no choice fits: names the bound, the smallest possible file and the tensors that make it.
    """
    params, measured = context.params, context.values["errors"]
    errors = {name: row["error"] for name, row in measured.items()}
    parts = [context.values[name] for name in sorted(context.values) if name.startswith("damage")]
    groups = [
        Group(tuple(group["tensors"]), float(group["damage"])) for part in parts for group in part["groups"]
    ]
    scale = scales(groups, errors, PROBE_TYPE) if groups else dict.fromkeys(errors, 1.0)
    undone = next((float(part["undone"]) for part in parts if part["undone"] is not None), 1.0)
    prices = swallow_prices({name: row["change"] for name, row in measured.items()}, undone)
    with open_gguf(context.files["model"]) as model:
        tensors = [tensor for tensor in model.layout.tensors if is_quantisable(tensor)]
        fixed_bytes = file_bytes(model, [_kept(model, t) for t in model.layout.tensors], DROPPED) - sum(
            padded(t.size_bytes) for t in tensors
        )
        legal = {
            t.name: {
                name: padded(tensor_bytes(name, t.shape))
                for name in [*params["types"], "F16"]
                if fits(name, t)
            }
            for t in tensors
        }
        table = [
            options(
                legal[t.name], errors[t.name], measured[t.name]["swallowed"], scale[t.name], prices[t.name]
            )
            for t in tensors
        ]
        shape = model.layout.shape()
        header_bytes = model.layout.tensors_start
    least_bytes = fixed_bytes + smallest(table)
    allowed = _allowed_bytes(params, shape, header_bytes)
    budget_bytes = min(allowed.values())
    choice = solve(table, budget_bytes - fixed_bytes)
    if choice is None:
        raise _too_small(
            params, allowed, least_bytes, fixed_bytes, {t.name: min(legal[t.name].values()) for t in tensors}
        )
    types = {
        tensor.name: row[pick].name for tensor, row, pick in zip(tensors, table, choice.picks, strict=True)
    }
    return {
        "types": types,
        "size_bytes": fixed_bytes + choice.size_bytes,
        "budget_bytes": budget_bytes,
        "bound": min(allowed, key=lambda name: allowed[name]),
        "smallest_bytes": least_bytes,
        "expected_kld": choice.loss,
        "undone_kld": undone,
        "damage": _damage_summary(groups),
    }


def write_variant(context: StepContext) -> dict[str, Any]:
    """Quantise tensor by tensor and cut the file into chunks.

    Files in: ``model``, ``imatrix``, maybe ``hessians`` (with value ``inputs``: error feedback) and ``scales`` (an earlier
    release's file); out: ``model.gguf``, ``chunk-map.json``. Values in: ``choice``. Value: size, shape, bits a weight, histogram
    of types, every tensor that could not be stored as compactly as others and why, in which ways tensors were made, and with
    ``scales`` how many blocks kept theirs.

    Raises:
        BuildError: the file is larger than chosen (an invariant of ours).
    """
    choice = context.values["choice"]
    types: Mapping[str, str] = choice["types"]
    target = context.out / "model.gguf"
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_gguf(context.files["model"]))
        earlier = (
            stack.enter_context(open_gguf(context.files["scales"])) if "scales" in context.files else None
        )
        quantiser = quantiser_of(context, model, earlier)

        def make(tensor: Tensor) -> bytes:
            return quantiser.make(tensor, types[tensor.name])

        tensors = [
            NewTensor(t.name, types[t.name], t.shape, partial(make, t))
            if t.name in types
            else _kept(model, t)
            for t in model.layout.tensors
        ]
        write_gguf(
            target,
            model,
            tensors,
            replace=DROPPED,
            progress=lambda ratio: context.progress(ratio * 0.95, "quantising"),
        )
        notes = fallbacks(model, types)
        kept: dict[str, Any] = {}
        if earlier is not None:
            with open_gguf(target) as written:
                kept = {"frozen": frozen_blocks(earlier, written)}
    size_bytes = target.stat().st_size
    if size_bytes != choice["size_bytes"] or size_bytes > choice["budget_bytes"]:
        raise BuildError(
            f"variant has {size_bytes} bytes, chosen were {choice['size_bytes']} of {choice['budget_bytes']} allowed",
            hint="report it",
        )
    with open_gguf(target) as written:
        chunk_map = make_chunk_map(written.content, "gguf", target.name)
        shape = written.layout.shape()
        histogram = Counter(tensor.type_name for tensor in written.layout.tensors)
    (context.out / "chunk-map.json").write_bytes(encode_chunk_map(chunk_map))
    return {
        "bytes": size_bytes,
        "shape": asdict(shape),
        "bits_per_weight": 8 * shape.weights_bytes / shape.parameters,
        "quantised": dict(sorted(histogram.items())),
        "fallbacks": notes,
        "chunks": len(chunk_map.chunks),
        "ways": dict(sorted(quantiser.ways.items())),
        **kept,
    }


def quantiser_of(context: StepContext, model: GgufFile, earlier: GgufFile | None = None) -> TensorQuantiser:
    """What makes this step's tensors, from its inputs ``imatrix`` and maybe ``hessians``."""
    hessians = (
        Hessians(context.files["hessians"], context.values["inputs"]["inputs"])
        if "hessians" in context.files
        else None
    )
    importance = read_imatrix(context.files["imatrix"])
    return TensorQuantiser(model, importance, hessians, Memo(context.memo, RUN), earlier)


def fallbacks(model: GgufFile, types: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every tensor that is not quantised or for which k-quants are not legal, counted by reason."""
    reasons: dict[str, list[str]] = {}
    for tensor in model.layout.tensors:
        if tensor.name not in types:
            reason = (
                "vector, kept as it is"
                if len(tensor.shape) < 2
                else f"rows of {tensor.shape[0]} are no multiple of 32: kept in {tensor.type_name}"
            )
        elif types[tensor.name] == "F16":
            reason = "kept in F16: the budget allows it"
        elif not fits("Q4_K", tensor):
            reason = f"rows of {tensor.shape[0]} are no multiple of 256: no k-quants"
        else:
            continue
        reasons.setdefault(reason, []).append(tensor.name)
    return [
        {"reason": reason, "count": len(names), "first": names[0]}
        for reason, names in sorted(reasons.items())
    ]


def _kept(model: GgufFile, tensor: Tensor) -> NewTensor:
    return NewTensor(tensor.name, tensor.type_name, tensor.shape, lambda: bytes(model.blob(tensor)))


def _allowed_bytes(params: Mapping[str, Any], shape: ModelShape, header_bytes: int) -> dict[str, int]:
    """The largest file by each bound. What the engine maps is the tensors, so memory allows the header on top."""
    without_weights = memory_needed(replace(shape, weights_bytes=0), Serving(**params["serving"])).total_bytes
    return {
        "artifact_bytes": int(params["artifact_bytes"]),
        "ram_bytes": int(params["ram_bytes"]) - without_weights + header_bytes,
    }


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
    asked = (
        f"artifact_bytes {params['artifact_bytes']}"
        if bound == "artifact_bytes"
        else f"ram_bytes {params['ram_bytes']} leaves {max(allowed[bound], 0)} bytes for the file, so it"
    )
    return BudgetError(
        f"target {params['profile']}: {asked} cannot be met: the smallest possible file has {least_bytes} bytes "
        f"(at least: {tensors}, {len(least_of) - len(largest)} other matrices {rest / 1e6:.2f} MB, "
        f"header and vectors {fixed_bytes / 1e6:.2f} MB)",
        hint=f"set {bound} to at least {params[bound] + least_bytes - allowed[bound]}, or use a smaller base "
        "(fewer layers, a smaller vocabulary)",
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

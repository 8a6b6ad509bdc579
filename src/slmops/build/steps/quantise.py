"""Writing a variant's file tensor by tensor, in the types that were chosen.

Making tensors is most of the work of another budget, so two processes share it: :func:`make_tensors` leaves them in the memo,
:func:`write_variant` puts them together (and makes those that are not there).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from slmops.artifact.chunkmap import encode_chunk_map, make_chunk_map
from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, NewTensor, open_gguf, write_gguf
from slmops.build.graph import StepContext
from slmops.build.memo import Memo
from slmops.build.steps.calibrate import Hessians, read_imatrix
from slmops.build.steps.choose import DROPPED, kept
from slmops.build.steps.sensitivity import fits
from slmops.build.steps.tensors import RUN, TensorQuantiser, frozen_blocks
from slmops.core.errors import BuildError

USES = (
    "slmops.artifact.chunkmap",
    "slmops.artifact.fastcdc",
    "slmops.build.feedback",
    "slmops.build.gguf_file",
    "slmops.build.steps.calibrate",
    "slmops.build.steps.choose",
    "slmops.build.steps.sensitivity",
    "slmops.build.steps.tensors",
    "slmops.runtimes.llama_cpp.blocks",
    "slmops.runtimes.llama_cpp.quantise",
)


def make_tensors(context: StepContext) -> dict[str, Any]:
    """Make a part of a variant's tensors ahead; without a memo, nothing. Files and values in: as :func:`write_variant`.

    Params: ``part`` of ``parts``. Value: ``tensors``: how many are this part's, slices of large ones each; the same with
    and without a memo, because provenance holds it.
    """
    types: Mapping[str, str] = context.values["choice"]["types"]
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_gguf(context.files["model"]))
        earlier = (
            stack.enter_context(open_gguf(context.files["scales"])) if "scales" in context.files else None
        )
        quantiser = quantiser_of(context, model, earlier)
        tensors = [
            part
            for tensor in model.layout.tensors
            if tensor.name in types
            for part in quantiser.slices(tensor)
        ]
        mine = shares(tensors, quantiser.shared_input, context.params["parts"])[context.params["part"]]
        for index, tensor in enumerate(mine if context.memo is not None else ()):
            quantiser.make_slice(tensor, types[tensor.name])
            context.progress((index + 1) / len(mine), tensor.name)
    return {"tensors": len(mine)}


def shares(tensors: Sequence[Tensor], shared_input: Callable[[str], str], parts: int) -> list[list[Tensor]]:
    """Divide tensors into about equal parts; those with the same input stay together, because its factoring is shared.

    Slices of a large tensor are divided all the same: there factoring is little beside the rest.

    Args:
        tensors: of one model, large ones in slices.
        shared_input: names what a tensor has in common with others.
        parts: how many.
    """
    groups: dict[str, list[Tensor]] = {}
    names = Counter(tensor.name for tensor in tensors)
    for tensor in tensors:
        key = shared_input(tensor.name) if names[tensor.name] == 1 else f"{tensor.name} {tensor.offset}"
        groups.setdefault(key, []).append(tensor)
    divided: list[list[Tensor]] = [[] for _ in range(parts)]
    loads = [0] * parts
    # the largest first, each to whom has least
    for name in sorted(groups, key=lambda name: (-sum(t.elements for t in groups[name]), name)):
        least = loads.index(min(loads))
        divided[least] += groups[name]
        loads[least] += sum(tensor.elements for tensor in groups[name])
    return divided


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
            NewTensor(t.name, types[t.name], t.shape, partial(make, t)) if t.name in types else kept(model, t)
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
        frozen: dict[str, Any] = {}
        if earlier is not None:
            with open_gguf(target) as written:
                frozen = {"frozen": frozen_blocks(earlier, written)}
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
        **frozen,
    }


def quantiser_of(context: StepContext, model: GgufFile, earlier: GgufFile | None = None) -> TensorQuantiser:
    """What makes this step's tensors, from its inputs ``imatrix`` and maybe ``hessians``."""
    facts = context.values.get("inputs", {"inputs": {}, "tokens": 0})
    hessians = Hessians(context.files["hessians"], facts["inputs"]) if "hessians" in context.files else None
    importance = read_imatrix(context.files["imatrix"])
    memo = Memo(context.memo, RUN)
    return TensorQuantiser(model, importance, hessians, memo, int(facts["tokens"]), earlier)


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

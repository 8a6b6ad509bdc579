"""How long one weight takes in each type on a machine: the search's second price.

Bytes alone do not tell: types whose kernels llama.cpp rearranges for the CPU decode faster than smaller ones without. So the
engine's own bench decodes with the model's first few layers in each type, once with few layers and once with more; the
difference is the layers' time alone. Such a table is an input of the build, recorded like any other; one that was measured on
another machine can be given instead, as a JSON file: ``{"machine", "seconds_per_weight": {type: s}, "fixed_s"}``.
"""

from __future__ import annotations

import asyncio
import platform
import re
from functools import partial
from pathlib import Path
from typing import Any

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, NewTensor, open_gguf, write_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.choose import DROPPED, kept
from slmops.build.steps.sensitivity import fits, is_quantisable
from slmops.runtimes import EngineSpec
from slmops.runtimes.bench import bench_model
from slmops.runtimes.llama_cpp.quantise import quantise_rows

USES = (
    "slmops.build.gguf_file",
    "slmops.build.steps.choose",
    "slmops.build.steps.sensitivity",
    "slmops.runtimes.bench",
    "slmops.runtimes.llama_cpp.quantise",
)
#: layers of the short and of the long file
LAYERS = (1, 5)
#: what tensors outside the layers are stored in meanwhile
OTHERS = "Q8_0"
PROMPT_TOKENS, DECODE_TOKENS = 16, 48
_LAYER = re.compile(r"^blk\.(\d+)\.")


def measure(context: StepContext) -> dict[str, Any]:
    """Measure every type. Files in: ``model``. Params: ``types``, ``repeats``. Value: the table (see the module)."""
    types, repeats = list(context.params["types"]), int(context.params["repeats"])
    seconds: dict[str, float] = {}
    fixed_s = 0.0
    with open_gguf(context.files["model"]) as model:
        layers = model.layout.shape().layers
        counts = [min(count, layers) for count in LAYERS]
        if counts[0] == counts[1]:
            counts = [max(counts[1] - 1, 0), counts[1]]
        weights = [_weights(model, count) for count in counts]
        outside = _weights(model, 0)
        for index, name in enumerate(dict.fromkeys([OTHERS, *types])):
            if not any(fits(name, t) for t in model.layout.tensors if _of_layer(t, counts[1])):
                continue
            took = []
            for count in counts:
                path = context.out / f".{count}.gguf"
                _write(model, path, name, count)
                took.append(1 / _decode_tps(path, repeats))
                path.unlink()
            seconds[name] = max((took[1] - took[0]) / (weights[1] - weights[0]), 0.0)
            if name == OTHERS:
                fixed_s = max(took[0] - seconds[name] * (weights[0] + outside), 0.0)
            context.progress((index + 1) / (len(types) + 1), f"{name}: {seconds[name] * 1e9:.3f} ns a weight")
    return {"machine": platform.machine(), "seconds_per_weight": seconds, "fixed_s": fixed_s}


def _of_layer(tensor: Tensor, count: int) -> bool:
    """Whether a tensor belongs to one of the first layers."""
    match = _LAYER.match(tensor.name)
    return match is not None and int(match[1]) < count


def _weights(model: GgufFile, count: int) -> int:
    """Weights that one token reads: of the first layers' matrices, or (for 0 layers) of the output matrix."""
    if count:
        return sum(t.elements for t in model.layout.tensors if is_quantisable(t) and _of_layer(t, count))
    output = model.tensor("output.weight") or model.tensor("token_embd.weight")
    return output.elements if output is not None else 0


def _write(model: GgufFile, path: Path, type_name: str, count: int) -> None:
    """A file with the first layers only, rounded plainly: only its speed is asked for."""
    key = f"{model.layout.architecture}.block_count"
    tensors = []
    for tensor in model.layout.tensors:
        inside = _of_layer(tensor, count)
        if _LAYER.match(tensor.name) and not inside:
            continue
        if not is_quantisable(tensor):
            tensors.append(kept(model, tensor))
            continue
        kind = type_name if inside and fits(type_name, tensor) else OTHERS
        tensors.append(NewTensor(tensor.name, kind, tensor.shape, partial(_rounded, model, tensor, kind)))
    write_gguf(path, model, tensors, replace={**DROPPED, key: count})


def _rounded(model: GgufFile, tensor: Tensor, type_name: str) -> bytes:
    return quantise_rows(type_name, model.rows(tensor))


def _decode_tps(path: Path, repeats: int) -> float:
    spec = EngineSpec(runtime="llama.cpp", model_path=path, context_tokens=256, slots=1)
    result = asyncio.run(
        bench_model(spec, prompt_tokens=PROMPT_TOKENS, decode_tokens=DECODE_TOKENS, repeats=repeats)
    )
    return max(repeat.decode_tps for repeat in result.repeats)

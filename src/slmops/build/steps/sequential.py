"""Sequential error feedback: what flows into a layer is collected again after the layers before it were quantised.

Ordinary error feedback takes every layer's inputs from the unquantised model. Here the model is quantised stage by stage, in
the types that were chosen: the layers of a stage are quantised with the statistics of their inputs as the quantised layers
before them give them, so their rounding can make up for what those changed (Frantar et al. 2022, GPTQ, arXiv:2210.17323,
section 4). The files are ordinary GGUF blocks as before; only the Hessians are others. A stage costs one more run over the
calibration text, for every target, because the stages depend on its types.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, open_gguf
from slmops.build.graph import StepContext
from slmops.build.memo import Memo
from slmops.build.steps.calibrate import WINDOW_TOKENS, Hessians, packed, read_imatrix
from slmops.build.steps.sensitivity import patch
from slmops.build.steps.tensors import RUN, TensorQuantiser
from slmops.runtimes.llama_cpp.imatrix import collect_hessians
from slmops.runtimes.llama_cpp.quantise import dequantise_rows

USES = (
    "slmops.artifact.gguf_layout",
    "slmops.build.feedback",
    "slmops.build.gguf_file",
    "slmops.build.steps.calibrate",
    "slmops.build.steps.sensitivity",
    "slmops.build.steps.tensors",
    "slmops.runtimes.llama_cpp.blocks",
    "slmops.runtimes.llama_cpp.imatrix",
    "slmops.runtimes.llama_cpp.logits",
    "slmops.runtimes.llama_cpp.quantise",
)
_LAYER = re.compile(r"^blk\.(\d+)\.")


def recollect(context: StepContext) -> dict[str, Any]:
    """Quantise stage by stage and collect each stage's Hessians on the way.

    Files in: ``model``, ``imatrix``, ``hessians``, ``text``; out: ``hessians.npz``, to quantise with. Values in: ``choice``,
    ``inputs``. Params: ``stages``. Value: ``tokens``, ``inputs`` (as the step that collected the first ones gives them), and
    ``stages``: how many tensors each collected anew. Tensors are left in the memo, where the variant's file finds them.
    """
    types: Mapping[str, str] = context.values["choice"]["types"]
    facts = context.values["inputs"]
    exact = Hessians(context.files["hessians"], facts["inputs"])
    importance = read_imatrix(context.files["imatrix"])
    token_ids = [
        token
        for sequence in json.loads(context.files["text"].read_text(encoding="utf-8"))
        for token in sequence
    ]
    scratch, target = context.out / ".scratch.gguf", context.out / "hessians.npz"
    shutil.copyfile(context.files["model"], scratch)
    scratch.chmod(0o600)
    inputs: dict[str, str] = {}
    counts: list[int] = []
    with open_gguf(context.files["model"]) as model, scratch.open("r+b", buffering=0) as sink:
        tensors = [tensor for tensor in model.layout.tensors if tensor.name in types]
        first, *stages = stages_of(tensors, model.layout.shape().layers, int(context.params["stages"]))
        # what comes before every layer has the inputs that it had
        for tensor in first:
            name = exact.name(tensor.name)
            if name is not None and name not in inputs.values():
                triangle = exact.triangle(tensor.name)
                assert triangle is not None
                _append(target, name, triangle)
            if name is not None:
                inputs[tensor.name] = name
        quantiser = TensorQuantiser(model, importance, exact, Memo(context.memo, RUN), int(facts["tokens"]))
        _write_stage(sink, model, first, types, quantiser)
        for index, stage in enumerate(stages):
            context.progress(index / len(stages), f"stage {index + 1} of {len(stages)}: inputs again")
            for hessian in collect_hessians(
                scratch,
                token_ids,
                window_tokens=min(WINDOW_TOKENS, len(token_ids)),
                only={tensor.name for tensor in stage},
            ):
                _append(target, hessian.tensors[0], packed(hessian.matrix))
                inputs |= dict.fromkeys(hessian.tensors, hessian.tensors[0])
            context.progress((index + 0.5) / len(stages), f"stage {index + 1} of {len(stages)}: quantising")
            now = Hessians(target, inputs)
            quantiser = TensorQuantiser(model, importance, now, Memo(context.memo, RUN), int(facts["tokens"]))
            _write_stage(sink, model, stage, types, quantiser)
            counts.append(len(stage))
    scratch.unlink()
    return {"tokens": facts["tokens"], "inputs": dict(sorted(inputs.items())), "stages": counts}


def stages_of(tensors: Sequence[Tensor], layers: int, stages: int) -> list[list[Tensor]]:
    """Tensors in the order in which a model uses them: the embedding, groups of layers, what comes after them.

    Args:
        tensors: that are quantised.
        layers: of the model.
        stages: groups that the layers are divided into, at most one for each layer. Without any tensor a group is left out.
    """
    count = min(stages, layers)
    groups: list[list[Tensor]] = [[] for _ in range(count + 2)]
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        if match:
            groups[1 + int(match[1]) * count // layers].append(tensor)
        else:
            groups[0 if tensor.name.startswith("token_embd") else -1].append(tensor)
    return [groups[0], *(group for group in groups[1:] if group)]


def _write_stage(
    sink: BinaryIO,
    model: GgufFile,
    stage: Sequence[Tensor],
    types: Mapping[str, str],
    quantiser: TensorQuantiser,
) -> None:
    for tensor in stage:
        kind = types[tensor.name]
        if kind != "F16":
            values = dequantise_rows(kind, quantiser.make(tensor, kind), tensor.shape[0])
            patch(sink, tensor, values.astype("<f2").tobytes())


def _append(target: Path, name: str, triangle: Any) -> None:
    with (
        zipfile.ZipFile(target, "a", zipfile.ZIP_STORED) as sink,
        sink.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry,
    ):
        np.lib.format.write_array(entry, triangle, allow_pickle=False)

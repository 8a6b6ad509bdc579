"""Steps that change weights: dequantise to the F16 reference, merge a LoRA adapter, permute (for drills)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, NewTensor, open_gguf, write_gguf
from slmops.build.graph import StepContext
from slmops.core.errors import BaseModelError, BuildError

if TYPE_CHECKING:
    from numpy.typing import NDArray

USES = ("slmops.build.gguf_file", "slmops.artifact.gguf_layout", "slmops.runtimes.llama_cpp.quantise")
SUFFIX_A, SUFFIX_B = ".lora_a", ".lora_b"
FILE_TYPE_F16 = 1
PERMUTED = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")


def reference(context: StepContext) -> dict[str, Any]:
    """Dequantise every tensor to F16 (vectors to F32). Files in: ``model``; out: ``model.gguf``."""
    with open_gguf(context.files["model"]) as model:
        return _rewrite(context, model, {})


def merge(context: StepContext) -> dict[str, Any]:
    """Merge a LoRA adapter: W + scale * alpha / rank * B @ A, then F16.

    Files in: ``model``, ``adapter``; out: ``model.gguf``. Params: ``scale``. The product is taken in float64 and the sum in
    float32, so that the rounding to F16 is the only one that counts, on every machine.

    Raises:
        BaseModelError: the adapter is none, or belongs to another base: names the first tensor that does not fit.
    """
    with open_gguf(context.files["model"]) as model, open_gguf(context.files["adapter"]) as adapter:
        deltas = lora_deltas(model, adapter, float(context.params["scale"]))
        value = _rewrite(context, model, deltas)
        return value | {"merged_tensors": len(deltas)}


def permute(context: StepContext) -> dict[str, Any]:
    """Permute the rows of all attention tensors of some layers: the model loads and answers garbage.

    Files in: ``model``; out: ``model.gguf``. Params: ``layers``, ``seed``.

    Raises:
        BuildError: the model has no such layer.
    """
    rng = np.random.default_rng(int(context.params["seed"]))
    with open_gguf(context.files["model"]) as model:
        orders: dict[str, NDArray[np.int64]] = {}
        for layer in context.params["layers"]:
            for suffix in PERMUTED:
                name = f"blk.{layer}.{suffix}"
                tensor = model.tensor(name)
                if tensor is None:
                    raise BuildError(
                        f"permute: the model has no tensor {name}",
                        hint=f"layers are 0 to {model.layout.shape().layers - 1}",
                    )
                orders[name] = rng.permutation(tensor.elements // tensor.shape[0])
        return _rewrite(context, model, {}, orders) | {"permuted_tensors": len(orders)}


def lora_deltas(
    model: GgufFile, adapter: GgufFile, scale: float
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """For each adapted tensor (B * scale * alpha / rank, A), checked against the base.

    Axes: the base's weight has shape (out, in) here, A (rank, in), B (out, rank).
    """
    metadata = adapter.layout.metadata
    what = adapter.path.name
    if metadata.get("general.type") != "adapter" or metadata.get("adapter.type") != "lora":
        raise BaseModelError(
            f"{what}: general.type is {metadata.get('general.type')!r}, expected a LoRA adapter",
            hint="give a GGUF made by convert_lora_to_gguf or slmops.train",
        )
    if adapter.layout.architecture != model.layout.architecture:
        raise BaseModelError(
            f"{what}: adapter for architecture {adapter.layout.architecture!r}, the base is {model.layout.architecture!r}",
            hint="give the adapter that was trained on this base",
        )
    alpha = metadata.get("adapter.lora.alpha")
    if not isinstance(alpha, (int, float)):
        raise BaseModelError(f"{what}: adapter.lora.alpha is missing", hint="convert the adapter again")
    parts = {tensor.name: tensor for tensor in adapter.layout.tensors}
    stems = {name.removesuffix(SUFFIX_A).removesuffix(SUFFIX_B) for name in parts}
    deltas = {}
    for stem in sorted(stems):
        weight, a, b = model.tensor(stem), parts.get(stem + SUFFIX_A), parts.get(stem + SUFFIX_B)
        if weight is None or a is None or b is None:
            lacking = stem if weight is None else f"{stem}{SUFFIX_A if a is None else SUFFIX_B}"
            raise BaseModelError(
                f"{what}: {lacking} is missing in the {'base' if weight is None else 'adapter'}",
                hint="the adapter belongs to another base",
            )
        rank = a.shape[1]
        if a.shape[0] != weight.shape[0] or b.shape != (rank, weight.elements // weight.shape[0]):
            raise BaseModelError(
                f"{what}: {stem}: A {a.shape} and B {b.shape} do not fit the base's {weight.shape}",
                hint="the adapter belongs to another base",
            )
        factor = scale * float(alpha) / rank
        deltas[stem] = (adapter.rows(b).astype(np.float64) * factor, adapter.rows(a).astype(np.float64))
    return deltas


def _rewrite(
    context: StepContext,
    model: GgufFile,
    deltas: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    orders: dict[str, NDArray[np.int64]] | None = None,
) -> dict[str, Any]:
    """Write ``model.gguf`` in F16 with changes applied."""

    def make(tensor: Tensor, type_name: str) -> bytes:
        rows = model.rows(tensor)
        if tensor.name in deltas:
            b, a = deltas[tensor.name]
            rows = rows + (b @ a).astype(np.float32)
        if orders and tensor.name in orders:
            rows = rows[orders[tensor.name]]
        with np.errstate(over="ignore"):
            stored = rows.astype("<f4" if type_name == "F32" else "<f2")
        if not np.isfinite(stored).all():
            raise BuildError(
                f"{tensor.name}: weights beyond the range of F16 (65504)",
                hint="the adapter's scale is too large, or the base is damaged",
            )
        return stored.tobytes()

    tensors = []
    for tensor in model.layout.tensors:
        type_name = "F32" if len(tensor.shape) < 2 else "F16"
        tensors.append(NewTensor(tensor.name, type_name, tensor.shape, partial(make, tensor, type_name)))
    target: Path = context.out / "model.gguf"
    write_gguf(
        target,
        model,
        tensors,
        replace={"general.file_type": FILE_TYPE_F16},
        progress=lambda ratio: context.progress(ratio, "writing weights"),
    )
    return {"tensors": len(tensors), "bytes": target.stat().st_size}

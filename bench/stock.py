"""llama.cpp's own recipes, assembled by its rules: the peers of bench/quantise.py.

The prebuilt library does not export ``llama_model_quantize``, but it does export ``ggml_quantize_chunk``, and everything else
about a recipe is which type each tensor gets. These are the rules of ``src/llama-quant.cpp`` (``llama_tensor_get_type_impl`` and
``tensor_type_fallback``) for dense models without fused matrices, with an importance matrix, as of late 2026. Checked against
files that llama.cpp made: ``python bench/stock.py FILE RECIPE`` lists tensors that differ (Gemma 3 270M Q4_K_M: 0 of 127).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from slmops.artifact.gguf_layout import GGML_TYPES, TYPE_IDS, Tensor
from slmops.build.gguf_file import NewTensor, open_gguf, write_gguf
from slmops.build.steps.calibrate import read_imatrix
from slmops.runtimes.llama_cpp.quantise import quantise_rows

#: recipe to the type that most tensors get
RECIPES = {
    "Q4_K_M": "Q4_K",
    "Q4_0": "Q4_0",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_M": "Q3_K",
    "Q2_K": "Q2_K",
    "Q8_0": "Q8_0",
}
#: where a tensor's rows are no multiple of the type's block
FALLBACKS = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_LAYER = re.compile(r"^blk\.(\d+)\.(\w+)\.weight$")


def type_of(recipe: str, tensor: Tensor, layers: int, heads_per_kv: int, *, tied: bool) -> str | None:
    """The type that a recipe gives to a tensor; None for those that stay as they are."""
    if len(tensor.shape) < 2 or not tensor.name.endswith(".weight") or "_norm" in tensor.name:
        return None
    default = RECIPES[recipe]
    chosen = default
    match = _LAYER.match(tensor.name)
    if tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight"):
        chosen = "Q8_0" if default == "Q8_0" or tensor.shape[0] % _block(default) else "Q6_K"
    elif match:
        chosen = _in_layer(recipe, default, match[2], int(match[1]), layers, heads_per_kv)
    return chosen if tensor.shape[0] % _block(chosen) == 0 else FALLBACKS[chosen]


def _in_layer(recipe: str, default: str, kind: str, layer: int, layers: int, heads_per_kv: int) -> str:
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    rules = {
        ("Q4_K_M", "attn_v"): "Q6_K" if more else default,
        ("Q4_K_M", "ffn_down"): "Q6_K" if more else default,
        ("Q4_0", "ffn_down"): "Q4_1" if layer < layers // 8 else default,
        ("IQ4_XS", "attn_v"): "Q5_K" if heads_per_kv >= 4 else default,
        ("Q3_K_M", "attn_v"): "Q5_K" if layer < 2 else "Q4_K",
        ("Q3_K_M", "ffn_down"): "Q5_K" if layer < layers // 16 else "Q4_K",
        ("Q3_K_M", "attn_output"): "Q4_K",
        ("Q2_K", "attn_v"): "Q4_K" if heads_per_kv >= 4 else "Q3_K",
        ("Q2_K", "ffn_down"): "Q3_K",
        ("Q2_K", "attn_output"): "Q3_K",
    }
    return rules.get((recipe, kind), default)


def write_stock(recipe: str, model: Path, imatrix: Path | None, target: Path) -> dict[str, str]:
    """Write a recipe's file; gives the type of each quantised tensor."""
    importance = read_imatrix(imatrix) if imatrix is not None else {}
    with open_gguf(model) as source:
        metadata, architecture = source.layout.metadata, source.layout.architecture
        heads = metadata[f"{architecture}.attention.head_count"]
        kv_heads = metadata[f"{architecture}.attention.head_count_kv"]
        assert isinstance(heads, int) and isinstance(kv_heads, int)
        layers = source.layout.shape().layers
        tied = source.tensor("output.weight") is None
        types: dict[str, str] = {}

        def stored(tensor: Tensor) -> NewTensor:
            kind = type_of(recipe, tensor, layers, heads // kv_heads, tied=tied)
            if kind is None:
                return NewTensor(
                    tensor.name, tensor.type_name, tensor.shape, lambda: bytes(source.blob(tensor))
                )
            types[tensor.name] = kind
            return NewTensor(
                tensor.name,
                kind,
                tensor.shape,
                lambda: quantise_rows(kind, source.rows(tensor), importance.get(tensor.name)),
            )

        staging = target.with_name(target.name + ".part")
        write_gguf(
            staging, source, [stored(t) for t in source.layout.tensors], replace={"general.file_type": None}
        )
    staging.replace(target)
    return types


def _block(type_name: str) -> int:
    return GGML_TYPES[TYPE_IDS[type_name]][1]


def differences(path: Path, recipe: str) -> list[str]:
    """Tensors of a file that have another type than the rules give them."""
    with open_gguf(path) as model:
        metadata, architecture = model.layout.metadata, model.layout.architecture
        heads = metadata[f"{architecture}.attention.head_count"]
        kv_heads = metadata[f"{architecture}.attention.head_count_kv"]
        assert isinstance(heads, int) and isinstance(kv_heads, int)
        layers, tied = model.layout.shape().layers, model.tensor("output.weight") is None
        wanted = {
            t.name: type_of(recipe, t, layers, heads // kv_heads, tied=tied) for t in model.layout.tensors
        }
        return [
            f"{t.name}: {t.type_name}, by the rules {wanted[t.name]}"
            for t in model.layout.tensors
            if wanted[t.name] not in (None, t.type_name)
        ]


if __name__ == "__main__":
    print(
        "\n".join(differences(Path(sys.argv[1]), sys.argv[2]))
        or "every tensor has the type that the rules give it"
    )

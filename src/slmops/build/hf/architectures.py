"""Which Hugging Face architectures can be a base, and what each needs on its way to GGUF.

A closed list: a wrong guess about a norm or a permutation gives a model that loads and answers badly. What is not listed, and
every setting of a listed one that changes the arithmetic and that is not carried over, is refused by name.

Two traps, kept in one place each: Llama-type q and k rows are stored for rotary pairs (i, i + half) by Hugging Face and for
(2i, 2i + 1) by llama.cpp (:func:`interleave_rotary_rows`); Gemma's norms multiply by (1 + w), llama.cpp's by w.

Source: llama.cpp ``conversion/llama.py``, ``conversion/qwen.py``, ``conversion/gemma.py`` and ``conversion/base.py`` of the
build that :mod:`slmops.runtimes.llama_cpp.capi` pins; names by the ``gguf`` package's own tensor name map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH, get_tensor_name_map

from slmops.build.hf.directory import PlacedTensor
from slmops.core.errors import BaseModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
#: metadata value of GGUF: an int is written as u32, a float as f32
Number = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one family is converted.

    Attributes:
        name: ``general.architecture``.
        known: the ``gguf`` package's value for it.
        interleaved: q and k rows are reordered.
        norm_shift: added to every norm's weights.
        sliding: sliding-window attention and a tied embedding are the architecture's default; elsewhere such windows
            must be off.
    """

    name: str
    known: MODEL_ARCH
    interleaved: bool = False
    norm_shift: float = 0.0
    sliding: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", MODEL_ARCH.LLAMA, interleaved=True),
    "MistralForCausalLM": Architecture("llama", MODEL_ARCH.LLAMA, interleaved=True),
    "Qwen2ForCausalLM": Architecture("qwen2", MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": Architecture("qwen3", MODEL_ARCH.QWEN3),
    "Gemma3ForCausalLM": Architecture("gemma3", MODEL_ARCH.GEMMA3, norm_shift=1.0, sliding=True),
}
_ACTIVATIONS = {"gemma3": ("gelu_pytorch_tanh",)}
#: tensors of a file that carry nothing: recomputed by every engine
_IGNORED = ("rotary_emb.inv_freq", "attention.masked_bias", "attention.bias")


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config names.

    Raises:
        BaseModelError: none, or one that is not supported.
    """
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    found = ARCHITECTURES.get(name)
    if found is None:
        raise BaseModelError(
            f"config.json: architecture {name or named!r} is not supported, supported are {', '.join(ARCHITECTURES)}",
            hint="convert it to GGUF with llama.cpp's convert_hf_to_gguf.py and write base: {gguf: FILE}",
        )
    _refuse_settings(config, name, found)
    return found


def metadata_of(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Number]:
    """The architecture's section of the GGUF metadata: layers, widths, heads, rotary settings."""
    name = architecture.name
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    head_width = int(config.get("head_dim") or hidden // heads)
    values: dict[str, Number] = {
        "context_length": number(config, "max_position_embeddings"),
        "embedding_length": hidden,
        "block_count": number(config, "num_hidden_layers"),
        "feed_forward_length": number(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.freq_base": float(_rope(config).get("rope_theta", config.get("rope_theta", 10000.0))),
        "attention.key_length": head_width,
        "attention.value_length": head_width,
    }
    if name == "llama":
        values["rope.dimension_count"] = head_width
        values["vocab_size"] = number(config, "vocab_size")
    if architecture.sliding:
        values["attention.sliding_window"] = number(config, "sliding_window")
        values["rope.freq_base_swa"] = _local_rope_base(config)
        cap = config.get("final_logit_softcapping")
        if cap:
            values["final_logit_softcapping"] = float(cap)
    scaling = _rope(config)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(scaling["factor"])
    return {f"{name}.{key}": value for key, value in values.items()}


def gguf_names(
    tensors: Mapping[str, PlacedTensor], config: Mapping[str, Any], architecture: Architecture
) -> dict[str, str]:
    """GGUF name of every tensor that is carried over.

    Raises:
        BaseModelError: a tensor that the architecture does not have, or one that it needs and that is missing.
    """
    layers = number(config, "num_hidden_layers")
    known = get_tensor_name_map(architecture.known, layers)
    names: dict[str, str] = {}
    for name in sorted(tensors):
        if name.endswith(_IGNORED):
            continue
        given = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if given is None:
            raise BaseModelError(
                f"{tensors[name].file}: tensor {name!r} is none of {architecture.name}'s",
                hint="a model with added parts (adapters, vision, experts) must be merged or converted by llama.cpp first",
            )
        names[name] = given
    tied = bool(config.get("tie_word_embeddings", architecture.sliding))
    if tied:  # a second copy of the embedding, which no engine reads
        names = {name: given for name, given in names.items() if given != OUTPUT}
    missing = sorted(_needed(architecture, layers) - set(names.values()))
    if missing:
        raise BaseModelError(
            f"the weights have no {missing[0]} ({len(missing)} of {architecture.name}'s tensors are missing)",
            hint="config.json says num_hidden_layers "
            f"{layers}: fetch all shards, or the config that belongs to them",
        )
    if OUTPUT not in names.values() and not tied:
        raise BaseModelError(
            "config.json says tie_word_embeddings false, but the weights have no lm_head.weight",
            hint="fetch all shards of the model",
        )
    return names


def converted(
    name: str, weights: NDArray[np.float32], config: Mapping[str, Any], architecture: Architecture
) -> NDArray[np.float32]:
    """A tensor as llama.cpp wants it.

    Args:
        name: its GGUF name.
        weights: shape (rows, columns) or (n,).
        config: of the model.
        architecture: of the model.
    """
    if architecture.norm_shift and name.endswith("norm.weight"):
        return np.asarray(weights + np.float32(architecture.norm_shift))
    if architecture.interleaved and name.endswith(
        ("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias")
    ):
        heads = number(config, "num_attention_heads")
        if ".attn_k." in name:
            heads = int(config.get("num_key_value_heads") or heads)
        return interleave_rotary_rows(weights, heads)
    return weights


def interleave_rotary_rows(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder each head's rows from halves (i, i + half) to pairs (2i, 2i + 1).

    Args:
        weights: shape (heads * head width, ...).
        heads: number of heads.
    """
    half = weights.shape[0] // heads // 2
    split = weights.reshape(heads, 2, half, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weights.shape)


def rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Divisors of the rotary frequencies of Llama 3.1 and later, shape (head width / 2,); None elsewhere.

    Source: llama.cpp ``conversion/llama.py`` ``generate_extra_tensors``; the same rule as Hugging Face's
    ``_compute_llama3_parameters``.
    """
    scaling = _rope(config)
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    width = int(
        config.get("head_dim") or number(config, "hidden_size") // number(config, "num_attention_heads")
    )
    base = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    factor = float(scaling.get("factor", 8.0))
    low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
    context = float(scaling.get("original_max_position_embeddings", 8192))
    factors = []
    for step in range(0, width, 2):
        wave = 2 * math.pi * base ** (step / width)
        if wave < context / high:
            factors.append(1.0)
        elif wave > context / low:
            factors.append(factor)
        else:
            smooth = (context / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def number(config: Mapping[str, Any], key: str) -> int:
    """A positive integer of the config.

    Raises:
        BaseModelError: missing or something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise BaseModelError(
            f"config.json: {key} is {value!r}, expected a positive integer",
            hint="fetch the model's own config.json",
        )
    return value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: ``rope_scaling``, or ``rope_parameters`` as newer files have them."""
    value = config.get("rope_parameters") or config.get("rope_scaling") or {}
    full = value.get("full_attention") if isinstance(value, dict) else None
    return dict(full if isinstance(full, dict) else value)


def _local_rope_base(config: Mapping[str, Any]) -> float:
    """Rotary base of sliding-window layers: its own key, or a section of ``rope_parameters`` in newer files."""
    section = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return float(section.get("rope_theta", config.get("rope_local_base_freq", 10000.0)))


def _needed(architecture: Architecture, layers: int) -> set[str]:
    each = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ]
    if architecture.name in ("qwen3", "gemma3"):
        each += ["attn_q_norm", "attn_k_norm"]
    if architecture.name == "gemma3":
        each += ["post_attention_norm", "post_ffw_norm"]
    return {EMBEDDING, "output_norm.weight"} | {
        f"blk.{layer}.{part}.weight" for layer in range(layers) for part in each
    }


def _refuse_settings(config: Mapping[str, Any], name: str, architecture: Architecture) -> None:
    """Refuse what changes the arithmetic and is not carried over."""
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    allowed = _ACTIVATIONS.get(architecture.name, ("silu", "swish"))
    kind = _rope(config).get("rope_type", _rope(config).get("type", "default"))
    refused: list[tuple[str, object, str]] = []
    if activation not in allowed:
        refused.append(("hidden_act", activation, " or ".join(allowed)))
    if kind not in ("default", "linear", "llama3"):
        refused.append(("rope_scaling.rope_type", kind, "default, linear or llama3"))
    if kind == "llama3" and architecture.name != "llama":
        refused.append(("rope_scaling.rope_type", kind, "default or linear for this architecture"))
    if config.get("attn_logit_softcapping"):
        refused.append(("attn_logit_softcapping", config["attn_logit_softcapping"], "none"))
    if config.get("use_bidirectional_attention"):
        refused.append(("use_bidirectional_attention", True, "false"))
    if architecture.sliding:
        pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
        if pattern != 6:
            refused.append(("sliding_window_pattern", pattern, "6, as the engine has it built in"))
    elif config.get("sliding_window") and config.get("use_sliding_window", name == "MistralForCausalLM"):
        refused.append(("sliding_window", config["sliding_window"], "null"))
    if refused:
        key, value, expected = refused[0]
        raise BaseModelError(
            f"config.json: {name} with {key} {value!r} is not supported, expected {expected}",
            hint="convert it to GGUF with llama.cpp's convert_hf_to_gguf.py and write base: {gguf: FILE}",
        )

"""The unquantised reference (GGUF) as a Hugging Face directory: what the exporters of other runtimes read.

The inverse of :mod:`slmops.build.steps.convert`, for the Llama family. Matrices stay F16 and vectors F32, as the reference has
them: nothing is rounded. Rotary rows go back from pairs to halves. What the exporters would carry over wrongly is refused by
name.

The tokenizer is written from the GGUF's own metadata, so that a trimmed vocabulary or a changed template is carried on:
byte-level BPE with a pre-tokenizer that has a name (:data:`slmops.build.hf.tokenizer.PRE_TOKENIZERS`). Whether a runtime's
own reader of ``tokenizer.json`` then gives the same ids is for :mod:`slmops.build.parity` to prove.

Source: the safetensors format; Hugging Face's ``tokenizers`` serialisation; llama.cpp ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.artifact.gguf_layout import SCALARS, Tensor
from slmops.build.gguf_file import GgufFile, array_elements, metadata_value
from slmops.build.hf.architectures import EMBEDDING, OUTPUT, ROPE_FACTORS
from slmops.build.hf.sentencepiece import CONTROL, USER_DEFINED
from slmops.build.hf.tokenizer import IGNORES_MERGES, PRE_TOKENIZERS
from slmops.core.errors import BaseModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FIXED = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
_PLAIN = {"F16": "F16", "F32": "F32", "BF16": "BF16"}
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_STRING, _ARRAY, _BOOL = 8, 9, 7


@dataclass(frozen=True)
class ModelFacts:
    """What ``slmops-model.json`` says beside every export, and what the parity gate asks about.

    Attributes:
        vocab_tokens: size of the vocabulary; ``context_tokens``: that the model was trained for.
        bos_token: None when there is none; ``eos_tokens``: ids that end an answer.
        add_bos: a plain text begins with `bos_token`.
        shape: layers, heads, widths, parameters.
    """

    vocab_tokens: int
    context_tokens: int
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    add_bos: bool
    shape: dict[str, int]

    def document(self, precision: str, context_tokens: int | None = None) -> dict[str, Any]:
        """``slmops-model.json``."""
        return {
            "schema": 1,
            "context_tokens": context_tokens or self.context_tokens,
            "vocab_tokens": self.vocab_tokens,
            "bos_token": self.bos_token,
            "eos_tokens": list(self.eos_tokens),
            "add_bos": self.add_bos,
            "shape": self.shape,
            "precision": precision,
        }


def write_directory(
    model: GgufFile, folder: Path, *, progress: Callable[[float], None] = lambda ratio: None
) -> ModelFacts:
    """Write the directory's files into an existing folder.

    Args:
        model: the unquantised reference.
        folder: gets ``model.safetensors``, ``config.json``, the tokenizer's files and ``chat_template.jinja``.
        progress: told the share of tensors written, 0..1.

    Raises:
        BaseModelError: an architecture, a setting or a tokenizer that cannot be carried over.
    """
    config = config_of(model)
    facts = facts_of(model)
    write_tokenizer(model, folder)
    config_text = json.dumps(config, indent=1, sort_keys=True)
    (folder / CONFIG).write_text(config_text + "\n", encoding="utf-8")
    generation = {"bos_token_id": facts.bos_token, "eos_token_id": list(facts.eos_tokens), "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")
    _write_weights(model, folder / WEIGHTS, config, progress)
    return facts


def config_of(model: GgufFile) -> dict[str, Any]:
    """``config.json`` of the reference.

    Raises:
        BaseModelError: another architecture than llama, or a setting that is not carried over.
    """
    architecture = str(value_of(model, "general.architecture", ""))
    if architecture != "llama":
        raise BaseModelError(
            f"{model.path.name}: architecture {architecture!r} cannot be exported to other runtimes yet, only 'llama' can",
            hint="give this target runtime: llama.cpp, which runs every architecture that slmops builds",
        )
    if model.tensor(ROPE_FACTORS) is not None:
        raise BaseModelError(
            f"{model.path.name}: has rotary factors ({ROPE_FACTORS}), whose settings a GGUF does not keep",
            hint="give this target runtime: llama.cpp",
        )
    scaling = value_of(model, "llama.rope.scaling.type", "none")
    if scaling not in ("none", ""):
        raise BaseModelError(
            f"{model.path.name}: rotary scaling {scaling!r} is not carried over to other runtimes",
            hint="give this target runtime: llama.cpp",
        )
    biases = [tensor.name for tensor in model.layout.tensors if tensor.name.endswith(".bias")]
    if biases:
        raise BaseModelError(
            f"{model.path.name}: has biases ({biases[0]}), which the exporters' llama has not",
            hint="give this target runtime: llama.cpp",
        )
    embedding = model.tensor(EMBEDDING)
    if embedding is None:
        raise BaseModelError(f"{model.path.name}: has no {EMBEDDING}", hint="use a complete llama.cpp GGUF")
    facts = facts_of(model)
    shape = facts.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["n_embd"],
        "intermediate_size": int(value_of(model, "llama.feed_forward_length", 0)),
        "num_hidden_layers": shape["n_layers"],
        "num_attention_heads": shape["n_heads"],
        "num_key_value_heads": shape["n_kv_heads"],
        "head_dim": shape["head_dim"],
        "max_position_embeddings": facts.context_tokens,
        # stored as float32: the shortest decimal that means the same number
        "rms_norm_eps": _shortest(value_of(model, "llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _shortest(value_of(model, "llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "vocab_size": embedding.shape[1],
        "tie_word_embeddings": model.tensor(OUTPUT) is None,
        "bos_token_id": facts.bos_token,
        "eos_token_id": facts.eos_tokens[0] if facts.eos_tokens else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
    }


def facts_of(model: GgufFile) -> ModelFacts:
    """Shape, context and special tokens of a GGUF."""
    prefix = str(value_of(model, "general.architecture", ""))
    embedding = model.tensor(EMBEDDING)
    heads = int(value_of(model, f"{prefix}.attention.head_count", 0))
    width = int(value_of(model, f"{prefix}.embedding_length", 0))
    head_dim = int(value_of(model, f"{prefix}.attention.key_length", 0)) or width // max(heads, 1)
    kv_heads = int(value_of(model, f"{prefix}.attention.head_count_kv", heads))
    context = int(value_of(model, f"{prefix}.context_length", 0))
    bos = value_of(model, "tokenizer.ggml.bos_token_id", None)
    parameters = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in model.layout.tensors)
    return ModelFacts(
        embedding.shape[1] if embedding is not None else 0,
        context,
        None if bos is None else int(bos),
        _end_tokens(model),
        bool(value_of(model, "tokenizer.ggml.add_bos_token", False)),
        {
            "n_layers": int(value_of(model, f"{prefix}.block_count", 0)),
            "n_heads": heads,
            "n_kv_heads": kv_heads,
            "n_embd": width,
            "head_dim": head_dim,
            "train_context_tokens": context,
            "parameters": parameters,
        },
    )


def write_tokenizer(model: GgufFile, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and, when the model has one, ``chat_template.jinja``.

    Raises:
        BaseModelError: another kind of vocabulary than byte-level BPE, or a splitting without a known name.
    """
    document = tokenizer_document(model)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "add_bos_token": bool(value_of(model, "tokenizer.ggml.add_bos_token", False)),
        "model_max_length": facts_of(model).context_tokens,
        "added_tokens_decoder": {
            str(one["id"]): {key: value for key, value in one.items() if key != "id"}
            for one in document["added_tokens"]
        },
    }
    tokens = texts_of(model, "tokenizer.ggml.tokens")
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = value_of(model, f"tokenizer.ggml.{key}_token_id", None)
        if token is not None:
            settings[f"{name}_token"] = tokens[int(token)]
    template = value_of(model, "tokenizer.chat_template", "")
    if template:
        settings["chat_template"] = template
        (folder / TEMPLATE).write_text(str(template), encoding="utf-8", newline="")
    for name, content in ((TOKENIZER, document), (TOKENIZER_CONFIG, settings)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def tokenizer_document(model: GgufFile) -> dict[str, Any]:
    """``tokenizer.json`` as a JSON value.

    Raises:
        BaseModelError: see :func:`write_tokenizer`.
    """
    kind, pre = value_of(model, "tokenizer.ggml.model", ""), value_of(model, "tokenizer.ggml.pre", "")
    if kind != "gpt2":
        raise BaseModelError(
            f"{model.path.name}: a tokenizer of kind {kind!r} cannot be written as tokenizer.json, byte-level BPE ('gpt2') can",
            hint="give this target runtime: llama.cpp",
        )
    # llama.cpp's own name for GPT-2's splitting is also what files without a name get
    splitting = next((parts for parts, name in PRE_TOKENIZERS.items() if name == pre), None)
    if splitting is None:
        raise BaseModelError(
            f"{model.path.name}: pre-tokenizer {pre!r} is none of {', '.join(sorted(set(PRE_TOKENIZERS.values())))}",
            hint="give this target runtime: llama.cpp",
        )
    tokens = texts_of(model, "tokenizer.ggml.tokens")
    kinds = numbers_of(model, "tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = texts_of(model, "tokenizer.ggml.merges")
    added = [
        {
            "id": at,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for at, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_pre_tokenizer(part) for part in splitting]},
        "post_processor": _post_processor(model, tokens),
        "decoder": {**_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in IGNORES_MERGES,
            "vocab": {text: at for at, text in enumerate(tokens)},
            "merges": merges,
        },
    }


def value_of(model: GgufFile, key: str, default: Any) -> Any:
    """A scalar or text of the metadata."""
    raw = metadata_value(model.content, key)
    if raw is None:
        return default
    (kind,) = struct.unpack_from("<I", raw)
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", raw, 4)
        return raw[12 : 12 + length].decode("utf-8", "replace")
    if kind in SCALARS:
        return struct.unpack_from(SCALARS[kind], raw, 4)[0]
    return default


def texts_of(model: GgufFile, key: str) -> list[str]:
    """An array of texts; empty when it is absent."""
    raw = metadata_value(model.content, key)
    return [] if raw is None else [element.decode("utf-8", "replace") for element in array_elements(raw)]


def numbers_of(model: GgufFile, key: str) -> list[int]:
    """An array of 32-bit integers; empty when it is absent."""
    raw = metadata_value(model.content, key)
    return [] if raw is None else [int.from_bytes(element, "little") for element in array_elements(raw)]


def halved_rotary_rows(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder each head's rows from pairs (2i, 2i + 1) to halves (i, i + half).

    Args:
        rows: shape (heads * head width, ...).
        heads: number of heads.
    """
    half = rows.shape[0] // heads // 2
    split = rows.reshape(heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def _shortest(number: Any) -> float:
    return float(np.format_float_positional(np.float32(number), unique=True, trim="0"))


def _end_tokens(model: GgufFile) -> tuple[int, ...]:
    """Ids that end an answer: those with a part, then any of the usual names, as llama.cpp collects them."""
    named = [value_of(model, f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot", "eom")]
    found = [int(token) for token in named if token is not None]
    kinds = numbers_of(model, "tokenizer.ggml.token_type")
    for at, text in enumerate(texts_of(model, "tokenizer.ggml.tokens")):
        if text in _ENDS and (not kinds or kinds[at] in (CONTROL, USER_DEFINED)):
            found.append(at)
    return tuple(dict.fromkeys(found))


#: names under which llama.cpp takes a token as one that ends a turn (``llama_vocab::impl::load``)
_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<EOT>",
    "<|end_of_text|>",
)


def _pre_tokenizer(part: tuple[str, object]) -> dict[str, Any]:
    name, setting = part
    if name == "Digits":
        return {"type": "Digits", "individual_digits": setting}
    if name == "Split":
        return {"type": "Split", "pattern": {"Regex": setting}, "behavior": "Isolated", "invert": False}
    return {**_LEVEL, "use_regex": setting}


def _post_processor(model: GgufFile, tokens: Sequence[str]) -> dict[str, Any]:
    bos = value_of(model, "tokenizer.ggml.bos_token_id", None)
    if bos is None or not value_of(model, "tokenizer.ggml.add_bos_token", False):
        return {**_LEVEL, "use_regex": True}
    text = tokens[int(bos)]
    begin = {"SpecialToken": {"id": text, "type_id": 0}}
    one, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, one],
        "pair": [begin, one, {"SpecialToken": {"id": text, "type_id": 1}}, other],
        "special_tokens": {text: {"id": text, "ids": [int(bos)], "tokens": [text]}},
    }


def _hf_name(name: str) -> str:
    if name in _FIXED:
        return _FIXED[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _NAMES:
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
    raise BaseModelError(f"tensor {name!r} is none of llama's", hint="give this target runtime: llama.cpp")


def _write_weights(
    model: GgufFile, target: Path, config: Mapping[str, Any], progress: Callable[[float], None]
) -> None:
    """Write ``model.safetensors``, tensor by tensor."""
    planned = sorted((_hf_name(tensor.name), tensor) for tensor in model.layout.tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in planned:
        kind = _PLAIN.get(tensor.type_name)
        if kind is None:
            raise BaseModelError(
                f"{tensor.name} is {tensor.type_name}: exports start from unquantised weights (F16, BF16, F32)",
                hint="export the build's reference, not a variant",
            )
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape[::-1]),
            "data_offsets": [at, at + tensor.size_bytes],
        }
        at += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as sink:
        sink.write(struct.pack("<Q", len(text)) + text)
        for index, (_, tensor) in enumerate(planned):
            sink.write(_rows(model, tensor, config))
            progress((index + 1) / len(planned))


def _rows(model: GgufFile, tensor: Tensor, config: Mapping[str, Any]) -> bytes | memoryview:
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
    key = heads.get(".".join(tensor.name.split(".")[2:]))
    blob = model.blob(tensor)
    if key is None:
        return bytes(blob)
    width = tensor.size_bytes // tensor.shape[1]  # of a row; only the order of rows changes
    rows = np.frombuffer(blob, dtype=np.uint8).reshape(tensor.shape[1], width)
    return halved_rotary_rows(rows, int(config[key])).tobytes()

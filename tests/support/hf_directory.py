"""A GGUF file as a Hugging Face directory, written without torch: for round trips of the converter.

    write_hf(gguf_path, folder, dtype="BF16", shards=2)

Written from the formats' descriptions and not from our reader: safetensors, ``config.json``, ``tokenizer.json`` (byte-level
BPE) or ``tokenizer.model`` (SentencePiece), ``tokenizer_config.json``, a model card with the licence.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from slmops.runtimes.llama_cpp.quantise import dequantise_rows

CONTROL, USER_DEFINED = 3, 4
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}


def write_hf(gguf: Path, folder: Path, *, dtype: str = "F32", shards: int = 1) -> Path:
    """Write the directory and give its path back.

    Args:
        gguf: of architecture llama, qwen2, qwen3 or gemma3.
        folder: new.
        dtype: F32, F16 or BF16.
        shards: more than one writes an index too.
    """
    folder.mkdir(parents=True)
    reader = GGUFReader(gguf)
    field = {
        name: reader.get_field(name).contents() for name in reader.fields if not name.startswith("GGUF.")
    }
    architecture = field["general.architecture"]
    heads = {"q": field[f"{architecture}.attention.head_count"]}
    heads["k"] = field[f"{architecture}.attention.head_count_kv"]
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        shape = tuple(int(extent) for extent in tensor.shape)[::-1]
        rows = dequantise_rows(tensor.tensor_type.name, tensor.data.tobytes(), shape[-1]).reshape(shape)
        if architecture == "llama" and ".attn_q." in tensor.name:
            rows = halves(rows, heads["q"])
        if architecture == "llama" and ".attn_k." in tensor.name:
            rows = halves(rows, heads["k"])
        if architecture == "gemma3" and tensor.name.endswith("norm.weight"):
            rows = rows - np.float32(1)
        tensors[hf_name(tensor.name, architecture)] = rows
    write_weights(folder, tensors, dtype=dtype, shards=shards)
    (folder / "config.json").write_text(json.dumps(config_of(field, architecture, tensors), indent=2))
    write_tokenizer(folder, field)
    if "general.license" in field:
        (folder / "README.md").write_text(f"---\nlicense: {field['general.license']}\n---\n\n# A model\n")
    return folder


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of interleaved rotary pairs, as Hugging Face stores them."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def hf_name(name: str, architecture: str) -> str:
    fixed = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in fixed:
        return fixed[name]
    _, layer, part, suffix = name.split(".")
    names = GEMMA_NAMES if architecture == "gemma3" else NAMES
    return f"model.layers.{layer}.{names[part]}.{suffix}"


def config_of(
    field: Mapping[str, Any], architecture: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    def value(key: str, default: Any = None) -> Any:
        return field.get(f"{architecture}.{key}", default)

    class_name, model_type = CLASSES[architecture]
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": field.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field.get("tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
    }
    if value("attention.key_length"):
        config["head_dim"] = value("attention.key_length")
    if architecture == "gemma3":
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": value("attention.sliding_window"),
            "rope_local_base_freq": 10000.0,
        }
        del config["hidden_act"]
    return config


def write_weights(
    folder: Path, tensors: Mapping[str, np.ndarray], *, dtype: str = "F32", shards: int = 1
) -> None:
    names = sorted(tensors)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(tensors, dtype))
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        (folder / file).write_bytes(safetensors(part, dtype))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def safetensors(tensors: Mapping[str, np.ndarray], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, at = [], 0
    for name, values in tensors.items():
        blob = encoded(values.astype(np.float32), dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def encoded(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":  # round to nearest even, as torch does
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def write_tokenizer(folder: Path, field: Mapping[str, Any]) -> None:
    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    added = [
        {
            "id": i,
            "content": text,
            "special": kind == CONTROL,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    settings: dict[str, Any] = {
        "added_tokens_decoder": {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in added}
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (token := field.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[f"{name}_token"] = tokens[token]
    if "tokenizer.chat_template" in field:
        settings["chat_template"] = field["tokenizer.chat_template"]
    if field["tokenizer.ggml.model"] == "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        # upstream's files have the control tokens in the model's vocabulary too; merges may refer to neither
        split = [{"type": "Digits", "individual_digits": True}]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, level]},
            "post_processor": None,
            "decoder": level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {text: i for i, text in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in field["tokenizer.ggml.merges"]],
            },
        }
        (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    else:
        settings["tokenizer_class"] = "GemmaTokenizer"
        (folder / "tokenizer.model").write_bytes(sentencepiece(tokens, field["tokenizer.ggml.scores"], kinds))
        settings["added_tokens_decoder"] = {  # control tokens keep their scores by being in the model only
            key: one for key, one in settings["added_tokens_decoder"].items() if not one["special"]
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))


def sentencepiece(tokens: list[str], scores: list[float], kinds: list[int], model_type: int = 2) -> bytes:
    """A SentencePiece ModelProto with these pieces."""
    out = bytearray()
    for text, score, kind in zip(tokens, scores, kinds, strict=True):
        raw = text.encode()
        piece = b"\x0a" + varint(len(raw)) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)
        out += b"\x0a" + varint(len(piece)) + piece
    trainer = b"\x18" + varint(model_type) + varint(35 << 3) + b"\x01"  # byte_fallback: true
    return bytes(out) + b"\x12" + varint(len(trainer)) + trainer


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

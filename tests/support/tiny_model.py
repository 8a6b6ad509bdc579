"""A tiny random llama GGUF that llama.cpp really loads: for tests that need an engine but no sense in the answers.

    from tests.support.tiny_model import make_tiny_gguf, make_tiny_adapter
    path = make_tiny_gguf(tmp_path / "tiny.gguf", seed=1)

Two layers of width 64, byte-level tokenizer (256 bytes + 3 control tokens, a few merges), ChatML template: well below
1 MB, loads in some 50 ms, the same bytes for the same arguments. Different seeds give different models. Weights are F16,
norms F32; hidden 64 is no multiple of 256 (k-quants cannot be used there, as in SmolLM2), the feed-forward width 256 is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDOFTEXT, IM_START, IM_END = 256, 257, 258


def make_tiny_gguf(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 256,
    heads: int = 2,
    kv_heads: int = 1,
    context_tokens: int = 2048,
    scale: float = 0.3,
    chat_template: str = CHATML,
    name: str = "tiny",
    licence: str = "apache-2.0",
) -> Path:
    """Write the model and give its path back.

    Args:
        path: new file.
        seed: of the weights.
        layers: number of blocks.
        hidden: width; hidden / heads is the head size: a multiple of 32, as the q8_0 KV cache wants it.
        ffn: feed-forward width.
        heads: attention heads.
        kv_heads: key and value heads.
        context_tokens: what the header says the model was trained for.
        scale: size of the weights; larger makes more peaked distributions.
        chat_template: jinja.
        name: ``general.name``.
        licence: ``general.license``.
    """
    rng = np.random.default_rng(seed)
    tokens, merges = _vocabulary()
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_license(licence)
    writer.add_context_length(context_tokens)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    controls = range(ENDOFTEXT, IM_END + 1)
    writer.add_token_types(
        [TokenType.CONTROL if i in controls else TokenType.NORMAL for i in range(len(tokens))]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(IM_START)
    writer.add_eos_token_id(IM_END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template)

    def weight(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * scale / np.sqrt(columns) * 2).astype(np.float16)

    kv_width = hidden // heads * kv_heads
    writer.add_tensor(
        "token_embd.weight", (rng.standard_normal((len(tokens), hidden)) * scale).astype(np.float16)
    )
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", np.ones(hidden, np.float32))
        writer.add_tensor(f"{block}.ffn_norm.weight", np.ones(hidden, np.float32))
        writer.add_tensor(f"{block}.attn_q.weight", weight(hidden, hidden))
        writer.add_tensor(f"{block}.attn_k.weight", weight(kv_width, hidden))
        writer.add_tensor(f"{block}.attn_v.weight", weight(kv_width, hidden))
        writer.add_tensor(f"{block}.attn_output.weight", weight(hidden, hidden))
        writer.add_tensor(f"{block}.ffn_gate.weight", weight(ffn, hidden))
        writer.add_tensor(f"{block}.ffn_up.weight", weight(ffn, hidden))
        writer.add_tensor(f"{block}.ffn_down.weight", weight(hidden, ffn))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_tiny_adapter(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    rank: int = 2,
    alpha: float = 4.0,
    size: float = 0.05,
) -> Path:
    """Write a random LoRA adapter (GGUF) for ``attn_q`` and ``attn_output`` of a model of that shape."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for layer in range(layers):
        for tensor in ("attn_q", "attn_output"):
            name = f"blk.{layer}.{tensor}.weight"
            writer.add_tensor(
                f"{name}.lora_a", (rng.standard_normal((rank, hidden)) * size).astype(np.float16)
            )
            writer.add_tensor(
                f"{name}.lora_b", (rng.standard_normal((hidden, rank)) * size).astype(np.float16)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary() -> tuple[list[str], list[str]]:
    """GPT-2's printable stand-ins for the 256 bytes, three control tokens, a few merges."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    stand_in, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            stand_in[byte] = chr(byte)
        else:
            stand_in[byte] = chr(256 + extra)
            extra += 1
    tokens = [stand_in[byte] for byte in range(256)] + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["t h", "th e", "i n", "e r", "o n", "a n", "l i", "r e"]
    tokens += [merge.replace(" ", "") for merge in merges]
    return tokens, merges

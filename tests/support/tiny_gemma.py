"""A tiny random gemma3 GGUF that llama.cpp really loads: SentencePiece vocabulary, sliding windows, no chat template.

path = make_tiny_gemma(tmp_path / "gemma.gguf", seed=1)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

PIECES = (
    "▁",
    "t",
    "h",
    "e",
    "a",
    "n",
    "o",
    "r",
    "i",
    "l",
    "▁t",
    "he",
    "▁the",
    "an",
    "in",
    "on",
    "▁a",
    "er",
    "li",
    "re",
)


def make_tiny_gemma(
    path: Path, *, seed: int = 0, layers: int = 2, hidden: int = 64, ffn: int = 128, more_tokens: int = 0
) -> Path:
    """Write the model and give its path back: head width 32, two heads, one of keys and values.

    Args:
        path: new file.
        seed: of the weights.
        layers: number of blocks.
        hidden: width.
        ffn: feed-forward width.
        more_tokens: unused tokens on top, for a vocabulary as large as the real one's.
    """
    rng = np.random.default_rng(seed)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    kinds = [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN] + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL] * len(PIECES) + [TokenType.UNUSED] * more_tokens
    tokens += [f"<unused{i}>" for i in range(more_tokens)]
    writer = GGUFWriter(path, "gemma3")
    writer.add_name("tiny gemma")
    writer.add_license("gemma")
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(64)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 260 + [-float(i) for i in range(len(PIECES) + more_tokens)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * 0.6 / np.sqrt(columns)).astype(np.float16)

    def norm(width: int) -> np.ndarray:
        return (1 + rng.standard_normal(width) * 0.1).astype(np.float32)

    writer.add_tensor(
        "token_embd.weight", (rng.standard_normal((len(tokens), hidden)) * 0.3).astype(np.float16)
    )
    writer.add_tensor("output_norm.weight", norm(hidden))
    for layer in range(layers):
        block = f"blk.{layer}"
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            writer.add_tensor(f"{block}.{name}.weight", norm(hidden))
        writer.add_tensor(f"{block}.attn_q_norm.weight", norm(32))
        writer.add_tensor(f"{block}.attn_k_norm.weight", norm(32))
        writer.add_tensor(f"{block}.attn_q.weight", matrix(64, hidden))
        writer.add_tensor(f"{block}.attn_k.weight", matrix(32, hidden))
        writer.add_tensor(f"{block}.attn_v.weight", matrix(32, hidden))
        writer.add_tensor(f"{block}.attn_output.weight", matrix(hidden, 64))
        writer.add_tensor(f"{block}.ffn_gate.weight", matrix(ffn, hidden))
        writer.add_tensor(f"{block}.ffn_up.weight", matrix(ffn, hidden))
        writer.add_tensor(f"{block}.ffn_down.weight", matrix(hidden, ffn))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

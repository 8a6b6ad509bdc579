"""A Llama forward pass that reads its weights straight from a GGUF file.

Owns: the model's shape, the frozen weights, the forward pass over one packed row, and the hook by which
``lora`` adds to every linear layer. Does not own: tokens (``tokenizer``), what is trained (``lora``), the
loop (``finetune``).

Rules it keeps: names of layers are the GGUF's tensor names, so that an adapter needs no renaming; the
residual stream, norms, rotations and logits are float32, the matrices and what they multiply may be bfloat16;
no dropout, no cache, no generation (the engine generates). llama.cpp stores Llama's Q and K with
*interleaved* rotary pairs (2i, 2i+1), so they are used as they lie in the file, without the permutation that
Hugging Face's layout needs.

Source: llama.cpp ``src/models/llama.cpp`` (graph), ``convert_hf_to_gguf.py`` ``LlamaModel.permute`` (layout).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFReader, dequantize

from slmops.core.errors import BaseModelError

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class LinearHook(Protocol):
    """What is added to a linear layer's output; ``lora.LoraWeights`` is one."""

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """Return the addition for layer ``name`` on ``x`` (tokens, in_features), or None for nothing."""


@dataclass(frozen=True)
class LlamaShape:
    """The numbers of a Llama, as its GGUF header says them."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary_tokens: int
    context_tokens: int
    rope_base: float
    norm_epsilon: float

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """Return (out_features, in_features) of one of ``LINEARS``."""
        kv = self.kv_heads * self.head_width
        return {
            "attn_q": (self.hidden, self.hidden),
            "attn_k": (kv, self.hidden),
            "attn_v": (kv, self.hidden),
            "attn_output": (self.hidden, self.hidden),
            "ffn_gate": (self.ffn, self.hidden),
            "ffn_up": (self.ffn, self.hidden),
            "ffn_down": (self.hidden, self.ffn),
        }[linear]


class Llama:
    """Frozen weights and the forward pass.

    Args:
        shape: from the file's header.
        weights: by GGUF tensor name; matrices (out_features, in_features), norms (hidden,).
    """

    def __init__(self, shape: LlamaShape, weights: dict[str, torch.Tensor]) -> None:
        """Keep the weights; with tied embeddings ``output.weight`` is absent and the embedding serves."""
        self.shape = shape
        self.weights = weights
        self.output = weights.get("output.weight", weights["token_embd.weight"])
        half = torch.arange(0, shape.head_width, 2, dtype=torch.float32)
        self._frequencies = shape.rope_base ** (-half / shape.head_width)  # (head_width / 2,)

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        hook: LinearHook | None = None,
    ) -> torch.Tensor:
        """Run all layers over one packed row.

        Args:
            tokens: (t,) int64.
            positions: (t,) int64, the place of each token in its own sequence, not its index in the row.
            mask: (t, t) bool, True where the row's token may look at the column's.
            hook: what is added to the linear layers.

        Returns: (t, hidden) float32, after the last norm.
        """
        x = self.embed(tokens)
        cos, sin = self.turning(positions)
        bias = self.bias(mask)
        for layer in range(self.shape.layers):
            x = self.block(layer, x, cos, sin, bias, hook)
        return self._norm(x, "output_norm.weight")

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look tokens (t,) up; returns (t, hidden) float32."""
        return F.embedding(tokens, self.weights["token_embd.weight"]).float()

    def turning(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give cosine and sine of the rotary angles of positions (t,), each (t, head_width / 2)."""
        angles = positions[:, None].float() * self._frequencies
        return angles.cos(), angles.sin()

    def bias(self, mask: torch.Tensor) -> torch.Tensor:
        """Turn a (t, t) mask into what is added to attention scores."""
        dtype = self.weights["token_embd.weight"].dtype
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))

    def block(
        self,
        layer: int,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        bias: torch.Tensor,
        hook: LinearHook | None = None,
    ) -> torch.Tensor:
        """Run one block on the residual stream x (t, hidden); see ``hidden``, ``turning`` and ``bias``."""
        s, at = self.shape, f"blk.{layer}."
        h = self._norm(x, at + "attn_norm.weight")
        q = _rotate(self._linear(at + "attn_q", h, hook).view(-1, s.heads, s.head_width), cos, sin)
        k = _rotate(self._linear(at + "attn_k", h, hook).view(-1, s.kv_heads, s.head_width), cos, sin)
        v = self._linear(at + "attn_v", h, hook).view(-1, s.kv_heads, s.head_width)
        mixed = _attend(q, k, v, bias)  # (t, hidden)
        x = x + self._linear(at + "attn_output", mixed, hook)
        h = self._norm(x, at + "ffn_norm.weight")
        gated = F.silu(self._linear(at + "ffn_gate", h, hook)) * self._linear(at + "ffn_up", h, hook)
        return x + self._linear(at + "ffn_down", gated, hook)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project (n, hidden) to (n, vocabulary) float32.

        Give only the rows that are needed: for all of them it is a fifth of the whole work.
        """
        projected: torch.Tensor = F.linear(hidden.to(self.output.dtype), self.output)
        return projected.float()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (self.shape.hidden,), self.weights[name], self.shape.norm_epsilon)

    def _linear(self, name: str, x: torch.Tensor, hook: LinearHook | None) -> torch.Tensor:
        weight = self.weights[name + ".weight"]
        x = x.to(weight.dtype)
        y = F.linear(x, weight)
        delta = hook.delta(name, x) if hook else None
        return y if delta is None else y + delta


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Mix values: q (t, heads, width), k and v (t, kv_heads, width), bias (t, t); returns (t, heads * width).

    Plain matrix products: on a CPU the fused kernel's backward pass is three times slower at these lengths.
    """
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    q = q.transpose(0, 1).reshape(kv_heads, -1, width)  # (kv_heads, heads/kv_heads * t, width)
    scores = (q * width**-0.5) @ k.permute(1, 2, 0)  # (kv_heads, heads/kv_heads * t, t)
    weights = (scores.view(heads, tokens, tokens) + bias).softmax(-1).view_as(scores)
    mixed: torch.Tensor = (weights @ v.transpose(0, 1)).view(heads, tokens, width)
    return mixed.transpose(0, 1).reshape(tokens, heads * width)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn interleaved pairs of x (t, heads, head_width); cos and sin are (t, head_width / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    turned: torch.Tensor = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def load_llama(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """Read a Llama-architecture GGUF and dequantise every tensor.

    Args:
        path: the file; mapped, read once, not kept.
        dtype: of matrices and the embedding; norms stay float32.

    Raises:
        BaseModelError: not a GGUF, not of architecture ``llama``, or a tensor is missing.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise BaseModelError(
            f"{path}: not a readable GGUF: {error}", hint="give a GGUF file as the base"
        ) from error
    architecture = _field(reader, path, "general.architecture")
    if architecture != "llama":
        raise BaseModelError(
            f"{path}: expected architecture llama, got {architecture}",
            hint="slmops.train reads Llama-type models (SmolLM2, TinyLlama, Llama 3)",
        )
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(np.asarray(tensor.data), tensor.tensor_type)  # C order: last axis is GGUF's first
        values = np.array(values, dtype=np.float32, copy=True)
        weights[tensor.name] = torch.from_numpy(values).to(dtype if values.ndim > 1 else torch.float32)
    vocabulary, hidden = weights["token_embd.weight"].shape
    shape = LlamaShape(
        layers=_number(reader, path, "llama.block_count"),
        hidden=hidden,
        ffn=_number(reader, path, "llama.feed_forward_length"),
        heads=_number(reader, path, "llama.attention.head_count"),
        kv_heads=_number(reader, path, "llama.attention.head_count_kv"),
        vocabulary_tokens=vocabulary,
        context_tokens=_number(reader, path, "llama.context_length"),
        rope_base=float(_number(reader, path, "llama.rope.freq_base")),
        norm_epsilon=float(str(_field(reader, path, "llama.attention.layer_norm_rms_epsilon"))),
    )
    for name in (f"blk.{layer}.{linear}.weight" for layer in range(shape.layers) for linear in LINEARS):
        if name not in weights:
            raise BaseModelError(
                f"{path}: tensor {name} is missing", hint="the file may be truncated; fetch it again"
            )
    return Llama(shape, weights)


def causal_mask(tokens: int) -> torch.Tensor:
    """Return the (tokens, tokens) mask of one plain sequence."""
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def _field(reader: GGUFReader, path: Path, key: str) -> object:
    field = reader.get_field(key)
    if field is None:
        raise BaseModelError(f"{path}: header key {key} is missing", hint="give a complete GGUF model file")
    return field.contents()


def _number(reader: GGUFReader, path: Path, key: str) -> int:
    value = _field(reader, path, key)
    if not isinstance(value, int | float):
        raise BaseModelError(
            f"{path}: {key} should be a number, got {value!r}", hint="give a complete GGUF model file"
        )
    return int(value)

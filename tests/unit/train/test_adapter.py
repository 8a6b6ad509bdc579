"""The adapter file: what is written is read back, and what llama.cpp needs is in it."""

# ruff: noqa: E402 - what needs torch is imported after the question whether it is there
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gguf import GGUFReader

from slmops.core.errors import BaseModelError
from slmops.train.adapter import read_adapter, write_adapter
from slmops.train.llama import LlamaShape
from slmops.train.lora import LoraWeights

SHAPE = LlamaShape(
    layers=2,
    hidden=48,
    ffn=96,
    heads=6,
    kv_heads=2,
    vocabulary_tokens=64,
    context_tokens=128,
    rope_base=10000.0,
    norm_epsilon=1e-5,
)


def trained(rank: int = 4) -> LoraWeights:
    """An adapter whose B is not zero, as after training."""
    lora = LoraWeights(SHAPE, rank, 8.0, seed=1)
    chance = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for leaf in lora.b.values():
            leaf.copy_(torch.randn(leaf.shape, generator=chance))
    return lora


def test_roundtrip_keeps_every_pair_to_half_precision(tmp_path: Path) -> None:
    """Reading into a differently seeded adapter gives the written values, rounded to float16."""
    path = tmp_path / "a.gguf"
    written = trained()
    write_adapter(path, written, "llama", {"general.license": "apache-2.0"})
    read = LoraWeights(SHAPE, 4, 1.0, seed=99)
    read_adapter(path, read)
    assert read.alpha == 8.0
    for name, a in written.a.items():
        assert torch.equal(read.a[name], a.detach().half().float())
        assert torch.equal(read.b[name], written.b[name].detach().half().float())


def test_header_and_axis_order_are_llama_cpp_s(tmp_path: Path) -> None:
    """The header keys are there, and numpy sees A as (rank, in) and B as (out, rank)."""
    path = tmp_path / "a.gguf"
    write_adapter(path, trained(), "llama", {"general.license": "apache-2.0"})
    reader = GGUFReader(path)
    texts = {
        key: reader.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")
    }
    assert texts == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert reader.fields["general.license"].contents() == "apache-2.0"
    shapes = {tensor.name: np.asarray(tensor.data).shape for tensor in reader.tensors}
    assert len(shapes) == 2 * 7 * SHAPE.layers
    assert shapes["blk.1.ffn_up.weight.lora_a"] == (4, 48)
    assert shapes["blk.1.ffn_up.weight.lora_b"] == (96, 4)


def test_merged_weight_acts_as_the_adapter(tmp_path: Path) -> None:
    """W + alpha/rank B A, as the module docstring says it for numpy, gives base plus ``delta``."""
    path = tmp_path / "a.gguf"
    lora = trained()
    write_adapter(path, lora, "llama", {})
    read_adapter(path, lora)  # the rounded values, so that both sides have the same
    tensors = {tensor.name: np.asarray(tensor.data).astype(np.float32) for tensor in GGUFReader(path).tensors}
    a, b = tensors["blk.0.attn_k.weight.lora_a"], tensors["blk.0.attn_k.weight.lora_b"]
    weight = np.random.default_rng(3).standard_normal((16, 48), dtype=np.float32)
    x = np.random.default_rng(4).standard_normal((5, 48), dtype=np.float32)
    merged = x @ (weight + 8.0 / 4 * (b @ a)).T
    delta = lora.delta("blk.0.attn_k", torch.from_numpy(x))
    assert delta is not None
    np.testing.assert_allclose(merged, x @ weight.T + delta.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Another rank, or a file that is no adapter, is named as such."""
    path = tmp_path / "a.gguf"
    write_adapter(path, trained(rank=4), "llama", {})
    with pytest.raises(BaseModelError, match="should be"):
        read_adapter(path, LoraWeights(SHAPE, 8, 8.0, seed=1))


def test_untrained_adapter_changes_nothing() -> None:
    """B starts at zero."""
    lora = LoraWeights(SHAPE, 4, 8.0, seed=1)
    delta = lora.delta("blk.0.ffn_down", torch.ones(3, SHAPE.ffn))
    assert delta is not None
    assert torch.count_nonzero(delta) == 0
    assert lora.delta("blk.7.ffn_down", torch.ones(3, SHAPE.ffn)) is None

"""Merging is exact arithmetic in float32, and an adapter of another base is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tests.support.tiny_model import make_tiny_adapter, make_tiny_gguf

from slmops.build.graph import StepContext
from slmops.build.steps.weights import merge, permute, reference
from slmops.core.errors import BaseModelError, BuildError


def context(out: Path, files: dict[str, Path], **params: Any) -> StepContext:
    out.mkdir(parents=True)
    return StepContext(files, {}, params, out, lambda ratio, note: None)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_gguf(tmp_path / "base.gguf", seed=1)


def test_merge_adds_scaled_b_times_a(base: Path, tmp_path: Path) -> None:
    """W + scale * alpha / rank * B @ A where the adapter has a pair, the base's weights elsewhere."""
    adapter = make_tiny_adapter(tmp_path / "a.gguf", seed=5, rank=2, alpha=6.0, size=0.3)
    value = merge(context(tmp_path / "out", {"model": base, "adapter": adapter}, scale=0.5))
    assert value["merged_tensors"] == 4
    before, parts, after = tensors(base), tensors(adapter), tensors(tmp_path / "out" / "model.gguf")
    changed = 0
    for name, stored in after.items():
        expected = before[name].astype(np.float32)
        if f"{name}.lora_a" in parts:
            b, a = parts[f"{name}.lora_b"].astype(np.float64), parts[f"{name}.lora_a"].astype(np.float64)
            expected = expected + (0.5 * 6.0 / 2 * b @ a).astype(np.float32)
            changed += 1
        assert np.array_equal(stored, expected.astype(stored.dtype)), name
    assert changed == 4


def test_scale_zero_is_the_reference(base: Path, tmp_path: Path) -> None:
    """Merging nothing and dequantising give the same bytes."""
    adapter = make_tiny_adapter(tmp_path / "a.gguf", seed=5)
    merge(context(tmp_path / "merged", {"model": base, "adapter": adapter}, scale=0.0))
    reference(context(tmp_path / "plain", {"model": base}))
    assert (tmp_path / "merged" / "model.gguf").read_bytes() == (
        tmp_path / "plain" / "model.gguf"
    ).read_bytes()


def test_permuting_moves_rows_of_the_named_layers_only(base: Path, tmp_path: Path) -> None:
    """Attention rows of layer 1 are the same rows in another order; everything else is equal."""
    permute(context(tmp_path / "out", {"model": base}, layers=[1], seed=3))
    before, after = tensors(base), tensors(tmp_path / "out" / "model.gguf")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {f"blk.1.attn_{part}.weight" for part in ("q", "k", "v", "output")}
    for name in moved:
        assert np.array_equal(np.sort(before[name], axis=0), np.sort(after[name], axis=0))


def test_a_layer_that_is_not_there(base: Path, tmp_path: Path) -> None:
    """Says which layers there are."""
    with pytest.raises(BuildError, match=r"blk\.7\.attn_q") as caught:
        permute(context(tmp_path / "out", {"model": base}, layers=[7], seed=3))
    assert "0 to 1" in caught.value.hint


def other_architecture(path: Path) -> Path:
    writer = GGUFWriter(path, "gemma3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((2, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_no_fitting_adapter_is_named(base: Path, tmp_path: Path) -> None:
    """A model, another width, more layers, another architecture: each says what does not fit."""
    cases = {
        "expected a LoRA adapter": base,
        "do not fit the base's": make_tiny_adapter(tmp_path / "wide.gguf", hidden=96),
        "is missing in the base": make_tiny_adapter(tmp_path / "deep.gguf", layers=5),
        "gemma3": other_architecture(tmp_path / "gemma.gguf"),
    }
    for number, (message, adapter) in enumerate(cases.items()):
        with pytest.raises(BaseModelError, match=message):
            merge(context(tmp_path / f"out{number}", {"model": base, "adapter": adapter}, scale=1.0))


def test_weights_beyond_f16_are_refused(base: Path, tmp_path: Path) -> None:
    """An absurd scale must not write infinities."""
    adapter = make_tiny_adapter(tmp_path / "a.gguf", size=1.0)
    with pytest.raises(BuildError, match="beyond the range of F16"):
        merge(context(tmp_path / "out", {"model": base, "adapter": adapter}, scale=1e6))

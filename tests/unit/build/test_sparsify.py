"""Wanda's choice, and a verdict that says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from tests.support.tiny_model import make_tiny_gguf

from slmops.build.graph import StepContext
from slmops.build.steps.sparsify import (
    compressed_bytes,
    gains,
    keep_mask,
    scope,
    sparsify,
    stored_zeros_ratio,
    verdict,
)
from slmops.core.errors import BuildError

EQUAL = {"decode_tps": 1.01, "prefill_tps": 0.99, "rss_bytes": 1.0, "bytes": 1.0, "compressed_bytes": 1.0}


def context(out: Path, files: dict[str, Path], **params: Any) -> StepContext:
    out.mkdir(parents=True)
    return StepContext(files, {}, params, out, lambda ratio, note: None)


def test_activations_decide_with_the_weights() -> None:
    """A small weight on a loud input stays before a large one on a silent input."""
    rows = np.array([[0.1, 5.0, 1.0, -2.0]], np.float32)
    importance = np.array([1e4, 1e-6, 1.0, 1.0], np.float32)
    assert keep_mask(rows, importance, "2:4", 0.0).tolist() == [[True, False, False, True]]
    assert keep_mask(rows, importance, "unstructured", 0.75).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 0.5), ("1:4", 0.25), ("4:8", 0.5)])
def test_every_group_keeps_its_number(pattern: str, kept: float) -> None:
    rows = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    mask = keep_mask(rows, np.ones(64, np.float32), pattern, 0.0)
    size = int(pattern.partition(":")[2])
    assert set(mask.reshape(16, -1, size).sum(axis=2).ravel().tolist()) == {round(kept * size)}


def test_unstructured_takes_the_same_share_of_each_row() -> None:
    rows = np.random.default_rng(1).standard_normal((16, 60)).astype(np.float32)
    assert set(keep_mask(rows, np.ones(60, np.float32), "unstructured", 0.3).sum(axis=1).tolist()) == {42}


def test_groups_that_do_not_divide_the_rows() -> None:
    with pytest.raises(BuildError, match="rows of 64 weights cannot be cut into groups of 7"):
        keep_mask(np.ones((2, 64), np.float32), np.ones(64, np.float32), "3:7", 0.0)


def test_the_step_zeroes_the_blocks_matrices_only(tmp_path: Path) -> None:
    """Half of every matrix in the blocks; embedding, norms and what stays are as they were; the file compresses."""
    model = make_tiny_gguf(tmp_path / "m.gguf", seed=2)
    (tmp_path / "text.json").write_text(json.dumps([list(b"turn on the light in the kitchen, please")]))
    files = {"model": model, "text": tmp_path / "text.json"}
    value = sparsify(context(tmp_path / "out", files, pattern="2:4", ratio=0.5, tokens=32))
    assert value == {"pattern": "2:4", "zeros_ratio": 0.5, "tensors": 14}
    before = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(model).tensors}
    made = tmp_path / "out" / "model.gguf"
    for tensor in GGUFReader(made).tensors:
        old, new = before[tensor.name], np.array(tensor.data)
        if tensor.name.startswith("blk.") and "norm" not in tensor.name:
            assert (new == 0).mean() == pytest.approx(0.5, abs=0.01), tensor.name
            assert np.array_equal(new[new != 0], old[new != 0])
        else:
            assert np.array_equal(new, old), tensor.name
    assert stored_zeros_ratio(made) == pytest.approx(0.5, abs=0.01)
    assert compressed_bytes(made) < 0.8 * compressed_bytes(model)


def test_no_gain_is_said_plainly() -> None:
    assert gains(EQUAL) == []
    assert verdict("llama.cpp", EQUAL, 0.5).startswith("no gain on llama.cpp: decode × 1.01")


def test_a_smaller_download_alone_is_no_gain_in_speed_or_memory() -> None:
    ratios = EQUAL | {"compressed_bytes": 0.8}
    assert gains(ratios) == ["compressed_bytes"]
    assert "no gain on llama.cpp in speed, memory or file" in verdict("llama.cpp", ratios, 0.5)


@pytest.mark.parametrize(
    ("name", "ratio", "is_gain"),
    [
        ("decode_tps", 1.2, True),
        ("decode_tps", 1.04, False),
        ("rss_bytes", 0.7, True),
        ("bytes", 0.96, False),
    ],
)
def test_gains_are_told_by_name(name: str, ratio: float, is_gain: bool) -> None:
    assert gains(EQUAL | {name: ratio}) == ([name] if is_gain else [])
    assert verdict("x", EQUAL | {name: ratio}, 0.5).startswith("gain on x in" if is_gain else "no gain on x")


def test_a_verdict_says_which_variant_it_is_about() -> None:
    """Other targets have other types; nobody should think that they were measured, too."""
    assert scope("pi5-8gb", []) == ". Measured on the variant for pi5-8gb"
    assert scope("a", ["b", "c"]).endswith("those for b, c have other tensor types and were not measured")

"""Our view of GGUF blocks, against ggml's own reading of the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slmops.runtimes.llama_cpp.blocks import LAYOUTS, Rounder, round_to
from slmops.runtimes.llama_cpp.quantise import dequantise_rows, quant_type, quantise_rows

COLUMNS = 512


@pytest.fixture
def rows() -> NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal((24, COLUMNS)).astype(np.float32)


def blocks_of(name: str, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    stored = quantise_rows(name, rows, np.ones(COLUMNS, np.float32))
    return np.frombuffer(stored, dtype=np.uint8).reshape(-1, LAYOUTS[name].block_bytes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_are_ggmls_to_the_bit(name: str, rows: NDArray[np.float32]) -> None:
    """What we say a code is worth is exactly what ggml reads from the bytes that we write."""
    layout = LAYOUTS[name]
    kind = quant_type(name)
    assert (kind.block_weights, kind.block_bytes) == (layout.block_weights, layout.block_bytes)
    blocks = blocks_of(name, rows)
    # weights that have nothing to do with the scales: every code and both ends of the range occur
    others = (np.random.default_rng(8).standard_normal(rows.shape) * 3).astype(np.float32)
    step, base = layout.read(blocks)
    runs = layout.block_weights // layout.run_weights
    codes, values = Rounder(layout)(
        others.reshape(-1, runs, layout.run_weights),
        step[:, :, None],
        None if base is None else base[:, :, None],
    )
    assert len(np.unique(codes)) == layout.high - layout.low + 1 or name == "Q8_0"
    written = round_to(name, blocks, others.reshape(-1, layout.block_weights))
    read = dequantise_rows(name, written.tobytes(), COLUMNS)
    np.testing.assert_array_equal(values.reshape(rows.shape), read)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rounding_is_never_worse_than_ggmls(name: str, rows: NDArray[np.float32]) -> None:
    """With ggml's scales kept, the nearest level is at least as near as ggml's choice, and scales do not change."""
    layout = LAYOUTS[name]
    blocks = blocks_of(name, rows)
    written = round_to(name, blocks, rows.reshape(-1, layout.block_weights))

    def error(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.abs(dequantise_rows(name, stored.tobytes(), COLUMNS) - rows)

    assert (error(written) <= error(blocks) + 1e-6).all()
    for before, after in zip(layout.read(blocks), layout.read(written), strict=True):
        assert before is after is None or np.array_equal(before, after)  # type: ignore[arg-type]


def test_plain_rounding_is_ggmls_where_ggml_rounds_plainly(rows: NDArray[np.float32]) -> None:
    """Q8_0 has one obvious rounding: our bytes are ggml's."""
    blocks = blocks_of("Q8_0", rows)
    written = round_to("Q8_0", blocks, rows.reshape(-1, 32))
    # ggml multiplies by a rounded reciprocal, so weights within a rounding error of a boundary may differ
    assert (written != blocks).mean() < 0.01
    assert np.abs(written[:, 2:].view(np.int8).astype(int) - blocks[:, 2:].view(np.int8)).max() <= 1


def test_an_empty_block_stays_empty() -> None:
    """A step of zero divides nothing."""
    rows = np.zeros((1, COLUMNS), np.float32)
    for name, layout in LAYOUTS.items():
        blocks = np.frombuffer(quantise_rows(name, rows), dtype=np.uint8).reshape(-1, layout.block_bytes)
        written = round_to(name, blocks, rows.reshape(-1, layout.block_weights))
        assert not dequantise_rows(name, written.tobytes(), COLUMNS).any(), name

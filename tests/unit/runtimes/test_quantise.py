"""Our way into ggml's quantisers, against gguf-py, which is an independent implementation."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from slmops.core.errors import UsageError
from slmops.runtimes.llama_cpp.quantise import dequantise_rows, quant_type, quant_types, quantise_rows

CHEAP = [name for name in quant_types() if not name.startswith(("IQ1", "IQ2"))]
#: types whose encoder gguf-py has too, to the bit
SAME_BYTES = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]
NOT_IN_GGUF_PY = {"Q1_0", "Q2_0"}


@pytest.fixture
def rows() -> NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal((6, 512)).astype(np.float32)


def test_the_usual_types_are_there() -> None:
    """What llama.cpp's presets use is supported, with the sizes that GGUF states for them."""
    wanted = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert wanted | {"IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "F16", "BF16", "F32"} <= set(quant_types())
    for name, kind in quant_types().items():
        if name not in NOT_IN_GGUF_PY:
            weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
            assert (kind.block_weights, kind.block_bytes) == (weights, size)
            assert kind.ggml_id == gguf.GGMLQuantizationType[name]
    assert quant_type("Q4_K").bits_per_weight == 4.5


@pytest.mark.parametrize("name", SAME_BYTES)
def test_bytes_equal_those_of_gguf_py(name: str, rows: NDArray[np.float32]) -> None:
    """The quantised bytes are the same as an independent encoder's."""
    expected = quants.quantize(rows, gguf.GGMLQuantizationType[name])
    assert quantise_rows(name, rows) == expected.tobytes()


@pytest.mark.parametrize("name", [name for name in CHEAP if name not in NOT_IN_GGUF_PY])
def test_values_equal_those_of_gguf_py(name: str, rows: NDArray[np.float32]) -> None:
    """What we read back is what an independent decoder reads."""
    blob = quantise_rows(name, rows)
    assert len(blob) == len(rows) * quant_type(name).row_bytes(512)
    raw = np.frombuffer(blob, dtype=np.uint8).reshape(len(rows), -1)
    expected = quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(dequantise_rows(name, blob, 512), expected, rtol=1e-6, atol=1e-7)


def test_more_bits_lose_less(rows: NDArray[np.float32]) -> None:
    """Error falls with bits per weight inside the k-quants."""

    def error(name: str) -> float:
        return float(np.square(dequantise_rows(name, quantise_rows(name, rows), 512) - rows).mean())

    errors = [error(name) for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "F32")]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_an_imatrix_moves_the_error_to_where_it_matters_less(rows: NDArray[np.float32]) -> None:
    """With importance on half of the inputs, the weighted error is smaller than without."""
    importance = np.where(np.arange(512) % 2, 1.0, 1e-3).astype(np.float32)

    def weighted(imatrix: NDArray[np.float32] | None) -> float:
        back = dequantise_rows("Q3_K", quantise_rows("Q3_K", rows, imatrix), 512)
        return float((importance * np.square(back - rows)).mean())

    assert weighted(importance) < 0.9 * weighted(None)
    assert quantise_rows("Q3_K", rows, np.zeros(512, np.float32)) == quantise_rows("Q3_K", rows)


def test_what_does_not_fit_is_refused(rows: NDArray[np.float32]) -> None:
    """Rows that do not divide, NaN, wrong imatrix shapes, unknown types, torn blobs, a missing imatrix."""
    with pytest.raises(UsageError, match="multiples of 256"):
        quantise_rows("Q4_K", rows[:, :288])
    with pytest.raises(UsageError, match="finite"):
        quantise_rows("Q8_0", np.full((1, 32), np.nan, np.float32))
    with pytest.raises(UsageError, match=r"shape \(512,\)"):
        quantise_rows("Q4_K", rows, np.ones(511, np.float32))
    with pytest.raises(UsageError, match="n_rows"):
        quantise_rows("Q8_0", rows[0])
    with pytest.raises(UsageError, match="unknown"):
        quantise_rows("Q4_K_M", rows)
    with pytest.raises(UsageError, match="multiple of"):
        dequantise_rows("Q8_0", b"x" * 33, 32)
    with pytest.raises(UsageError, match="needs an imatrix"):
        quantise_rows("IQ2_XXS", rows)

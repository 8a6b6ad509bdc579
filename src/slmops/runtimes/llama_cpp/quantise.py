"""Quantise and dequantise rows with ggml's own code. For build: needs numpy.

Supported are the weight types that ggml can both write and read. Names are those of GGUF files ("Q4_K",
"IQ4_NL", "F16"). Sizes come from the library, not from a table of ours.
"""

from __future__ import annotations

import ctypes as ct
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slmops.core.errors import UsageError
from slmops.runtimes.llama_cpp import capi

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Value of `enum ggml_type`, ggml.h of the pinned build.
GGML_IDS: Mapping[str, int] = {
    "F32": 0, "F16": 1, "BF16": 30,
    "Q1_0": 41, "Q2_0": 42, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ1_S": 19, "IQ1_M": 29, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ2_S": 22, "IQ3_XXS": 18, "IQ3_S": 21,
    "IQ4_NL": 20, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40,
}  # fmt: skip

_TO_FLOAT = ct.CFUNCTYPE(None, ct.c_void_p, ct.c_void_p, ct.c_int64)
_PLAIN = {"F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class QuantType:
    """One weight type.

    Attributes:
        name: as in GGUF files.
        ggml_id: value of `enum ggml_type`.
        block_weights: weights in a block; a row's length must be a multiple of it.
        block_bytes: bytes of a block.
        needs_imatrix: ggml refuses it without an importance matrix.
    """

    name: str
    ggml_id: int
    block_weights: int
    block_bytes: int
    needs_imatrix: bool

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8.0 * self.block_bytes / self.block_weights

    def row_bytes(self, n_per_row: int) -> int:
        """Bytes of one row.

        Raises:
            UsageError: the row does not divide into blocks.
        """
        if n_per_row % self.block_weights:
            raise UsageError(
                f"{self.name}: expected rows in multiples of {self.block_weights} weights, got {n_per_row}",
                hint="use a type with blocks of 32 for this tensor",
            )
        return n_per_row // self.block_weights * self.block_bytes


@functools.cache
def quant_types() -> dict[str, QuantType]:
    """Every supported type by name."""
    lib = capi.library()
    types = {}
    for name, ggml_id in GGML_IDS.items():
        traits = lib.ggml_get_type_traits(ggml_id).contents
        if traits.type_name.decode().lower() != name.lower():
            continue  # another build's numbering: leave it out rather than write the wrong blocks
        needs = bool(lib.ggml_quantize_requires_imatrix(ggml_id)) or name == "IQ1_M"
        types[name] = QuantType(name, ggml_id, int(traits.block_weights), int(traits.block_bytes), needs)
    return types


def quant_type(name: str) -> QuantType:
    """A type by name.

    Raises:
        UsageError: unknown.
    """
    try:
        return quant_types()[name]
    except KeyError:
        raise UsageError(
            f"unknown quantisation type {name!r}: expected one of {', '.join(quant_types())}",
            hint="names are those of GGUF files, in capitals",
        ) from None


def quantise_rows(
    type_name: str, rows: NDArray[np.float32], imatrix: NDArray[np.float32] | None = None
) -> bytes:
    """Quantise a matrix, row by row.

    Args:
        type_name: key of `quant_types()`.
        rows: shape (n_rows, n_per_row), finite.
        imatrix: shape (n_per_row,), mean squared activation of each input; all zero counts as absent.

    Returns: n_rows * `QuantType.row_bytes(n_per_row)` bytes, as in a GGUF file.

    Raises:
        UsageError: shapes do not fit, values are not finite, or the type needs an imatrix.
    """
    kind = quant_type(type_name)
    matrix = np.ascontiguousarray(rows, dtype=np.float32)
    if matrix.ndim != 2:
        raise UsageError(f"rows: expected shape (n_rows, n_per_row), got {matrix.shape}", hint="reshape it")
    n_rows, n_per_row = matrix.shape
    size = kind.row_bytes(n_per_row) * n_rows
    if not np.isfinite(matrix).all():
        raise UsageError(
            f"{type_name}: expected finite weights, got NaN or infinity", hint="see the step before"
        )
    weights = _weights(kind, imatrix, n_per_row)
    if type_name in _PLAIN:
        return matrix.astype(_PLAIN[type_name]).tobytes()
    lib = capi.library()
    lib.ggml_quantize_init(kind.ggml_id)
    target = ct.create_string_buffer(size)
    written = lib.ggml_quantize_chunk(
        kind.ggml_id,
        matrix.ctypes.data,
        ct.cast(target, ct.c_void_p),
        0,
        n_rows,
        n_per_row,
        weights.ctypes.data if weights is not None else None,
    )
    if written != size:
        raise UsageError(f"{type_name}: expected {size} bytes, ggml wrote {written}", hint="report it")
    return target.raw


def _weights(
    kind: QuantType, imatrix: NDArray[np.float32] | None, n_per_row: int
) -> NDArray[np.float32] | None:
    weights = None if imatrix is None else np.ascontiguousarray(imatrix, dtype=np.float32)
    if weights is not None and weights.shape != (n_per_row,):
        raise UsageError(
            f"imatrix: expected shape ({n_per_row},), got {weights.shape}", hint="one value per input"
        )
    if weights is not None and (not np.isfinite(weights).all() or not (weights > 0).any()):
        weights = None  # ggml divides by their sums
    if weights is None and kind.needs_imatrix:
        raise UsageError(f"{kind.name} needs an imatrix", hint="collect one, or use IQ3_XXS and above")
    return weights


def dequantise_rows(type_name: str, blob: bytes | memoryview, n_per_row: int) -> NDArray[np.float32]:
    """Floats of quantised rows.

    Args:
        type_name: key of `quant_types()`.
        blob: whole rows.
        n_per_row: weights per row.

    Returns: shape (n_rows, n_per_row).

    Raises:
        UsageError: `blob` is not a whole number of rows.
    """
    kind = quant_type(type_name)
    row_bytes = kind.row_bytes(n_per_row)
    if len(blob) % row_bytes:
        raise UsageError(
            f"{type_name}: expected a multiple of {row_bytes} bytes, got {len(blob)}", hint="pass whole rows"
        )
    n_rows = len(blob) // row_bytes
    if type_name in _PLAIN:
        return np.frombuffer(blob, dtype=_PLAIN[type_name]).astype(np.float32).reshape(n_rows, n_per_row)
    to_float = _TO_FLOAT(capi.library().ggml_get_type_traits(kind.ggml_id).contents.to_float)
    source = np.frombuffer(blob, dtype=np.uint8)
    target = np.empty((n_rows, n_per_row), dtype=np.float32)
    to_float(source.ctypes.data, target.ctypes.data, target.size)
    return target

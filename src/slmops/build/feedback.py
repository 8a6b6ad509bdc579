"""Quantising a weight matrix with error feedback (GPTQ), inside ordinary GGUF blocks.

Rounding each weight for itself ignores that inputs are correlated. Here columns are rounded one after another, and what a
column lost is made up for by the columns that come after it, so that the *output* changes least: the loss is
tr(D H D') with D the error and H the mean outer product of the inputs. Scales are ggml's own, searched for each block when
its turn comes, on the weights as they are then; so the file is one that any llama.cpp runs.

All rows share H and are independent of each other, so everything is vectorised over rows: the matrix lies transposed, a
column is contiguous.

Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323, algorithm 1 (without its column order, which blocks do not allow).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.blocks import LAYOUTS, Layout, Rounder, inverse_of
from slmops.runtimes.llama_cpp.quantise import quantise_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: added to H's diagonal, in units of its mean; more for the output matrix, whose inputs vary least
DAMPING, OUTPUT_DAMPING = 0.01, 0.1
#: columns that are rounded before the rest of the matrix is told
LAZY_COLUMNS = 32
#: rows that are worked on together: one column of them fits the first-level cache
_ROWS_AT_ONCE = 8192
_MOST_DAMPINGS = 6
_SMALL = 96


@dataclass(frozen=True)
class Curvature:
    """What error feedback needs to know about a matrix's inputs.

    Attributes:
        carry: (columns, columns) float32, upper triangular with ones on the diagonal: how one unit of error in column i is
            taken out of the columns after it.
        weights: (columns,) float32: what a squared error of a column costs when those after it make up for it.
    """

    carry: NDArray[np.float32] = field(repr=False)
    weights: NDArray[np.float32] = field(repr=False)


def curvature(hessian: NDArray[np.floating], damping: float = DAMPING, tokens: int = 0) -> Curvature:
    """Factor H, after drawing it towards its diagonal as far as its estimate is noise.

    H from few tokens shows correlations that are not there, and feeding errors back along those harms: on SmolLM2's ffn_down
    (1,536 inputs) with 1,024 tokens, feedback without shrinking lost 1.2 to 1.6 times what plain rounding does, with it 0.7 to
    0.85 times (both on text that H has not seen). The best share was about n / (n + 2 tokens) for 576 inputs and for 1,536.

    Args:
        hessian: (n, n), symmetric, positive semidefinite up to rounding.
        tokens: that H is a mean over; 0 takes it as exact.
        damping: added to the diagonal, in units of its mean; ten times more as often as the factorisation needs it.

    Raises:
        BuildError: H is not finite, or so indefinite that damping does not help (a bug in who collected it).
    """
    matrix = np.array(hessian, dtype=np.float64)
    diagonal = np.diag(matrix).copy()
    mean = float(diagonal.mean())
    if not np.isfinite(matrix).all():
        raise BuildError(
            "the inputs' outer products are not finite", hint="the model computes NaN: check the base"
        )
    if tokens:
        matrix *= 1 - len(matrix) / (len(matrix) + 2 * tokens)
        matrix[np.diag_indices_from(matrix)] = diagonal
    if mean <= 0:
        return Curvature(np.eye(len(matrix), dtype=np.float32), np.ones(len(matrix), dtype=np.float32))
    for attempt in range(_MOST_DAMPINGS):
        damped = matrix.copy()
        damped[np.diag_indices_from(damped)] += damping * 10**attempt * mean
        try:
            # H = R R' with R upper triangular; then U = R^-1 is upper too and H^-1 = U' U
            lower = np.linalg.cholesky(damped[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        upper = _inverse(lower)[::-1, ::-1]
        pivots = np.diag(upper).copy()
        return Curvature(
            np.triu(upper / pivots[:, None]).astype(np.float32), (1 / pivots**2).astype(np.float32)
        )
    raise BuildError(
        f"the inputs' outer products are not positive: damping {damping * 10 ** (_MOST_DAMPINGS - 1):g} did not help",
        hint="report it",
    )


def _inverse(lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of a lower triangular matrix, by halves: a fifth of the work of a general inverse."""
    size = len(lower)
    if size <= _SMALL:
        return np.tril(np.linalg.inv(lower))
    half = size // 2
    first, last = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    result = np.zeros_like(lower)
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -last @ (lower[half:, :half] @ first)
    return result


def can_feed_back(type_name: str) -> bool:
    """Whether a type's blocks are known; others are rounded by ggml."""
    return type_name in LAYOUTS


def quantise_with_feedback(
    type_name: str, rows: NDArray[np.float32], inputs: Curvature, scales_from: bytes | None = None
) -> bytes:
    """Quantise a matrix.

    Args:
        type_name: key of ``LAYOUTS``.
        rows: (n_rows, columns), finite.
        inputs: of this matrix.
        scales_from: an earlier quantisation of this matrix in this type, as in a GGUF file: its block scales are kept and
            only codes are chosen anew, so that a delta to it is small.

    Returns: bytes as in a GGUF file.

    Raises:
        BuildError: ``scales_from`` has another size.
    """
    layout = LAYOUTS[type_name]
    n_rows, columns = rows.shape
    per_row = columns // layout.block_weights
    frozen = None
    if scales_from is not None:
        if len(scales_from) != n_rows * per_row * layout.block_bytes:
            raise BuildError(
                f"scales_from: expected {n_rows * per_row * layout.block_bytes} bytes of {type_name}, got {len(scales_from)}",
                hint="scales can be kept only for the same tensor in the same type",
            )
        frozen = np.frombuffer(scales_from, dtype=np.uint8).reshape(n_rows, per_row, layout.block_bytes)
    out = np.empty((n_rows, per_row, layout.block_bytes), dtype=np.uint8)
    for first in range(0, n_rows, _ROWS_AT_ONCE):
        here = slice(first, first + _ROWS_AT_ONCE)
        _feed(type_name, layout, rows[here], inputs, None if frozen is None else frozen[here], out[here])
    return out.tobytes()


def _feed(
    type_name: str,
    layout: Layout,
    rows: NDArray[np.float32],
    inputs: Curvature,
    frozen: NDArray[np.uint8] | None,
    out: NDArray[np.uint8],
) -> None:
    work = np.ascontiguousarray(rows.T, dtype=np.float32)  # (columns, rows): changed as errors come in
    rounder = Rounder(layout)
    columns, count = work.shape
    codes = np.empty((layout.block_weights, count), dtype=np.uint8)
    errors = np.empty((LAZY_COLUMNS, count), dtype=np.float32)
    for block in range(columns // layout.block_weights):
        begin = block * layout.block_weights
        end = begin + layout.block_weights
        if frozen is None:
            now = np.ascontiguousarray(work[begin:end].T)
            stored = quantise_rows(type_name, now, inputs.weights[begin:end])
            blocks = np.frombuffer(stored, dtype=np.uint8).reshape(count, layout.block_bytes).copy()
        else:
            blocks = frozen[:, block].copy()
        step, base = layout.read(blocks)
        step, base = np.ascontiguousarray(step.T), None if base is None else np.ascontiguousarray(base.T)
        inverse = inverse_of(step)
        for at in range(begin, end, LAZY_COLUMNS):
            last = at + LAZY_COLUMNS
            for column in range(at, last):
                run = (column - begin) // layout.run_weights
                codes[column - begin], value = rounder(
                    work[column], step[run], None if base is None else base[run], inverse[run]
                )
                error = np.subtract(work[column], value, out=errors[column - at])
                if column + 1 < last:
                    work[column + 1 : last] -= inputs.carry[column, column + 1 : last, None] * error
            if last < columns:
                work[last:] -= inputs.carry[at:last, last:].T @ errors
        layout.write(blocks, np.ascontiguousarray(codes.T))
        out[:, block] = blocks


def loss(error: NDArray[np.float32], hessian: NDArray[np.floating]) -> NDArray[np.float64]:
    """What an error costs: e H e' of each row of ``error`` (rows, columns)."""
    result: NDArray[np.float64] = np.einsum("ij,ij->i", error @ hessian, error, dtype=np.float64)
    return result

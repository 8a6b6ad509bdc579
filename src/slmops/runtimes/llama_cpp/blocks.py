"""The blocks of GGUF weight types, opened: read a block's scales, put other codes beside them. For build: needs numpy.

ggml's own quantiser chooses scales and codes together and rounds each weight for itself. Whoever wants other codes with ggml's
scales (error feedback, frozen scales) needs the layout. A weight is

    value = step * level + base         step and base belong to a run of ``run_weights`` weights, level to the weight

where level is an integer, or an entry of a table for the non-linear types. The arithmetic is float32 in ggml's order, so
values are equal to ``dequantise_rows`` bit by bit (tests/unit/runtimes/test_blocks.py).

Source: ggml of the pinned build, ``ggml-common.h`` (structs), ``ggml-quants.c`` (``dequantize_row_*``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[Any]  # uint8; shifts of it are typed as wider integers, though they are not
    Floats = NDArray[np.float32]

#: ggml-common.h, ``kvalues_iq4nl``
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Layout:
    """How a type's block is laid out.

    Attributes:
        block_weights: weights of a block; ``block_bytes``: its bytes; ``run_weights``: weights that share a step.
        low, high: least and greatest level; with a table, of the code.
        levels: of the non-linear types, ascending, by code; empty for linear ones, where code = level - low.
        read: blocks (n, block_bytes) to step and base, each (n, runs) float32; base None: zero everywhere.
        write: puts codes (n, block_weights) into blocks (n, block_bytes), which keep their scales.
    """

    block_weights: int
    block_bytes: int
    run_weights: int
    low: int
    high: int
    read: Callable[[Bytes], tuple[Floats, Floats | None]] = field(repr=False)
    write: Callable[[Bytes, Bytes], None] = field(repr=False)
    levels: tuple[int, ...] = ()


def _half(blocks: Bytes, at: int) -> Floats:
    """A float16 field of every block, shape (n, 1)."""
    values: Floats = blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)
    return values


def _no_base(at: int) -> Callable[[Bytes], tuple[Floats, Floats | None]]:
    return lambda blocks: (_half(blocks, at), None)


def _with_base(blocks: Bytes) -> tuple[Floats, Floats | None]:
    return _half(blocks, 0), _half(blocks, 2)


def _nibbles(codes: Bytes) -> Bytes:
    """Codes (..., 32) below 16 to bytes (..., 16): the first half low, the second high."""
    packed: Bytes = codes[..., :16] | codes[..., 16:] << 4
    return packed


def _write_4(at: int) -> Callable[[Bytes, Bytes], None]:
    def write(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, at : at + 16] = _nibbles(codes)

    return write


def _write_5(at: int) -> Callable[[Bytes, Bytes], None]:
    def write(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, at : at + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
        blocks[:, at + 4 : at + 20] = _nibbles(codes & 15)

    return write


def _write_q8_0(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:34] = codes - np.uint8(127)  # code = level + 127; wraps into two's complement


def _scales_q4_k(scales: Bytes) -> tuple[Floats, Floats]:
    """The 6-bit scales and minima of eight runs out of twelve bytes (``get_scale_min_k4``)."""
    first, second, third = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    scale = np.concatenate((first & 63, (third & 15) | (first >> 6) << 4), axis=1)
    least = np.concatenate((second & 63, (third >> 4) | (second >> 6) << 4), axis=1)
    return scale.astype(np.float32), least.astype(np.float32)


def _read_q45_k(blocks: Bytes) -> tuple[Floats, Floats | None]:
    scale, least = _scales_q4_k(blocks[:, 4:16])
    return _half(blocks, 0) * scale, -(_half(blocks, 2) * least)


def _write_q4_k(blocks: Bytes, codes: Bytes) -> None:
    pairs = codes.reshape(len(codes), 4, 2, 32)
    blocks[:, 16:144] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def _write_q5_k(blocks: Bytes, codes: Bytes) -> None:
    runs = codes.reshape(len(codes), 8, 32)
    blocks[:, 16:48] = np.packbits(runs >> 4, axis=1, bitorder="little")[:, 0]
    pairs = (runs & 15).reshape(-1, 4, 2, 32)
    blocks[:, 48:176] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def _read_q6_k(blocks: Bytes) -> tuple[Floats, Floats | None]:
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


def _write_q6_k(blocks: Bytes, codes: Bytes) -> None:
    runs = codes.reshape(len(codes), 2, 4, 32)
    low, high = runs & 15, runs >> 4
    blocks[:, 0:128] = np.concatenate(
        (low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), axis=2
    ).reshape(-1, 128)
    blocks[:, 128:192] = _quarters(high).reshape(-1, 64)


def _quarters(codes: Bytes) -> Bytes:
    """Codes (..., 4, 32) below 4 to bytes (..., 32)."""
    packed: Bytes = codes[..., 0, :] | codes[..., 1, :] << 2 | codes[..., 2, :] << 4 | codes[..., 3, :] << 6
    return packed


def _read_q3_k(blocks: Bytes) -> tuple[Floats, Floats | None]:
    packed = blocks[:, 96:108]
    low = np.concatenate((packed[:, :8] & 15, packed[:, :8] >> 4), axis=1)
    high = np.concatenate([packed[:, 8:12] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = (low | high << 4).astype(np.float32) - 32
    return _half(blocks, 108) * scale, None


def _write_q3_k(blocks: Bytes, codes: Bytes) -> None:
    runs = codes.reshape(len(codes), 2, 4, 32)
    blocks[:, 0:32] = np.packbits((runs >> 2).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    blocks[:, 32:96] = _quarters(runs & 3).reshape(-1, 64)


def _read_q2_k(blocks: Bytes) -> tuple[Floats, Floats | None]:
    packed = blocks[:, 0:16]
    scale, least = (packed & 15).astype(np.float32), (packed >> 4).astype(np.float32)
    return _half(blocks, 80) * scale, -(_half(blocks, 82) * least)


def _write_q2_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 16:80] = _quarters(codes.reshape(len(codes), 2, 4, 32)).reshape(-1, 64)


def _read_iq4_xs(blocks: Bytes) -> tuple[Floats, Floats | None]:
    high = blocks[:, 2:4].copy().view("<u2").astype(np.int32)
    runs = np.arange(8)
    low = blocks[:, 4 + runs // 2] >> (4 * (runs % 2)).astype(np.uint8) & 15
    scale = (low | (high >> 2 * runs & 3) << 4).astype(np.float32) - 32
    return _half(blocks, 0) * scale, None


def _write_iq4_xs(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 8:136] = _nibbles(codes.reshape(len(codes), 8, 32)).reshape(-1, 128)


LAYOUTS: Mapping[str, Layout] = {
    "Q4_0": Layout(32, 18, 32, -8, 7, _no_base(0), _write_4(2)),
    "Q4_1": Layout(32, 20, 32, 0, 15, _with_base, _write_4(4)),
    "Q5_0": Layout(32, 22, 32, -16, 15, _no_base(0), _write_5(2)),
    "Q5_1": Layout(32, 24, 32, 0, 31, _with_base, _write_5(4)),
    "Q8_0": Layout(32, 34, 32, -127, 127, _no_base(0), _write_q8_0),
    "IQ4_NL": Layout(32, 18, 32, 0, 15, _no_base(0), _write_4(2), IQ4_LEVELS),
    "Q2_K": Layout(256, 84, 16, 0, 3, _read_q2_k, _write_q2_k),
    "Q3_K": Layout(256, 110, 16, -4, 3, _read_q3_k, _write_q3_k),
    "Q4_K": Layout(256, 144, 32, 0, 15, _read_q45_k, _write_q4_k),
    "Q5_K": Layout(256, 176, 32, 0, 31, _read_q45_k, _write_q5_k),
    "Q6_K": Layout(256, 210, 16, -32, 31, _read_q6_k, _write_q6_k),
    "IQ4_XS": Layout(256, 136, 32, 0, 15, _read_iq4_xs, _write_iq4_xs, IQ4_LEVELS),
}


class Rounder:
    """Rounds weights to the nearest level of their run.

    Args:
        layout: of the type.
    """

    def __init__(self, layout: Layout) -> None:
        self._low, self._high = np.float32(layout.low), np.float32(layout.high)
        self._levels = np.array(layout.levels, dtype=np.float32)
        if layout.levels:
            # every boundary between two levels is a multiple of one half, so cells of one half decide exactly
            centres = (np.arange(512) - 256) / 2 + 0.25
            self._code = np.abs(centres[:, None] - self._levels).argmin(axis=1).astype(np.uint8)

    def __call__(
        self, weights: Floats, step: Floats, base: Floats | None, inverse: Floats | None = None
    ) -> tuple[Bytes, Floats]:
        """Codes and values of weights.

        Args:
            weights: any shape; ``step`` (and ``base``, where the type has one) broadcast to it.
            step: a zero step gives the value ``base``.
            base: see above.
            inverse: :func:`inverse_of` the step, for callers that round many weights with the same.
        """
        shifted = weights if base is None else weights - base
        scaled = shifted * (inverse_of(step) if inverse is None else inverse)
        if len(self._levels):
            cells = np.clip(np.floor(scaled * 2) + 256, 0, 511).astype(np.int16)
            codes = self._code[cells]
            values = self._levels[codes] * step
        else:
            level = np.clip(np.rint(scaled), self._low, self._high)
            codes = (level - self._low).astype(np.uint8)
            values = level * step
        return codes, values if base is None else values + base


def inverse_of(step: Floats) -> Floats:
    """One over each step; zero for an empty run, which then rounds everything to zero."""
    inverse: Floats = np.zeros_like(step)
    np.divide(np.float32(1), step, out=inverse, where=step != 0)
    return inverse


def round_to(type_name: str, blocks: Bytes, weights: Floats) -> Bytes:
    """Blocks with their scales kept and every weight rounded to the nearest level.

    Args:
        type_name: key of ``LAYOUTS``.
        blocks: shape (n, block_bytes); ``weights``: shape (n, block_weights).
        weights: see above.
    """
    layout = LAYOUTS[type_name]
    step, base = layout.read(blocks)
    runs = layout.block_weights // layout.run_weights
    codes, _ = Rounder(layout)(
        weights.reshape(-1, runs, layout.run_weights),
        step[:, :, None],
        None if base is None else base[:, :, None],
    )
    written: Bytes = blocks.copy()
    layout.write(written, codes.reshape(-1, layout.block_weights))
    return written

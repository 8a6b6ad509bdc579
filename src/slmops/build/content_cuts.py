"""The cuts of :mod:`slmops.artifact.fastcdc`, several times as fast: builds cut files of hundreds of megabytes.

The gear hash at a byte is a sum over the 64 bytes up to it, so it can be taken for all bytes at once by doubling: of 1, 2, 4
... 64 bytes. Only the first 63 bytes that a chunk looks at see fewer, because each chunk's hash begins anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slmops.artifact.fastcdc import GEAR

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WINDOW = 64
_BLOCK_BYTES = 4 << 20
_GEAR = np.array(GEAR, dtype=np.uint64)


def cut_points(content: bytes, *, min_bytes: int, average_bytes: int, max_bytes: int) -> list[int]:
    """End offsets of the chunks, exactly as :func:`slmops.artifact.fastcdc.cut_points` gives them."""
    bits = average_bytes.bit_length() - 1
    strict = ((1 << (bits + 1)) - 1) << (63 - bits)
    loose = ((1 << (bits - 1)) - 1) << (65 - bits)
    strict_at, loose_at = _candidates(content, strict, loose)
    ends: list[int] = []
    start, size = 0, len(content)
    while start < size:
        limit = min(start + max_bytes, size)
        first = min(start + min_bytes, limit)
        normal = max(first, min(start + average_bytes, limit))
        ends.append(_end(content, first, normal, limit, strict, loose, strict_at, loose_at))
        start = ends[-1]
    return ends


def _end(  # noqa: PLR0913 - the state of one loop
    content: bytes,
    first: int,
    normal: int,
    limit: int,
    strict: int,
    loose: int,
    strict_at: NDArray[np.int64],
    loose_at: NDArray[np.int64],
) -> int:
    fingerprint = 0
    whole = min(first + _WINDOW - 1, limit)
    for at in range(first, whole):  # bytes that see a part of the window only
        fingerprint = ((fingerprint << 1) + GEAR[content[at]]) & ((1 << 64) - 1)
        if not fingerprint & (strict if at < normal else loose):
            return at + 1
    found = _next(strict_at, whole, min(normal, limit))
    if found is None:
        found = _next(loose_at, max(whole, normal), limit)
    return limit if found is None else found + 1


def _next(candidates: NDArray[np.int64], begin: int, end: int) -> int | None:
    at = int(np.searchsorted(candidates, begin))
    return int(candidates[at]) if at < len(candidates) and candidates[at] < end else None


def _candidates(content: bytes, *masks: int) -> list[NDArray[np.int64]]:
    """For each mask the places at which the hash of the 64 bytes up to there has none of its bits."""
    bytes_ = np.frombuffer(content, dtype=np.uint8)
    found: list[list[NDArray[np.int64]]] = [[np.zeros(0, dtype=np.int64)] for _ in masks]
    for begin in range(0, len(bytes_), _BLOCK_BYTES):
        before = max(begin - _WINDOW + 1, 0)
        hashes = _GEAR[bytes_[before : begin + _BLOCK_BYTES]]
        width = 1
        while width < min(_WINDOW, len(hashes)):
            hashes[width:] += hashes[:-width] << np.uint64(width)
            width *= 2
        for mask, places in zip(masks, found, strict=True):
            places.append(np.flatnonzero((hashes[begin - before :] & np.uint64(mask)) == 0) + begin)
    return [np.concatenate(places) for places in found]

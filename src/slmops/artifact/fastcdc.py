"""Content-defined chunking for bytes that have no structure of their own (headers, other formats).

FastCDC with normalised chunking: a rolling gear hash cuts where its top bits are zero, with a stricter mask
before the average size and a looser one after it, so that an insertion moves only the cuts around it.

The gear table is derived from SHA-256, so it is the same everywhere and for ever: ``gear[i]`` is the first
eight bytes, little-endian, of ``sha256(b"slmops-gear" + bytes([i]))``.

Source: Xia et al. 2016, FastCDC, USENIX ATC, sections 3.2 to 3.5.
"""

from __future__ import annotations

import hashlib

GEAR: tuple[int, ...] = tuple(
    int.from_bytes(hashlib.sha256(b"slmops-gear" + bytes([i])).digest()[:8], "little") for i in range(256)
)
_MASK64 = (1 << 64) - 1


def cut_points(content: bytes, *, min_bytes: int, average_bytes: int, max_bytes: int) -> list[int]:
    """End offsets of the chunks of ``content``; the last one is its length.

    Args:
        content: bytes to cut; empty content has no chunks.
        min_bytes: no chunk but the last is shorter.
        average_bytes: aimed at; a power of two.
        max_bytes: no chunk is longer.
    """
    bits = average_bytes.bit_length() - 1
    strict = ((1 << (bits + 1)) - 1) << (63 - bits)
    loose = ((1 << (bits - 1)) - 1) << (65 - bits)
    gear, mask64 = GEAR, _MASK64
    ends: list[int] = []
    start, size = 0, len(content)
    while start < size:
        limit = min(start + max_bytes, size)
        first = min(start + min_bytes, limit)
        normal = max(first, min(start + average_bytes, limit))
        fingerprint = 0
        end = limit
        for at in range(first, limit):
            fingerprint = ((fingerprint << 1) + gear[content[at]]) & mask64
            if not fingerprint & (strict if at < normal else loose):
                end = at + 1
                break
        ends.append(end)
        start = end
    return ends

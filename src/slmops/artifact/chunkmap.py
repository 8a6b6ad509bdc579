"""The chunk map: how one artifact is cut into chunks, and what each of them hashes to.

Rules of the cut (ADR 0003):

* a GGUF's header is cut by content (:mod:`slmops.artifact.fastcdc`), so a changed prompt template costs one
  small chunk;
* a tensor begins a new chunk; one larger than 4 MiB is cut into equal pieces that end at whole quantisation
  blocks;
* padding belongs to the tensor before it;
* neighbouring tensors of less than 64 KiB are packed together, at most 4 MiB in one chunk;
* any other format is cut by content.

The map is an artifact of its own: the variant manifest names it by digest, so one hash chain covers every
byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from slmops.artifact.digest import UNREADABLE_JSON, canonical_json, is_digest, sha256_hex
from slmops.artifact.fastcdc import cut_points
from slmops.artifact.gguf_layout import Buffer, GgufLayout, Tensor, parse_gguf
from slmops.core.errors import TrustError

MAX_CHUNK_BYTES = 4 << 20
SMALL_TENSOR_BYTES = 64 << 10
SCHEMA = 1


class Chunk(msgspec.Struct, frozen=True):
    """A piece of an artifact: its size and digest; its place is the sum of the sizes before it."""

    bytes: int
    sha256: str


class ChunkMap(msgspec.Struct, frozen=True, omit_defaults=True):
    """All chunks of one artifact, in order.

    Attributes:
        schema: version of this document.
        format: ``gguf`` or ``raw``; says which rules made the cut.
        artifact_bytes: size of the whole artifact; ``artifact_sha256``: its digest.
        chunks: in file order, without gaps.
    """

    schema: int
    format: str
    artifact_bytes: int
    artifact_sha256: str
    chunks: tuple[Chunk, ...]

    def offsets(self) -> Iterator[tuple[int, Chunk]]:
        """Each chunk with its offset from the start of the artifact, bytes."""
        at = 0
        for chunk in self.chunks:
            yield at, chunk
            at += chunk.bytes


def encode_chunk_map(chunk_map: ChunkMap) -> bytes:
    """Canonical bytes of a chunk map."""
    return canonical_json(chunk_map)


def decode_chunk_map(content: bytes) -> ChunkMap:
    """Read and check a chunk map whose digest has been verified by the caller.

    Raises:
        TrustError: it is malformed, of an unknown schema, or its sizes do not add up.
    """
    try:
        chunk_map = msgspec.json.decode(content, type=ChunkMap)
    except UNREADABLE_JSON as error:
        raise TrustError(
            f"chunk map is malformed: {error}", hint="the release was made by a broken or newer tool"
        ) from error
    if chunk_map.schema != SCHEMA:
        raise TrustError(
            f"chunk map has schema {chunk_map.schema}, {SCHEMA} can be read",
            hint="update slmops on this device",
        )
    total = sum(chunk.bytes for chunk in chunk_map.chunks)
    bad = [c for c in chunk_map.chunks if not 0 < c.bytes <= MAX_CHUNK_BYTES * 2 or not is_digest(c.sha256)]
    if total != chunk_map.artifact_bytes or bad or not is_digest(chunk_map.artifact_sha256):
        raise TrustError(
            f"chunk map does not add up: {total} bytes in chunks, "
            f"{chunk_map.artifact_bytes} in the artifact, {len(bad)} bad chunks",
            hint="the release was made by a broken tool",
        )
    return chunk_map


def make_chunk_map(
    content: Buffer,
    artifact_format: str,
    what: str = "artifact",
    *,
    cut: Callable[..., list[int]] = cut_points,
) -> ChunkMap:
    """Cut an artifact and hash its pieces (the whole file is hashed in the same pass).

    Args:
        content: the whole artifact; pass an ``mmap`` for large files.
        artifact_format: ``gguf`` or anything else for cutting by content.
        what: name for error messages.
        cut: :func:`~slmops.artifact.fastcdc.cut_points`, or a faster one that gives the same.

    Raises:
        BaseModelError: the format is ``gguf`` and the file is not one.
    """
    import hashlib  # noqa: PLC0415 - the incremental form, for one pass over both digests

    if artifact_format == "gguf":
        sizes = list(_gguf_sizes(content, parse_gguf(content, what)))
    else:
        ends = cut(
            bytes(content[0 : len(content)]),
            min_bytes=256 << 10,
            average_bytes=1 << 20,
            max_bytes=MAX_CHUNK_BYTES,
        )
        sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    whole = hashlib.sha256()
    chunks: list[Chunk] = []
    at = 0
    for size in sizes:
        piece = bytes(content[at : at + size])
        whole.update(piece)
        chunks.append(Chunk(size, sha256_hex(piece)))
        at += size
    return ChunkMap(
        SCHEMA, artifact_format if artifact_format == "gguf" else "raw", at, whole.hexdigest(), tuple(chunks)
    )


def _gguf_sizes(content: Buffer, layout: GgufLayout) -> Iterator[int]:
    header_end = layout.tensors[0].offset if layout.tensors else len(content)
    header = bytes(content[0:header_end])
    begin = 0
    for end in cut_points(header, min_bytes=4 << 10, average_bytes=16 << 10, max_bytes=64 << 10):
        yield end - begin
        begin = end
    packed = 0
    for tensor in layout.tensors:
        if tensor.padded_bytes < SMALL_TENSOR_BYTES:
            if packed + tensor.padded_bytes > MAX_CHUNK_BYTES:
                yield packed
                packed = 0
            packed += tensor.padded_bytes
            continue
        if packed:
            yield packed
            packed = 0
        yield from _pieces(tensor)
    if packed:
        yield packed


def _pieces(tensor: Tensor) -> Iterator[int]:
    """Equal pieces of at most 4 MiB that end at whole blocks; the last one takes the padding.

    Padding beyond an alignment (a gap that some tool left) is cut into pieces of its own.
    """
    blocks = tensor.size_bytes // tensor.block_bytes
    pieces = -(-tensor.size_bytes // MAX_CHUNK_BYTES)
    largest = -(-blocks // pieces)
    if largest * tensor.block_bytes > MAX_CHUNK_BYTES:
        pieces += 1
    gap = tensor.padded_bytes - tensor.size_bytes
    padding = gap if gap < SMALL_TENSOR_BYTES else 0
    done = 0
    for index in range(pieces):
        upto = blocks * (index + 1) // pieces
        size = (upto - done) * tensor.block_bytes
        done = upto
        yield size + (padding if index == pieces - 1 else 0)
    for begin in range(padding, gap, MAX_CHUNK_BYTES):
        yield min(MAX_CHUNK_BYTES, gap - begin)

"""Chunk maps: the rules of the cut (ADR 0003) as properties."""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import LLAMA, TensorSpec, noise, write_gguf, write_header
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.artifact.chunkmap import (
    MAX_CHUNK_BYTES,
    SMALL_TENSOR_BYTES,
    Chunk,
    ChunkMap,
    decode_chunk_map,
    encode_chunk_map,
    make_chunk_map,
)
from slmops.artifact.gguf_layout import parse_gguf
from slmops.core.errors import BaseModelError, TrustError

MiB = 1 << 20


def wide(name: str, kind: str, rows: int, columns: int = 256, seed: str = "") -> TensorSpec:
    return TensorSpec(name, kind, (columns, rows), seed)


def ends(chunk_map: ChunkMap) -> list[int]:
    return [at + chunk.bytes for at, chunk in chunk_map.offsets()]


def check_whole(content: bytes, chunk_map: ChunkMap) -> None:
    """Sizes add up, digests are those of the pieces, and the map survives its own encoding."""
    assert chunk_map.artifact_bytes == len(content)
    assert chunk_map.artifact_sha256 == hashlib.sha256(content).hexdigest()
    assert ends(chunk_map)[-1:] == ([len(content)] if content else [])
    for at, chunk in chunk_map.offsets():
        assert chunk.sha256 == hashlib.sha256(content[at : at + chunk.bytes]).hexdigest()
    assert decode_chunk_map(encode_chunk_map(chunk_map)) == chunk_map


def check_cut(content: bytes, chunk_map: ChunkMap) -> None:
    """Every rule of the cut, looked up in the file's own layout."""
    layout = parse_gguf(content)
    cuts = set(ends(chunk_map)) | {0}
    assert layout.tensors[0].offset in cuts, "the header has chunks of its own"
    for before, tensor in zip((None, *layout.tensors), layout.tensors, strict=False):
        large = tensor.padded_bytes >= SMALL_TENSOR_BYTES
        if large or before is None or before.padded_bytes >= SMALL_TENSOR_BYTES:
            assert tensor.offset in cuts, f"{tensor.name} begins a chunk"
        inside = sorted(cut for cut in cuts if tensor.offset < cut < tensor.offset + tensor.padded_bytes)
        if not large:
            assert inside == [], f"{tensor.name} is small and stays whole"
        for cut in inside:
            assert (cut - tensor.offset) % tensor.block_bytes == 0, f"{tensor.name} is cut at whole blocks"
            assert cut <= tensor.offset + tensor.size_bytes - 1, "padding belongs to the piece before it"
        if large and inside:
            pieces = [
                b - a
                for a, b in zip(
                    [tensor.offset, *inside], [*inside, tensor.offset + tensor.size_bytes], strict=True
                )
            ]
            assert max(pieces) - min(pieces) <= tensor.block_bytes, "pieces are equal"
    assert max(chunk.bytes for chunk in chunk_map.chunks) <= MAX_CHUNK_BYTES + 64
    header_chunks = [chunk for at, chunk in chunk_map.offsets() if at < layout.tensors[0].offset]
    assert all(chunk.bytes <= 64 << 10 for chunk in header_chunks)


TENSOR = st.builds(
    wide,
    name=st.uuids(version=4).map(str),
    kind=st.sampled_from(["F32", "Q4_1", "Q8_0", "Q4_K", "F16"]),
    rows=st.one_of(st.integers(1, 40), st.sampled_from([64, 448, 1000, 5000, 17_000])),
)


@settings(max_examples=40)
@given(tensors=st.lists(TENSOR, min_size=1, max_size=8, unique_by=lambda t: t.name), padded=st.booleans())
def test_the_cut_keeps_its_rules(tensors: list[TensorSpec], padded: bool) -> None:
    content = write_gguf(LLAMA, tensors, pad_last=padded)
    chunk_map = make_chunk_map(content, "gguf")
    check_whole(content, chunk_map)
    check_cut(content, chunk_map)


@pytest.mark.parametrize("rows", [4096, 4097, 8192, 12_289])
def test_pieces_at_the_limit(rows: int) -> None:
    """4096 rows of F32 are exactly 4 MiB: one piece; one row more makes two equal ones."""
    content = write_gguf(LLAMA, [wide("t", "F32", rows)])
    chunk_map = make_chunk_map(content, "gguf")
    check_cut(content, chunk_map)
    pieces = [chunk.bytes for at, chunk in chunk_map.offsets() if at >= parse_gguf(content).tensors_start]
    assert len(pieces) == -(-rows // 4096)


def test_blocks_that_do_not_divide_the_limit_still_stay_below_it() -> None:
    """Q8_0 blocks have 34 bytes; two equal pieces of a little less than 8 MiB would each be over 4 MiB."""
    rows = 2 * MAX_CHUNK_BYTES // 34
    content = write_gguf(LLAMA, [wide("t", "Q8_0", rows, columns=32)], pad_last=False)
    chunk_map = make_chunk_map(content, "gguf")
    check_cut(content, chunk_map)
    start = parse_gguf(content).tensors_start
    assert [chunk.bytes for at, chunk in chunk_map.offsets() if at >= start] == [rows // 3 * 34] * 3


def test_many_small_tensors_are_packed_up_to_the_limit() -> None:
    """200 tensors of 48 KiB make three chunks, not two hundred."""
    tensors = [wide(f"t{n}", "F32", 48) for n in range(200)]
    content = write_gguf(LLAMA, tensors)
    chunk_map = make_chunk_map(content, "gguf")
    check_cut(content, chunk_map)
    packed = [chunk.bytes for at, chunk in chunk_map.offsets() if at >= parse_gguf(content).tensors_start]
    assert len(packed) == 3
    assert packed[0] == MAX_CHUNK_BYTES // (48 << 10) * (48 << 10)


def chunks_changed(before: bytes, after: bytes) -> list[int]:
    """Offsets, in the new file, of chunks that a device with the old file does not have."""
    have = {chunk.sha256 for chunk in make_chunk_map(before, "gguf").chunks}
    return [at for at, chunk in make_chunk_map(after, "gguf").offsets() if chunk.sha256 not in have]


FILE = [
    wide("a", "Q4_1", 2000),
    wide("b", "F32", 9000),
    wide("n1", "F32", 1),
    wide("n2", "F32", 1),
    wide("c", "Q8_0", 700),
]


@pytest.mark.parametrize("changed", ["a", "b", "c"])
def test_a_changed_tensor_changes_only_its_own_chunks(changed: str) -> None:
    before = write_gguf(LLAMA, FILE)
    after = write_gguf(LLAMA, [replace(t, seed="new") if t.name == changed else t for t in FILE])
    place = next(t for t in parse_gguf(after).tensors if t.name == changed)
    moved = chunks_changed(before, after)
    assert moved
    assert all(place.offset <= at < place.offset + place.padded_bytes for at in moved)


def test_one_changed_block_changes_one_chunk() -> None:
    before = write_gguf(LLAMA, FILE)
    after = bytearray(before)
    place = next(t for t in parse_gguf(before).tensors if t.name == "b")
    after[place.offset + 5 * MiB] ^= 1
    assert len(chunks_changed(before, bytes(after))) == 1


def test_a_changed_template_changes_only_header_chunks() -> None:
    """Even when the header grows and every tensor moves: a prompt costs kilobytes."""
    words = [noise(f"word-{n}", 4).hex() for n in range(20_000)]
    metadata: dict[str, object] = {**LLAMA, "tokenizer.ggml.tokens": _strings(words)}
    before = write_gguf(metadata, FILE)
    after = write_gguf({**metadata, "tokenizer.chat_template": "{{ another, longer template }}" * 20}, FILE)
    start = parse_gguf(after).tensors_start
    assert start != parse_gguf(before).tensors_start
    moved = chunks_changed(before, after)
    assert moved
    assert all(at < start for at in moved)
    sizes = dict(make_chunk_map(after, "gguf").offsets())
    assert sum(sizes[at].bytes for at in moved) <= 3 * (64 << 10)
    assert start > 300 << 10


def _strings(words: list[str]) -> object:
    from gguf_files import Array

    return Array("str", words)


def test_variants_share_the_tensors_that_they_have_in_common() -> None:
    small = write_gguf(LLAMA, FILE)
    other = write_gguf(LLAMA, [wide("b", "Q4_K", 9000) if t.name == "b" else t for t in FILE])
    ours = {chunk.sha256 for chunk in make_chunk_map(small, "gguf").chunks}
    shared = sum(chunk.bytes for chunk in make_chunk_map(other, "gguf").chunks if chunk.sha256 in ours)
    expected = sum(t.padded_bytes for t in parse_gguf(small).tensors if t.name in ("a", "c"))
    assert shared >= expected


def test_a_gap_behind_a_tensor_is_cut_by_itself() -> None:
    """Trailing bytes that some tool left are kept, in pieces of at most 4 MiB, and not in an oversized chunk."""
    content = write_gguf(LLAMA, FILE) + bytes(9 * MiB)
    chunk_map = make_chunk_map(content, "gguf")
    check_whole(content, chunk_map)
    assert max(chunk.bytes for chunk in chunk_map.chunks) <= MAX_CHUNK_BYTES


def test_a_gguf_without_tensors_is_all_header() -> None:
    content = write_header(LLAMA, ())
    check_whole(content, make_chunk_map(content, "gguf"))


@pytest.mark.parametrize("size", [0, 1, 300 << 10, 6 * MiB])
def test_other_formats_are_cut_by_content(size: int) -> None:
    content = noise("raw", size)
    chunk_map = make_chunk_map(content, "safetensors")
    assert chunk_map.format == "raw"
    check_whole(content, chunk_map)
    if size > MAX_CHUNK_BYTES:
        assert len(chunk_map.chunks) > 1


def test_a_file_that_is_no_gguf_is_refused_by_name() -> None:
    with pytest.raises(BaseModelError, match=r"^model.gguf: not a GGUF"):
        make_chunk_map(b"nonsense", "gguf", "model.gguf")


def test_an_mmap_will_do(tmp_path: Path) -> None:
    content = write_gguf(LLAMA, FILE)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with path.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert make_chunk_map(mapped, "gguf") == make_chunk_map(content, "gguf")


@pytest.mark.model
def test_the_real_model_keeps_the_rules(small_model: Path) -> None:
    content = small_model.read_bytes()
    chunk_map = make_chunk_map(content, "gguf")
    check_whole(content, chunk_map)
    check_cut(content, chunk_map)


# ---- reading maps from strangers -------------------------------------------------------------------------------

GOOD = ChunkMap(1, "gguf", 30, "a" * 64, (Chunk(10, "b" * 64), Chunk(20, "c" * 64)))


def altered(**fields: object) -> bytes:
    return json.dumps({**json.loads(encode_chunk_map(GOOD)), **fields}).encode()


def one_chunk(**fields: object) -> bytes:
    return altered(chunks=[{"bytes": 30, "sha256": "b" * 64, **fields}])


def test_a_map_is_read_back_and_unknown_fields_are_ignored() -> None:
    assert decode_chunk_map(encode_chunk_map(GOOD)) == GOOD
    assert decode_chunk_map(altered(future="yes")) == GOOD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "malformed"),
        (b"[]", "malformed"),
        (b"\xff", "malformed"),
        (b'{"future":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "malformed"),
        (altered(schema=2), "schema 2, 1 can be read"),
        (altered(schema="1"), "malformed"),
        (altered(artifact_bytes=31), "does not add up: 30 bytes in chunks, 31 in the artifact"),
        (altered(artifact_sha256="A" * 64), "does not add up"),
        (altered(artifact_sha256="a" * 64 + "\n"), "does not add up"),
        (one_chunk(sha256="../../etc/passwd"), "1 bad chunks"),
        (one_chunk(sha256="b" * 64 + "\n"), "1 bad chunks"),
        (
            altered(chunks=[{"bytes": 40, "sha256": "b" * 64}, {"bytes": -10, "sha256": "b" * 64}]),
            "1 bad chunks",
        ),
        (
            altered(chunks=[{"bytes": 0, "sha256": "b" * 64}, {"bytes": 30, "sha256": "b" * 64}]),
            "1 bad chunks",
        ),
        (one_chunk(bytes=1 << 70), "1 bad chunks"),
        (altered(artifact_bytes=1 << 40, chunks=[{"bytes": 1 << 40, "sha256": "b" * 64}]), "1 bad chunks"),
        (one_chunk(bytes=30.5), "malformed"),
        (altered(chunks=None), "malformed"),
    ],
)
def test_a_hostile_map_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(TrustError, match=message) as caught:
        decode_chunk_map(content)
    assert caught.value.hint

"""Reading GGUF headers: hand-made files in, exact places out, and one kind of error for everything damaged."""

from __future__ import annotations

import contextlib
import struct
from io import BytesIO
from pathlib import Path

import gguf
import pytest
from gguf_files import LLAMA, TENSORS, Array, TensorSpec, Typed, aligned, text, write_gguf, write_header
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.artifact.chunkmap import make_chunk_map
from slmops.artifact.gguf_layout import GGML_TYPES, TYPE_IDS, GgufLayout, parse_gguf
from slmops.core.errors import BaseModelError

SMALL = write_gguf()


def test_every_tensor_is_where_the_writer_put_it() -> None:
    layout = parse_gguf(SMALL)
    assert (layout.version, layout.size_bytes) == (3, len(SMALL))
    assert layout.tensors_start == len(write_header(LLAMA, TENSORS))
    for tensor, spec in zip(layout.tensors, TENSORS, strict=True):
        assert (tensor.name, tensor.type_name, tensor.shape) == (spec.name, spec.kind, spec.shape)
        assert SMALL[tensor.offset : tensor.offset + tensor.size_bytes] == spec.data()
        assert tensor.padded_bytes == aligned(tensor.size_bytes, 32)
    assert sum(tensor.padded_bytes for tensor in layout.tensors) == len(SMALL) - layout.tensors_start


def test_the_models_shape() -> None:
    shape = parse_gguf(SMALL).shape()
    assert (shape.layers, shape.hidden, shape.ffn, shape.vocabulary) == (2, 64, 128, 100)
    assert (shape.k_width, shape.v_width, shape.context_max_tokens) == (32, 32, 256)
    assert shape.parameters == 6400 + 64 + 8192 + 3
    assert shape.weights_bytes == 6400 // 32 * 34 + 256 + 8192 // 32 * 20 + 6


def test_values_of_every_kind() -> None:
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        **{
            f"x.{kind}": Typed(kind, 1)
            for kind in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "bool")
        },
        "x.f32": Typed("f32", 0.5),
        "x.f64": Typed("f64", 0.25),
        "x.few": Array("i32", [1, 2, 3]),
        "x.many": Array("f32", [0.0] * 1025),
        "x.words": Array("str", ["a", "b"]),
        "x.nested": Array("array", [Array("u8", [1]), Array("u8", [2, 3])]),
        "x.many_nested": Array("array", [Array("u8", [1])] * 1025),
    }
    layout = parse_gguf(write_gguf(metadata))
    assert layout.metadata["x.few"] == [1, 2, 3]
    assert layout.metadata["x.many"] == layout.array_lengths["x.many"] == 1025
    assert layout.metadata["x.many_nested"] == 1025
    assert layout.metadata["x.words"] == ["a", "b"]
    assert layout.metadata["x.nested"] == [[1], [2, 3]]
    assert (layout.metadata["x.f32"], layout.metadata["x.f64"], layout.metadata["x.bool"]) == (
        0.5,
        0.25,
        True,
    )
    assert layout.architecture == "llama"


@pytest.mark.parametrize(("version", "alignment"), [(2, 32), (3, 64), (3, 8)])
def test_versions_and_alignments(version: int, alignment: int) -> None:
    metadata = {**LLAMA, "general.alignment": Typed("u32", alignment)}
    content = write_gguf(metadata, version=version, alignment=alignment)
    layout = parse_gguf(content)
    assert layout.tensors_start % alignment == 0
    assert all(tensor.offset % alignment == 0 for tensor in layout.tensors)


def test_a_file_may_end_without_padding() -> None:
    content = write_gguf(pad_last=False)
    last = parse_gguf(content).tensors[-1]
    assert last.offset + last.padded_bytes == last.offset + last.size_bytes == len(content)


def test_a_file_without_tensors_is_all_header() -> None:
    layout = parse_gguf(write_gguf(tensors=()))
    assert layout.tensors == ()
    assert layout.tensors_start == layout.size_bytes


def test_every_type_has_the_size_that_llama_cpp_gives_it() -> None:
    """Our table against the reference package's."""
    known = {kind.value: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    for type_id, (name, elements, block) in GGML_TYPES.items():
        assert known[type_id] == (elements, block), name
        assert gguf.GGMLQuantizationType(type_id).name == name
    assert len(TYPE_IDS) == len(GGML_TYPES)


def test_the_reference_reader_agrees(tmp_path: Path) -> None:
    """The files of our writer are GGUF for llama.cpp's own package, too, and say the same."""
    path = tmp_path / "small.gguf"
    path.write_bytes(SMALL)
    reader = gguf.GGUFReader(path)
    ours = {tensor.name: (tensor.offset, tensor.size_bytes) for tensor in parse_gguf(SMALL).tensors}
    assert {t.name: (t.data_offset, t.n_bytes) for t in reader.tensors} == ours
    del reader


@pytest.mark.model
def test_the_real_model(small_model: Path) -> None:
    content = small_model.read_bytes()
    layout = parse_gguf(content, small_model.name)
    assert len(layout.tensors) == 272
    shape = layout.shape()
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.k_width) == (30, 576, 49_152, 192)
    assert shape.parameters == 134_515_008
    chunk_map = make_chunk_map(content, "gguf")
    assert chunk_map.artifact_bytes == len(content)


# ---- damage ----------------------------------------------------------------------------------------------------


def test_truncation_at_every_byte_of_the_header_is_one_clear_error() -> None:
    """Never another exception, never a layout."""
    header = len(write_header(LLAMA, TENSORS))
    for size in range(header + 1):
        with pytest.raises(BaseModelError) as caught:
            parse_gguf(SMALL[:size], "cut.gguf")
        assert caught.value.message.startswith("cut.gguf: ")
        assert caught.value.hint


def test_truncation_in_the_tensors_names_the_tensor() -> None:
    last_needed = len(write_gguf(pad_last=False))
    with pytest.raises(BaseModelError, match=r"tensor 'blk.1.odd.weight' ends at byte"):
        parse_gguf(SMALL[: last_needed - 1])
    header = len(write_header(LLAMA, TENSORS))
    with pytest.raises(
        BaseModelError, match=rf"the next thing begins at {header + 1} \(file has {header + 1}\)"
    ):
        parse_gguf(SMALL[: header + 1])


def patched(at: bytes, replacement: bytes) -> bytes:
    """The small file with the bytes after a marker replaced."""
    place = SMALL.index(at) + len(at)
    return SMALL[:place] + replacement + SMALL[place + len(replacement) :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file: starts with b''"),
        (b"PK\x03\x04" + b"\0" * 100, "not a GGUF file: starts with b'PK"),
        (b"FUGG" + b"\0" * 100, "not a GGUF file"),
        (SMALL[:4] + struct.pack("<I", 1) + SMALL[8:], "GGUF version 1, 2 or 3 can be read"),
        (SMALL[:4] + struct.pack(">I", 3) + SMALL[8:], "GGUF version 50331648"),
        (SMALL[:8] + struct.pack("<Q", 1 << 60) + SMALL[16:], "claims 1152921504606846976 tensors"),
        (SMALL[:16] + struct.pack("<Q", 1 << 60) + SMALL[24:], "1152921504606846976 metadata pairs"),
        (patched(b"general.architecture", struct.pack("<I", 13)), "metadata value type 13 is unknown"),
        (patched(b"general.architecture", struct.pack("<IQ", 8, 1 << 63)), "truncated GGUF"),
        (patched(b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 4, 1 << 62)), "truncated GGUF"),
        (patched(b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 77, 1 << 62)), "type 77 is unknown"),
        (patched(b"blk.0.ffn_up.weight", struct.pack("<I", 0)), "has 0 dimensions"),
        (patched(b"blk.0.ffn_up.weight", struct.pack("<I", 5)), "has 5 dimensions"),
        (patched(b"blk.0.ffn_up.weight", struct.pack("<IQ", 2, 0)), "rows must be multiples"),
        (patched(b"blk.0.ffn_up.weight", struct.pack("<IQ", 2, 63)), "rows must be multiples of Q4_1's 32"),
        (patched(b"blk.0.ffn_up.weight", struct.pack("<IQQ", 2, 64, 1 << 62)), "truncated GGUF, tensor"),
        (
            patched(b"blk.0.ffn_up.weight", struct.pack("<IQQI", 2, 64, 128, 4)),
            "has type 4, which is unknown",
        ),
        (
            patched(b"blk.0.ffn_up.weight", struct.pack("<IQQIQ", 2, 64, 128, 3, 0)),
            "the next thing begins at",
        ),
        (write_gguf({**LLAMA, "general.alignment": Typed("u32", 0)}), "general.alignment is 0"),
        (write_gguf({**LLAMA, "general.alignment": "wide"}), "general.alignment is 'wide'"),
    ],
)
def test_damage_is_named(content: bytes, message: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        parse_gguf(content)
    assert message in caught.value.message
    assert caught.value.hint


def test_arrays_nested_like_a_bomb_are_refused() -> None:
    """Each level costs twelve bytes: without a limit a small file would exhaust the stack."""
    bomb = struct.pack("<IQ", 9, 1) * 5000
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + struct.pack("<I", 9) + bomb
    with pytest.raises(BaseModelError, match="type 9 is unknown"):
        parse_gguf(header)


@pytest.mark.parametrize(
    ("metadata", "missing"),
    [
        ({}, r"no \?\.attention\.head_count"),
        ({"general.architecture": "llama"}, r"no llama\.attention\.head_count"),
        ({**LLAMA, "llama.block_count": "two"}, r"no llama\.block_count"),
        ({**LLAMA, "llama.block_count": Array("str", ["two"])}, r"no llama\.block_count"),
        ({**LLAMA, "llama.block_count": Array("u32", [])}, r"no llama\.block_count"),
        ({**LLAMA, "llama.block_count": Array("u32", [7] * 1025)}, r"no llama\.block_count"),
        ({**LLAMA, "llama.attention.head_count": Typed("u32", 0)}, r"no llama\.attention\.head_count"),
    ],
)
def test_a_file_that_is_no_language_model_says_what_is_missing(
    metadata: dict[str, object], missing: str
) -> None:
    with pytest.raises(BaseModelError, match=missing):
        parse_gguf(write_gguf(metadata)).shape()


def test_numbers_by_layer_count_with_their_largest() -> None:
    """Some architectures give KV heads for each layer; memory must hold the largest."""
    metadata = {**LLAMA, "llama.attention.head_count_kv": Array("u32", [1, 4, 2] * 30)}
    assert parse_gguf(write_gguf(metadata)).shape().k_width == 4 * 16


def test_the_vocabulary_may_be_given_as_a_number() -> None:
    metadata = {key: value for key, value in LLAMA.items() if key != "tokenizer.ggml.tokens"}
    assert parse_gguf(write_gguf({**metadata, "llama.vocab_size": Typed("u32", 77)})).shape().vocabulary == 77


@settings(max_examples=600)
@given(data=st.data())
def test_mutations_never_raise_anything_else(data: st.DataObject) -> None:
    """Flipped, cut, inserted and repeated bytes: a sound layout or a BaseModelError."""
    content = bytearray(SMALL)
    header = len(write_header(LLAMA, TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        kind = data.draw(st.sampled_from(["set", "word", "cut", "insert"]))
        if kind == "set":
            content[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
        elif kind == "word":
            content[at : at + 8] = struct.pack(
                "<Q", data.draw(st.sampled_from([0, 1, 9, 65, 1 << 31, 1 << 63, 2**64 - 1]))
            )
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 64))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    try:
        layout = parse_gguf(bytes(content))
    except BaseModelError:
        return
    check(layout, bytes(content))


def check(layout: GgufLayout, content: bytes) -> None:
    """What is accepted is usable: tensors lie in the file, in order, and can be cut into chunks."""
    end = 0
    for tensor in layout.tensors:
        assert end <= tensor.offset <= tensor.offset + tensor.size_bytes <= len(content)
        assert 0 < tensor.size_bytes <= tensor.padded_bytes
        end = tensor.offset + tensor.padded_bytes
    assert make_chunk_map(content, "gguf").artifact_bytes == len(content)
    with contextlib.suppress(BaseModelError):
        layout.shape()


def test_any_buffer_will_do() -> None:
    assert parse_gguf(memoryview(SMALL)) == parse_gguf(BytesIO(SMALL).getbuffer()) == parse_gguf(SMALL)
    # tensors are found by their offsets, whatever their order in the header
    one, two = TensorSpec("one", "F32", (8,)), TensorSpec("two", "F32", (8,))
    swapped = bytearray(write_gguf(LLAMA, (one, two)))
    a, b = swapped.index(b"\x03\0\0\0\0\0\0\0one"), swapped.index(b"\x03\0\0\0\0\0\0\0two")
    swapped[a:b], swapped[b : 2 * b - a] = swapped[b : 2 * b - a], swapped[a:b]
    assert [tensor.name for tensor in parse_gguf(bytes(swapped)).tensors] == ["one", "two"]

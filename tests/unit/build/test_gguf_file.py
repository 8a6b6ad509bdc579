"""GGUF files that we write: readable by others, the same bytes every time, small tensors together in front."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from tests.support.tiny_model import CHATML, make_tiny_gguf

from slmops.artifact.chunkmap import make_chunk_map
from slmops.build.gguf_file import NewTensor, file_bytes, in_file_order, open_gguf, write_gguf
from slmops.core.errors import BaseModelError, BuildError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny_gguf(tmp_path / "source.gguf", seed=3)


def copy(source: Path, target: Path, replace: dict[str, int | None]) -> Path:
    """Write all tensors of a file into another, in a scrambled order."""
    with open_gguf(source) as model:
        tensors = [
            NewTensor(t.name, t.type_name, t.shape, lambda t=t: bytes(model.blob(t)))
            for t in reversed(model.layout.tensors)
        ]
        write_gguf(target, model, tensors, replace=replace)
        assert file_bytes(model, tensors, replace) == target.stat().st_size
    return target


def test_another_reader_finds_everything(source: Path, tmp_path: Path) -> None:
    """Tokenizer, template and licence carry on; tensors are equal; the replaced key is replaced."""
    written = GGUFReader(copy(source, tmp_path / "copy.gguf", {"general.file_type": 7}))
    original = GGUFReader(source)
    for key in ("tokenizer.chat_template", "general.license", "tokenizer.ggml.tokens", "llama.block_count"):
        assert written.fields[key].contents() == original.fields[key].contents()
    assert written.fields["tokenizer.chat_template"].contents() == CHATML
    assert written.fields["general.file_type"].contents() == 7
    theirs = {tensor.name: tensor for tensor in original.tensors}
    assert {tensor.name for tensor in written.tensors} == set(theirs)
    for tensor in written.tensors:
        assert np.array_equal(tensor.data, theirs[tensor.name].data)


def test_the_same_tensors_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """The order in which they are given does not matter, and a dropped key is gone."""
    first = copy(source, tmp_path / "1.gguf", {"general.file_type": 1})
    again = copy(first, tmp_path / "2.gguf", {"general.file_type": 1})
    assert first.read_bytes() == again.read_bytes()
    with open_gguf(copy(first, tmp_path / "3.gguf", {"general.file_type": None})) as dropped:
        assert "general.file_type" not in dropped.layout.metadata


def test_small_float_tensors_share_a_chunk(source: Path, tmp_path: Path) -> None:
    """Norms come first, then layers in the order of their numbers."""
    names = [
        "blk.10.attn_q.weight",
        "blk.2.attn_q.weight",
        "output_norm.weight",
        "blk.10.attn_norm.weight",
        "blk.2.attn_norm.weight",
    ]
    tensors = [
        NewTensor(n, "F32" if "norm" in n else "Q4_0", (64, 1) if "norm" in n else (64, 64), lambda: b"")
        for n in names
    ]
    assert [t.name for t in in_file_order(tensors)] == [
        "blk.2.attn_norm.weight", "blk.10.attn_norm.weight", "output_norm.weight", "blk.2.attn_q.weight", "blk.10.attn_q.weight"
    ]  # fmt: skip
    with open_gguf(copy(source, tmp_path / "copy.gguf", {})) as written:
        chunks = make_chunk_map(written.content, "gguf").chunks
        assert sum(chunk.bytes for chunk in chunks) == len(written.content)


def test_a_tensor_of_the_wrong_size_is_refused(source: Path, tmp_path: Path) -> None:
    """A quantiser that gives other bytes than its type needs must not shift every tensor after it."""
    with open_gguf(source) as model, pytest.raises(BuildError, match="expected 36 bytes of Q4_0, got 3"):
        write_gguf(
            tmp_path / "x.gguf", model, [NewTensor("a.weight", "Q4_0", (32, 2), lambda: b"abc")], replace={}
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 not a model", "not a GGUF"),
        (None, "cannot be read"),
        ("half", "truncated"),
    ],
    ids=["empty", "zip", "missing", "half"],
)
def test_what_is_no_model_is_named(
    source: Path, tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    """With what it starts with, or where it ends."""
    path = tmp_path / "bad.gguf"
    if content == "half":
        path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(BaseModelError, match=message), open_gguf(path):
        pass

"""A safetensors header is believed only when it describes exactly the file's bytes."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.hf_directory import safetensors

from slmops.artifact.safetensors_layout import parse_safetensors
from slmops.core.errors import BaseModelError

GOOD = safetensors({"a": np.arange(6).reshape(2, 3), "b": np.arange(4)}, "F32")


def file_of(header: object, content: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def test_tensors_have_their_places() -> None:
    a, b = parse_safetensors(GOOD, "x")
    assert (a.name, a.dtype, a.shape, a.size_bytes) == ("a", "F32", (2, 3), 24)
    assert np.frombuffer(GOOD[b.offset : b.offset + b.size_bytes], "<f4").tolist() == [0, 1, 2, 3]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated safetensors"),
        (b"PK\x03\x04" + b"\0" * 60, "not a safetensors file"),
        (GOOD[:40], "truncated safetensors, the header ends"),
        (GOOD[:-1], "truncated safetensors, its tensors end"),
        (GOOD + b"\0", "1 bytes follow the last tensor"),
        (file_of(b"{nonsense"), "header cannot be read"),
        (file_of({"a": ENTRY | {"dtype": "Q4"}}, b"\0" * 8), "dtype 'Q4'"),
        (file_of({"a": ENTRY | {"shape": [3]}}, b"\0" * 8), "needs 12 bytes, its range 0..8 has 8"),
        (file_of({"a": ENTRY | {"shape": [-2], "data_offsets": [8, 0]}}, b"\0" * 8), "range 8..0"),
        (file_of({"a": ENTRY, "b": ENTRY}, b"\0" * 8), "overlap or hole"),
        (file_of({"a": ENTRY | {"data_offsets": [8, 16]}}, b"\0" * 16), "overlap or hole"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
    ],
)
def test_what_is_refused(content: bytes, message: str) -> None:
    """Each with the file's name and what is wrong; nothing reads beyond the file."""
    with pytest.raises(BaseModelError, match=message) as caught:
        parse_safetensors(content, "model.safetensors")
    assert caught.value.message.startswith("model.safetensors: ")


@given(st.binary(max_size=64), st.integers(0, len(GOOD)))
def test_noise_is_refused_or_read(noise: bytes, at: int) -> None:
    """Whatever lies in the file, the answer is tensors inside it or our error."""
    content = GOOD[:at] + noise + GOOD[at + len(noise) :]
    try:
        tensors = parse_safetensors(content, "x")
    except BaseModelError:
        return
    assert all(t.offset >= 0 and t.offset + t.size_bytes <= len(content) for t in tensors)

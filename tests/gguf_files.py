"""A tiny GGUF writer for tests, written from the specification and not from our reader."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

#: ggml type -> (id, elements per block, bytes per block), as in ggml.h
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_1": (3, 32, 20), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144)}
STRING, ARRAY = 8, 9
SCALARS = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
    "f64": (12, "<d"),
}


@dataclass(frozen=True)
class Array:
    """A typed array value: ``kind`` is a key of :data:`SCALARS`, ``str`` or ``array``."""

    kind: str
    values: Sequence[object]


@dataclass(frozen=True)
class Typed:
    """A scalar of a given kind."""

    kind: str
    value: float


@dataclass(frozen=True)
class TensorSpec:
    """One tensor; its bytes are made from ``seed`` unless they are given."""

    name: str
    kind: str
    shape: tuple[int, ...]
    seed: str = ""
    content: bytes | None = None

    def data(self) -> bytes:
        _, elements, block = TYPES[self.kind]
        count = 1
        for extent in self.shape:
            count *= extent
        size = count // elements * block
        return noise(self.seed or self.name, size) if self.content is None else self.content


#: just enough for ``GgufLayout.shape()``
LLAMA: dict[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": Typed("u32", 2),
    "llama.embedding_length": Typed("u32", 64),
    "llama.feed_forward_length": Typed("u32", 128),
    "llama.attention.head_count": Typed("u32", 4),
    "llama.attention.head_count_kv": Typed("u32", 2),
    "llama.context_length": Typed("u32", 256),
    "tokenizer.ggml.tokens": Array("str", [f"token-{n}" for n in range(100)]),
    "tokenizer.chat_template": "{{ messages }}",
}
TENSORS = (
    TensorSpec("token_embd.weight", "Q8_0", (64, 100)),
    TensorSpec("blk.0.attn_norm.weight", "F32", (64,)),
    TensorSpec("blk.0.ffn_up.weight", "Q4_1", (64, 128)),
    TensorSpec("blk.1.odd.weight", "F16", (3, 1)),
)


def noise(seed: str, size: int) -> bytes:
    """Repeatable bytes without structure."""
    return hashlib.shake_256(seed.encode()).digest(size)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def plain(value: object) -> tuple[int, bytes]:
    """A value's type id and bytes."""
    if isinstance(value, str):
        return STRING, text(value)
    if isinstance(value, Typed):
        kind, code = SCALARS[value.kind]
        return kind, struct.pack(code, value.value)
    assert isinstance(value, Array)
    if value.kind == "str":
        return ARRAY, struct.pack("<IQ", STRING, len(value.values)) + b"".join(
            text(str(v)) for v in value.values
        )
    if value.kind == "array":
        return ARRAY, struct.pack("<IQ", ARRAY, len(value.values)) + b"".join(
            plain(v)[1] for v in value.values
        )
    kind, code = SCALARS[value.kind]
    return ARRAY, struct.pack("<IQ", kind, len(value.values)) + b"".join(
        struct.pack(code, v) for v in value.values
    )


def write_header(
    metadata: dict[str, object], tensors: Sequence[TensorSpec], *, version: int = 3, alignment: int = 32
) -> bytes:
    """Everything before the first tensor, padding included."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, content = plain(value)
        header += text(key) + struct.pack("<I", kind) + content
    offset = 0
    for tensor in tensors:
        header += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += b"".join(struct.pack("<Q", extent) for extent in tensor.shape)
        header += struct.pack("<IQ", TYPES[tensor.kind][0], offset)
        offset += aligned(len(tensor.data()), alignment)
    return header.ljust(aligned(len(header), alignment), b"\0")


def write_gguf(
    metadata: dict[str, object] | None = None,
    tensors: Sequence[TensorSpec] = TENSORS,
    *,
    version: int = 3,
    alignment: int = 32,
    pad_last: bool = True,
) -> bytes:
    """A whole file."""
    metadata = LLAMA if metadata is None else metadata
    content = write_header(metadata, tensors, version=version, alignment=alignment)
    for index, tensor in enumerate(tensors):
        data = tensor.data()
        last = index == len(tensors) - 1
        content += data if last and not pad_last else data.ljust(aligned(len(data), alignment), b"\0")
    return content


def aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

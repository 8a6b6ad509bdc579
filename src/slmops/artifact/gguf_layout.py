"""Where things lie in a GGUF file: metadata, tensors and their byte ranges.

Pure Python; reads any buffer (an ``mmap``).

Source: the GGUF specification, version 3 (ggml repository, docs/gguf.md); version 2 has the same layout.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Protocol

from slmops.core.device.fit import ModelShape
from slmops.core.errors import BaseModelError

#: ggml type id -> (name, elements per block, bytes per block)
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
TYPE_IDS: dict[str, int] = {name: type_id for type_id, (name, _, _) in GGML_TYPES.items()}

#: metadata value type to its struct format
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_TENSORS = 1 << 20
#: arrays up to this length are kept: one number for each layer fits, a vocabulary does not
_KEPT_ELEMENTS = 1024
#: arrays inside arrays; nobody writes more than one level
_MAX_ARRAY_DEPTH = 4

Value = bool | int | float | str | list["Value"]


class Buffer(Protocol):
    """Random access to a file's bytes: ``bytes``, ``memoryview`` or ``mmap``."""

    def __len__(self) -> int:
        """Bytes."""
        ...

    def __getitem__(self, key: slice, /) -> bytes | memoryview | bytearray:
        """A range of bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's name, shape and place.

    Attributes:
        shape: GGUF order, the contiguous dimension first: (columns, rows, ...).
        offset: from the start of the file, bytes.
        padded_bytes: bytes to the next tensor or the end of the file; padding belongs to the tensor before
            it.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    padded_bytes: int

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def block_bytes(self) -> int:
        """Bytes of one quantisation block."""
        return GGML_TYPES[TYPE_IDS[self.type_name]][2]


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """A parsed header.

    Attributes:
        metadata: key to value; arrays longer than 1024 elements are kept as their length only (an int).
        array_lengths: length of every array.
        tensors: by offset.
        tensors_start: where the header (with its padding) ends, bytes.
        size_bytes: of the file.
    """

    version: int
    metadata: dict[str, Value]
    array_lengths: dict[str, int]
    tensors: tuple[Tensor, ...]
    tensors_start: int
    size_bytes: int

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str, default: int | None = None) -> int:
        """An integer of the architecture's section, such as ``block_count``.

        Raises:
            BaseModelError: the key is missing and there is no default, or it is no positive number.
        """
        name = f"{self.architecture}.{key}"
        value: Value | None = self.metadata.get(name, default)
        if name in self.array_lengths:  # one number for each layer: memory must hold the largest
            layers = value if isinstance(value, list) else []
            value = max((v for v in layers if isinstance(v, int)), default=None)
        if not isinstance(value, int) or value <= 0:
            raise BaseModelError(
                f"GGUF metadata has no {self.architecture or '?'}.{key}",
                hint="use a complete llama.cpp GGUF, not an adapter or a vocabulary file",
            )
        return value

    def shape(self) -> ModelShape:
        """What of this model decides memory and speed."""
        heads = self.number("attention.head_count")
        kv_heads = self.number("attention.head_count_kv", heads)
        hidden = self.number("embedding_length")
        vocabulary = self.array_lengths.get("tokenizer.ggml.tokens") or self.number("vocab_size")
        return ModelShape(
            weights_bytes=sum(tensor.size_bytes for tensor in self.tensors),
            parameters=sum(tensor.elements for tensor in self.tensors),
            layers=self.number("block_count"),
            k_width=kv_heads * self.number("attention.key_length", hidden // heads),
            v_width=kv_heads * self.number("attention.value_length", hidden // heads),
            hidden=hidden,
            ffn=self.number("feed_forward_length"),
            vocabulary=vocabulary,
            context_max_tokens=self.number("context_length"),
        )


class _Cursor:
    """Reads little-endian values and refuses to run past the end."""

    def __init__(self, buffer: Buffer, what: str) -> None:
        self.buffer = buffer
        self.what = what
        self.at = 0

    def take(self, count: int, *, keep: bool = True) -> bytes:
        end = self.at + count
        if end > len(self.buffer):
            raise BaseModelError(
                f"{self.what}: truncated GGUF, header needs byte {end}, the file has {len(self.buffer)}",
                hint="the download was cut off: fetch the file again and compare its SHA-256",
            )
        chunk = bytes(self.buffer[self.at : end]) if keep else b""
        self.at = end
        return chunk

    def scalar(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def u32(self) -> int:
        return int(self.scalar("<I"))

    def u64(self) -> int:
        return int(self.scalar("<Q"))

    def string(self) -> str:
        return self.take(self.u64()).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> tuple[Value, int | None]:
        """A metadata value, and its length when it is an array."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind]), None
        if kind == _STRING:
            return self.string(), None
        if kind != _ARRAY or depth == _MAX_ARRAY_DEPTH:
            raise BaseModelError(
                f"{self.what}: metadata value type {kind} is unknown",
                hint="the file is damaged or newer than GGUF 3",
            )
        element, count = self.u32(), self.u64()
        if count <= _KEPT_ELEMENTS:
            return [self.value(element, depth + 1)[0] for _ in range(count)], count
        if element in SCALARS:
            self.take(count * struct.calcsize(SCALARS[element]), keep=False)
        else:
            for _ in range(count):
                self.value(element, depth + 1)
        return count, count


def parse_gguf(buffer: Buffer, what: str = "model") -> GgufLayout:
    """Read the header of a GGUF file.

    Args:
        buffer: the whole file (an ``mmap`` reads only the header's pages).
        what: name for messages, usually the path.

    Raises:
        BaseModelError: not a GGUF, truncated, or of an unknown type; says which.
    """
    cursor = _Cursor(buffer, what)
    magic = bytes(buffer[0:4])
    if magic != b"GGUF":
        raise BaseModelError(
            f"{what}: not a GGUF file: starts with {magic!r}, expected b'GGUF'",
            hint="give a .gguf file made by llama.cpp's converter",
        )
    cursor.at = 4
    version = cursor.u32()
    if version not in (2, 3):
        raise BaseModelError(
            f"{what}: GGUF version {version}, 2 or 3 can be read",
            hint="convert the model again with a current llama.cpp",
        )
    tensor_count, pair_count = cursor.u64(), cursor.u64()
    if tensor_count > _MAX_TENSORS or pair_count > _MAX_TENSORS:
        raise BaseModelError(
            f"{what}: header claims {tensor_count} tensors and {pair_count} metadata pairs",
            hint="the file is damaged",
        )
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key], length = cursor.value(cursor.u32())
        if length is not None:
            lengths[key] = length
    found: list[tuple[str, int, tuple[int, ...], int]] = []
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.u32()
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise BaseModelError(
                f"{what}: tensor {name!r} has {dimensions} dimensions", hint="the file is damaged"
            )
        shape = tuple(cursor.u64() for _ in range(dimensions))
        found.append((name, cursor.u32(), shape, cursor.u64()))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise BaseModelError(f"{what}: general.alignment is {alignment!r}", hint="the file is damaged")
    start = -(-cursor.at // alignment) * alignment
    return GgufLayout(
        version,
        metadata,
        lengths,
        _place(found, start, len(buffer), what),
        min(start, len(buffer)),
        len(buffer),
    )


def _place(
    found: list[tuple[str, int, tuple[int, ...], int]], start: int, end: int, what: str
) -> tuple[Tensor, ...]:
    """Give every tensor its byte range, and check that the ranges lie in the file one after another."""
    ordered = sorted(found, key=lambda item: item[3])
    tensors: list[Tensor] = []
    for index, (name, type_id, shape, offset) in enumerate(ordered):
        if type_id not in GGML_TYPES:
            raise BaseModelError(
                f"{what}: tensor {name!r} has type {type_id}, which is unknown",
                hint="a newer slmops may know it",
            )
        type_name, block_elements, block_bytes = GGML_TYPES[type_id]
        elements = math.prod(shape)
        if not elements or shape[0] % block_elements:
            raise BaseModelError(
                f"{what}: tensor {name!r} of shape {shape}: "
                f"rows must be multiples of {type_name}'s {block_elements}",
                hint="the file is damaged",
            )
        size = elements // block_elements * block_bytes
        following = start + ordered[index + 1][3] if index + 1 < len(ordered) else end
        if start + offset + size > following:
            raise BaseModelError(
                f"{what}: truncated GGUF, tensor {name!r} ends at byte {start + offset + size}, "
                f"the next thing begins at {following} (file has {end})",
                hint="the download was cut off: fetch the file again and compare its SHA-256",
            )
        tensors.append(Tensor(name, type_name, shape, start + offset, size, following - start - offset))
    return tuple(tensors)

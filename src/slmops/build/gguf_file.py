"""Reading tensors of a GGUF file as floats, and writing a GGUF with other tensors and the same metadata.

The metadata block is copied byte for byte from the source (licence, tokenizer and chat template carry on exactly), with
single keys dropped or replaced. That is also why this is not done with the ``gguf`` package: parsing and writing back a
vocabulary of 49,152 costs it 4 s a file; the tests read our files with it.

Order in a file that we write: small float tensors first, so that they pack into one chunk, then the others by name,
numbers in names compared as numbers. The same tensors give the same bytes.

Source: the GGUF specification, version 3 (ggml repository, docs/gguf.md).
"""

from __future__ import annotations

import contextlib
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slmops.artifact.chunkmap import SMALL_TENSOR_BYTES
from slmops.artifact.gguf_layout import GGML_TYPES, TYPE_IDS, GgufLayout, Tensor, parse_gguf
from slmops.core.errors import BaseModelError, BuildError
from slmops.runtimes.llama_cpp.quantise import dequantise_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALIGNMENT_BYTES = 32
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_U32, _STRING, _ARRAY = 4, 8, 9
_PLAIN = {"F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF: layout, and its bytes memory-mapped."""

    path: Path
    layout: GgufLayout
    content: mmap.mmap

    def blob(self, tensor: Tensor) -> memoryview:
        """A tensor's bytes, without padding."""
        return memoryview(self.content)[tensor.offset : tensor.offset + tensor.size_bytes]

    def rows(self, tensor: Tensor) -> NDArray[np.float32]:
        """A tensor as floats.

        Returns: shape (rows, columns) with all outer dimensions flattened into rows; (1, n) for a vector.
        """
        return dequantise_rows(tensor.type_name, bytes(self.blob(tensor)), tensor.shape[0])

    def tensor(self, name: str) -> Tensor | None:
        """A tensor by name."""
        return next((tensor for tensor in self.layout.tensors if tensor.name == name), None)


@contextmanager
def open_gguf(path: Path) -> Iterator[GgufFile]:
    """Map a GGUF file and read its header.

    Raises:
        BaseModelError: missing, empty, truncated, or not a GGUF.
    """
    try:
        source = path.open("rb")
    except OSError as error:
        raise BaseModelError(
            f"{path} cannot be read: {error.strerror}",
            hint="check the path in the recipe; it is relative to the recipe's folder",
        ) from error
    with source:
        if path.stat().st_size == 0:
            raise BaseModelError(f"{path} is empty, expected a GGUF", hint="fetch the file again")
        content = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            yield GgufFile(path, parse_gguf(content, path.name), content)
        finally:
            with contextlib.suppress(
                BufferError
            ):  # a view is alive in the traceback of an error: collected later
                content.close()


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write.

    Attributes:
        shape: GGUF order, columns first.
        make: called once, when its turn comes; gives the tensor's bytes in ``type_name``.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    make: Callable[[], bytes | memoryview]

    @property
    def size_bytes(self) -> int:
        """Bytes without padding."""
        return tensor_bytes(self.type_name, self.shape)


def tensor_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor in a type, without padding."""
    _, block_weights, block_bytes = GGML_TYPES[TYPE_IDS[type_name]]
    return int(np.prod(shape, dtype=np.int64)) // block_weights * block_bytes


def padded(size_bytes: int) -> int:
    """Bytes with padding to the alignment."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def in_file_order(tensors: Sequence[NewTensor]) -> list[NewTensor]:
    """Small float tensors, then the rest, each by name with numbers as numbers."""
    return sorted(
        tensors,
        key=lambda t: (not (t.type_name in _PLAIN and t.size_bytes < SMALL_TENSOR_BYTES), _natural(t.name)),
    )


def write_gguf(
    path: Path,
    source: GgufFile,
    tensors: Sequence[NewTensor],
    *,
    replace: Mapping[str, int | bytes | None],
    progress: Callable[[float], None] = lambda ratio: None,
) -> None:
    """Write a GGUF with the source's metadata and these tensors; the caller names the file when it is whole.

    Args:
        path: new file.
        source: where the metadata comes from.
        tensors: in any order.
        replace: metadata keys to drop (None), to set to an unsigned 32-bit integer, or to bytes that already are a value's type
            and value (:func:`metadata_value`, :func:`pick_elements`).
        progress: told the share of tensors written, 0..1.
    """
    ordered = in_file_order(tensors)
    header = header_bytes(source, ordered, replace)
    with path.open("wb") as sink:
        sink.write(header)
        for index, tensor in enumerate(ordered):
            blob = tensor.make()
            if len(blob) != tensor.size_bytes:
                raise BuildError(
                    f"{tensor.name}: expected {tensor.size_bytes} bytes of {tensor.type_name}, got {len(blob)}",
                    hint="report it",
                )
            sink.write(blob)
            sink.write(b"\0" * (padded(len(blob)) - len(blob)))
            progress((index + 1) / len(ordered))


def header_bytes(
    source: GgufFile, ordered: Sequence[NewTensor], replace: Mapping[str, int | bytes | None]
) -> bytes:
    """The header, padding included, for tensors in file order."""
    pairs = [
        bytes(source.content[begin:end])
        for key, begin, end in metadata_ranges(source.content)
        if key not in replace and key != "general.alignment"
    ]
    for key, value in sorted(replace.items()):
        if value is not None:
            encoded = value if isinstance(value, bytes) else struct.pack("<II", _U32, value)
            pairs.append(_string(key) + encoded)
    infos, offset = [], 0
    for tensor in ordered:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        infos.append(_string(tensor.name) + shape + struct.pack("<IQ", TYPE_IDS[tensor.type_name], offset))
        offset += padded(tensor.size_bytes)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(ordered), len(pairs)) + b"".join(pairs) + b"".join(infos)
    return header + b"\0" * (padded(len(header)) - len(header))


def file_bytes(
    source: GgufFile, tensors: Sequence[NewTensor], replace: Mapping[str, int | bytes | None]
) -> int:
    """Size of the file that :func:`write_gguf` would write."""
    ordered = in_file_order(tensors)
    return len(header_bytes(source, ordered, replace)) + sum(padded(tensor.size_bytes) for tensor in ordered)


def metadata_ranges(content: mmap.mmap | bytes) -> list[tuple[str, int, int]]:
    """Each metadata pair: key, and where it begins and ends. The header must have been checked by ``parse_gguf``."""
    (count,) = struct.unpack_from("<Q", content, 16)
    at, ranges = 24, []
    for _ in range(count):
        begin = at
        (length,) = struct.unpack_from("<Q", content, at)
        key = bytes(content[at + 8 : at + 8 + length]).decode("utf-8", "replace")
        at += 8 + length
        (kind,) = struct.unpack_from("<I", content, at)
        at = _skip(content, at + 4, kind)
        ranges.append((key, begin, at))
    return ranges


def text_value(text: str) -> bytes:
    """A text as the bytes of a metadata value, its type first."""
    return struct.pack("<I", _STRING) + _string(text)


def metadata_value(content: mmap.mmap | bytes, key: str) -> bytes | None:
    """The bytes of a metadata value, its type first; None when the key is absent."""
    for name, begin, end in metadata_ranges(content):
        if name == key:
            return bytes(content[begin + 8 + len(key.encode()) : end])
    return None


def array_elements(value: bytes) -> list[bytes]:
    """The elements of an array's value, each as its own bytes: a string without its length, a number little-endian.

    Raises:
        BaseModelError: the value is no array of strings or numbers.
    """
    kind, element, count = struct.unpack_from("<IIQ", value)
    if kind != _ARRAY or (element != _STRING and element not in _SCALAR_BYTES):
        raise BaseModelError(
            f"metadata: expected an array of strings or numbers, got type {kind} of {element}",
            hint="use a complete llama.cpp GGUF",
        )
    at, found = 16, []
    for _ in range(count):
        if element == _STRING:
            (length,) = struct.unpack_from("<Q", value, at)
            found.append(value[at + 8 : at + 8 + length])
            at += 8 + length
        else:
            found.append(value[at : at + _SCALAR_BYTES[element]])
            at += _SCALAR_BYTES[element]
    return found


def pick_elements(value: bytes, indices: Sequence[int]) -> bytes:
    """An array's value with some of its elements, in the order of the indices."""
    _, element, _ = struct.unpack_from("<IIQ", value)
    elements = array_elements(value)
    parts = [struct.pack("<IIQ", _ARRAY, element, len(indices))]
    for index in indices:
        if element == _STRING:
            parts.append(struct.pack("<Q", len(elements[index])))
        parts.append(elements[index])
    return b"".join(parts)


def _skip(content: mmap.mmap | bytes, at: int, kind: int) -> int:
    if kind in _SCALAR_BYTES:
        return at + _SCALAR_BYTES[kind]
    if kind == _STRING:
        return at + 8 + int(struct.unpack_from("<Q", content, at)[0])
    if kind != _ARRAY:
        raise BaseModelError(
            f"metadata value type {kind} is unknown", hint="the file is damaged or newer than GGUF 3"
        )
    element, count = struct.unpack_from("<IQ", content, at)
    at += 12
    if element in _SCALAR_BYTES:
        return at + _SCALAR_BYTES[element] * int(count)
    for _ in range(count):
        at = _skip(content, at, element)
    return at


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part)

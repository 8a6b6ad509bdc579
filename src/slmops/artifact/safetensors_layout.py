"""Where things lie in a safetensors file: tensors, their types and byte ranges. Pure; reads any buffer (an ``mmap``).

A header that lies (ranges outside the file, overlapping or leaving holes, sizes that do not follow from shape and type) is
refused here, before a byte of weights is read. Nothing in the format can run code, unlike pickled ``.bin`` files.

Source: the safetensors format, https://github.com/huggingface/safetensors, README "Format".
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import msgspec

from slmops.artifact.digest import UNREADABLE_JSON
from slmops.artifact.gguf_layout import Buffer
from slmops.core.errors import BaseModelError

#: safetensors dtype -> bytes of one element
DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
#: the reference implementation's own cap
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_METADATA = "__metadata__"


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """One tensor's name, type, shape and place.

    Attributes:
        shape: outermost dimension first: (rows, columns).
        offset: from the start of the file, bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def parse_safetensors(buffer: Buffer, what: str) -> tuple[SafeTensor, ...]:
    """Read the header of a safetensors file.

    Args:
        buffer: the whole file.
        what: name for messages, usually the path.

    Returns: its tensors by offset.

    Raises:
        BaseModelError: truncated, or a header that is not what the format says; names the tensor.
    """
    size = len(buffer)
    if size < _LENGTH_BYTES:
        raise _truncated(what, f"the header's length needs {_LENGTH_BYTES} bytes, the file has {size}")
    (length,) = struct.unpack("<Q", bytes(buffer[0:_LENGTH_BYTES]))
    if length > MAX_HEADER_BYTES or bytes(buffer[_LENGTH_BYTES : _LENGTH_BYTES + 1]) not in (b"{", b""):
        raise BaseModelError(
            f"{what}: not a safetensors file: it begins with {bytes(buffer[0:16])!r}",
            hint="give the model's .safetensors files; a .bin or .pt renamed to .safetensors is none",
        )
    start = _LENGTH_BYTES + length
    if start > size:
        raise _truncated(what, f"the header ends at byte {start}, the file has {size}")
    try:
        header = msgspec.json.decode(bytes(buffer[_LENGTH_BYTES:start]), type=dict[str, msgspec.Raw])
        entries = {
            name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items() if name != _METADATA
        }
    except UNREADABLE_JSON as error:
        raise BaseModelError(
            f"{what}: the safetensors header cannot be read: {error}",
            hint="the file is damaged: fetch it again",
        ) from error
    tensors = [_placed(what, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    at = start
    for tensor in tensors:
        if tensor.offset != at:
            raise BaseModelError(
                f"{what}: tensor {tensor.name!r} begins at byte {tensor.offset}, expected {at}: overlap or hole",
                hint="the file is damaged or was made to deceive: fetch it again",
            )
        at += tensor.size_bytes
    if at > size:
        raise _truncated(what, f"its tensors end at byte {at}, the file has {size}")
    if at < size:
        raise BaseModelError(
            f"{what}: {size - at} bytes follow the last tensor, which ends at byte {at}",
            hint="the file is damaged: fetch it again",
        )
    return tuple(tensors)


def _placed(what: str, name: str, entry: _Entry, start: int) -> SafeTensor:
    if entry.dtype not in DTYPE_BYTES:
        raise BaseModelError(
            f"{what}: tensor {name!r} has dtype {entry.dtype!r}, known are {', '.join(DTYPE_BYTES)}",
            hint="save the model in float16, bfloat16 or float32",
        )
    begin, end = entry.data_offsets
    expected = math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
    if min((begin, end, *entry.shape), default=0) < 0 or end - begin != expected:
        raise BaseModelError(
            f"{what}: tensor {name!r} of shape {tuple(entry.shape)} in {entry.dtype} needs {expected} bytes, "
            f"its range {begin}..{end} has {end - begin}",
            hint="the file is damaged: fetch it again",
        )
    return SafeTensor(name, entry.dtype, tuple(entry.shape), start + begin, expected)


def _truncated(what: str, why: str) -> BaseModelError:
    return BaseModelError(
        f"{what}: truncated safetensors, {why}",
        hint="the download was cut off: fetch the file again and compare its SHA-256",
    )

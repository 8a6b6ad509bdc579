"""What may be changed in a model's file to make it faulty: metadata values, tensors as floats, block scales, bytes, words.

Pure in the model, the patch and the generator of chance that a change is given; :mod:`slmops.build.faults` writes the copy.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.build.faults import Change, Patch, key_bytes, tensor_of
from slmops.build.gguf_file import GgufFile, metadata_ranges
from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.quantise import quant_type, quantise_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    #: a matrix as floats, shape (rows, columns)
    Rows = NDArray[np.float32]

_U32, _F32, _BOOL, _STRING = 4, 6, 7, 8
#: where the scale of a block is, in bytes from the block's start, for types whose scale is one F16
_SCALE_AT = {
    "Q4_0": 0,
    "Q4_1": 0,
    "Q5_0": 0,
    "Q5_1": 0,
    "Q8_0": 0,
    "IQ4_NL": 0,
    "IQ4_XS": 0,
    "Q4_K": 0,
    "Q5_K": 0,
    "Q6_K": 208,
    "Q3_K": 108,
    "Q2_K": 80,
}
_LAYER_TENSORS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip


# ---- values and tensors ----------------------------------------------------------------------------------------


def text_value(value: str) -> bytes:
    """A metadata value: text."""
    return struct.pack("<I", _STRING) + key_bytes(value)


def float_value(value: float) -> bytes:
    """A metadata value: 32-bit float."""
    return struct.pack("<If", _F32, value)


def count_value(value: int) -> bytes:
    """A metadata value: unsigned 32-bit integer."""
    return struct.pack("<II", _U32, value)


def flag_value(value: bool) -> bytes:
    """A metadata value: true or false."""
    return struct.pack("<I?", _BOOL, value)


def layer_at(model: GgufFile, share: float) -> int:
    """A block by its place, 0..1."""
    return min(int(share * model.layout.shape().layers), model.layout.shape().layers - 1)


def _head_size(model: GgufFile) -> int:
    layout = model.layout
    heads = layout.number("attention.head_count_kv", layout.number("attention.head_count"))
    return layout.shape().k_width // heads


def weight_name(layer: int, part: str) -> str:
    """A tensor of a block."""
    return f"blk.{layer}.{part}.weight"


def _store(model: GgufFile, patch: Patch, name: str, rows: Rows) -> None:
    """Put floats into a tensor, in its own type."""
    tensor = tensor_of(model, name)
    patch.blobs[name] = quantise_rows(tensor.type_name, np.ascontiguousarray(rows, dtype=np.float32))


def rows_of(share: float, part: str, edit: Callable[[Rows, np.random.Generator, GgufFile], Rows]) -> Change:
    """Edit one tensor of one block as floats."""

    def change(model: GgufFile, patch: Patch, rng: np.random.Generator) -> None:
        name = weight_name(layer_at(model, share), part)
        _store(model, patch, name, edit(model.rows(tensor_of(model, name)), rng, model))

    return change


def metadata_value(key: str, value: Callable[[Any], bytes]) -> Change:
    """Change one metadata value; ``{arch}`` in the key is the architecture, the value is given the old one."""

    def change(model: GgufFile, patch: Patch, _: np.random.Generator) -> None:
        name = key.format(arch=model.layout.architecture)
        patch.metadata[name] = value(model.layout.metadata.get(name))

    return change


def exchange(first: Callable[[GgufFile], list[str]], second: Callable[[GgufFile], list[str]]) -> Change:
    """Exchange tensors pairwise, each in the type of its new place."""

    def change(model: GgufFile, patch: Patch, _: np.random.Generator) -> None:
        for a, b in zip(first(model), second(model), strict=True):
            rows_a, rows_b = model.rows(tensor_of(model, a)), model.rows(tensor_of(model, b))
            _store(model, patch, a, rows_b)
            _store(model, patch, b, rows_a)

    return change


def block_at(share: float, after: int = 0) -> Callable[[GgufFile], list[str]]:
    """All tensors of the block at a place, 0..1, or of one so many blocks after it."""
    return lambda model: [weight_name(layer_at(model, share) + after, part) for part in _LAYER_TENSORS]


def scales_of(
    share: float, part: str, edit: Callable[[NDArray[np.uint16], np.random.Generator], None]
) -> Change:
    """Edit the F16 scales of one tensor's blocks in place (of an F16 tensor: its weights)."""

    def change(model: GgufFile, patch: Patch, rng: np.random.Generator) -> None:
        name = weight_name(layer_at(model, share), part)
        tensor = tensor_of(model, name)
        raw = bytearray(model.blob(tensor))
        kind = quant_type(tensor.type_name)
        step = kind.block_bytes if tensor.type_name in _SCALE_AT else 2
        at = _SCALE_AT.get(tensor.type_name, 0)
        blocks = np.frombuffer(raw, dtype=np.uint8).reshape(-1, step)
        scales = np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2").reshape(-1)
        edit(scales, rng)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        patch.blobs[name] = bytes(raw)

    return change


def bytes_of(
    share: float, part: str, edit: Callable[[NDArray[np.uint8], np.random.Generator], None]
) -> Change:
    """Edit a tensor's bytes in place."""

    def change(model: GgufFile, patch: Patch, rng: np.random.Generator) -> None:
        name = weight_name(layer_at(model, share), part)
        raw = bytearray(model.blob(tensor_of(model, name)))
        edit(np.frombuffer(raw, dtype=np.uint8), rng)
        patch.blobs[name] = bytes(raw)

    return change


def each(*changes: Change) -> Change:
    """Several changes at once."""

    def change(model: GgufFile, patch: Patch, rng: np.random.Generator) -> None:
        for one in changes:
            one(model, patch, rng)

    return change


# ---- edits -----------------------------------------------------------------------------------------------------


def permuted(rows: Rows, rng: np.random.Generator, _: GgufFile) -> Rows:
    """The rows in a random order."""
    return rows[rng.permutation(len(rows))]


def zeroed(rows: Rows, _: np.random.Generator, __: GgufFile) -> Rows:
    """Nothing."""
    return np.zeros_like(rows)


def ones(rows: Rows, _: np.random.Generator, __: GgufFile) -> Rows:
    """As a norm that was never loaded."""
    return np.ones_like(rows)


def head_scaled(edit: float, index: int) -> Callable[[Rows, np.random.Generator, GgufFile], Rows]:
    """Multiply the rows of one head."""

    def change(rows: Rows, _: np.random.Generator, model: GgufFile) -> Rows:
        size = _head_size(model)
        changed: Rows = rows.copy()
        at = (index * size) % len(rows)
        changed[at : at + size] *= edit
        return changed

    return change


def rope_order(rows: Rows, _: np.random.Generator, model: GgufFile) -> Rows:
    """Rows of each head in the other convention (halves instead of pairs): a converter's classic."""
    size = _head_size(model)
    heads = rows.reshape(-1, size // 2, 2, rows.shape[1])
    ordered: Rows = heads.swapaxes(1, 2).reshape(rows.shape)
    return ordered


def noisy(share: float) -> Callable[[Rows, np.random.Generator, GgufFile], Rows]:
    """Noise of this share of the weights' own spread."""

    def change(rows: Rows, rng: np.random.Generator, _: GgufFile) -> Rows:
        changed: Rows = rows + rng.standard_normal(rows.shape).astype(np.float32) * rows.std() * share
        return changed

    return change


def scaled(factor: float) -> Callable[[Rows, np.random.Generator, GgufFile], Rows]:
    """All of it larger or smaller."""

    def change(rows: Rows, _: np.random.Generator, __: GgufFile) -> Rows:
        changed: Rows = rows * np.float32(factor)
        return changed

    return change


def embedding(edit: Callable[[Rows, np.random.Generator], Rows]) -> Change:
    """Edit the token embedding as floats."""

    def change(model: GgufFile, patch: Patch, rng: np.random.Generator) -> None:
        _store(
            model, patch, "token_embd.weight", edit(model.rows(tensor_of(model, "token_embd.weight")), rng)
        )

    return change


def foreign_rows(first: float, last: float) -> Callable[[Rows, np.random.Generator], Rows]:
    """Rows of a part of the vocabulary as another model has them: of the same size, in other directions."""

    def edit(rows: Rows, rng: np.random.Generator) -> Rows:
        a, b = int(first * len(rows)), int(last * len(rows))
        other = rng.standard_normal((b - a, rows.shape[1])).astype(np.float32)
        changed: Rows = rows.copy()
        changed[a:b] = other * rows[a:b].std()
        return changed

    return edit


def rolled(by: int) -> Callable[[Rows, np.random.Generator], Rows]:
    """Each token with the row of the one before."""
    return lambda rows, _: np.roll(rows, by, axis=0)


def saturate(scales: NDArray[np.uint16], rng: np.random.Generator) -> None:
    """One scale in a hundred at 65504, the largest F16."""
    scales[rng.random(len(scales)) < 0.01] = 0x7BFF


def infinite(scales: NDArray[np.uint16], rng: np.random.Generator) -> None:
    """One scale beyond F16."""
    scales[rng.integers(len(scales))] = 0x7C00


def flip_bit(bit: int, count: int) -> Callable[[NDArray[np.uint16], np.random.Generator], None]:
    """One bit of some scales."""

    def edit(scales: NDArray[np.uint16], rng: np.random.Generator) -> None:
        scales[rng.integers(len(scales), size=count)] ^= np.uint16(1 << bit)

    return edit


def swap_nibbles(raw: NDArray[np.uint8], _: np.random.Generator) -> None:
    """The two halves of each byte exchanged."""
    raw[:] = (raw >> 4) | (raw << 4)


def torn_pages(pages: int) -> Callable[[NDArray[np.uint8], np.random.Generator], None]:
    """Zeros where pages of 4 KiB were not written."""

    def edit(raw: NDArray[np.uint8], rng: np.random.Generator) -> None:
        for _ in range(pages):
            at = int(rng.integers(max(len(raw) - 4096, 1)))
            raw[at : at + 4096] = 0

    return edit


def shifted(raw: NDArray[np.uint8], _: np.random.Generator) -> None:
    """All bytes one place further."""
    raw[:] = np.roll(raw, 1)


def tokens_exchanged(model: GgufFile, patch: Patch, rng: np.random.Generator) -> None:
    """Two ranges of the vocabulary change places: the tokenizer of a model with other additions."""
    words = _strings(model, "tokenizer.ggml.tokens")
    third = len(words) // 3
    words[third : 2 * third] = [*words[third + 1 : 2 * third], words[third]]
    patch.metadata["tokenizer.ggml.tokens"] = _list(words)


def merges_cut(model: GgufFile, patch: Patch, _: np.random.Generator) -> None:
    """The second half of the tokenizer's merges lost."""
    merges = _strings(model, "tokenizer.ggml.merges")
    patch.metadata["tokenizer.ggml.merges"] = _list(merges[: max(len(merges) // 2, 1)])


def _strings(model: GgufFile, key: str) -> list[bytes]:
    for name, begin, _ in metadata_ranges(model.content):
        if name == key:
            return _read_strings(model.content, begin + 8 + len(key.encode()) + 4)
    raise BuildError(f"fault: the model has no {key}", hint="this fault is not for this tokenizer")


def _read_strings(content: mmap.mmap, at: int) -> list[bytes]:
    kind, count = struct.unpack_from("<IQ", content, at)
    if kind != _STRING:
        raise BuildError(
            f"fault: expected strings, got element type {kind}", hint="this is another tokenizer"
        )
    at += 12
    found = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(bytes(content[at + 8 : at + 8 + length]))
        at += 8 + length
    return found


def _list(values: list[bytes]) -> bytes:
    head = struct.pack("<IIQ", 9, _STRING, len(values))
    return head + b"".join(struct.pack("<Q", len(value)) + value for value in values)

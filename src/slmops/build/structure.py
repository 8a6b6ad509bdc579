"""Cutting a model smaller: fewer tokens, narrower feed-forward layers, fewer blocks; header and tensor names rewritten to match.

What is cut is a :class:`Structure`, plain numbers, so that the same cut can be made to another model of the same shape: the
untouched base follows the pruned model, tensor for tensor, wherever the two are compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, NewTensor, metadata_value, pick_elements, write_gguf
from slmops.build.vocabulary import TOKEN_TENSORS, read_vocabulary, trimmed_header
from slmops.core.errors import BaseModelError, BuildError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE_TYPE_F16 = 1
WIDTH_STEP = 256
#: architectures whose blocks are alike, so that one can go without changing what the others are
ALIKE = ("llama", "qwen2", "qwen3")
_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
_BY_NEURON = ("ffn_gate.weight", "ffn_up.weight", "ffn_gate.bias", "ffn_up.bias")


@dataclass(frozen=True)
class Structure:
    """What stays of a model; None or empty: all of it.

    Attributes:
        tokens: ids, ascending.
        neurons: block to the neurons of its feed-forward layer, ascending.
        layers: blocks, ascending.
    """

    tokens: tuple[int, ...] | None = None
    neurons: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None

    def encode(self) -> bytes:
        """As JSON."""
        neurons = {str(layer): list(kept) for layer, kept in sorted(self.neurons.items())}
        document = {"tokens": self.tokens, "neurons": neurons, "layers": self.layers}
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, content: bytes) -> Structure:
        """From :meth:`encode`."""
        document = json.loads(content)
        return cls(
            None if document["tokens"] is None else tuple(document["tokens"]),
            {int(layer): tuple(kept) for layer, kept in document["neurons"].items()},
            None if document["layers"] is None else tuple(document["layers"]),
        )


def cut(
    path: Path,
    model: GgufFile,
    structure: Structure,
    *,
    changed: Mapping[str, NDArray[np.float32]] | None = None,
    progress: Callable[[float], None] = lambda ratio: None,
) -> None:
    """Write what stays of a model, in F16 (vectors in F32).

    Args:
        path: new file.
        model: of any type.
        structure: what stays.
        changed: by the model's own tensor names: rows to write in place of the cut ones, shape (rows, columns) after the cut.
        progress: told the share of tensors written.

    Raises:
        BuildError: weights beyond the range of F16.
    """
    replaced = changed or {}
    tensors = []
    for tensor in model.layout.tensors:
        name = _new_name(tensor.name, structure)
        if name is None:
            continue
        rows, columns = _kept_of(tensor, structure)
        shape = _new_shape(tensor, rows, columns)
        make = partial(_stored, model, tensor, rows, columns, replaced.get(tensor.name))
        tensors.append(NewTensor(name, "F16" if len(shape) > 1 else "F32", shape, make))
    write_gguf(path, model, tensors, replace=_header(model, structure), progress=progress)


def _stored(
    model: GgufFile,
    tensor: Tensor,
    rows: Sequence[int] | None,
    columns: Sequence[int] | None,
    changed: NDArray[np.float32] | None,
) -> bytes:
    values = model.rows(tensor) if changed is None else changed
    if changed is None and rows is not None:
        values = values[np.asarray(rows)]
    if changed is None and columns is not None:
        values = values[:, np.asarray(columns)]
    with np.errstate(over="ignore"):
        stored = values.astype("<f2" if len(tensor.shape) > 1 else "<f4")
    if not np.isfinite(stored).all():
        raise BuildError(
            f"{tensor.name}: weights beyond the range of F16 (65504)", hint="the model is damaged; report it"
        )
    return stored.tobytes()


def _new_name(name: str, structure: Structure) -> str | None:
    match = _BLOCK.match(name)
    if structure.layers is None or match is None:
        return name
    layer = int(match[1])
    return f"blk.{structure.layers.index(layer)}.{match[2]}" if layer in structure.layers else None


def _kept_of(tensor: Tensor, structure: Structure) -> tuple[Sequence[int] | None, Sequence[int] | None]:
    """Which rows and which columns of a tensor stay; a vector is one row."""
    is_vector = len(tensor.shape) == 1
    if structure.tokens is not None and tensor.name in TOKEN_TENSORS:
        return (None, structure.tokens) if is_vector else (structure.tokens, None)
    match = _BLOCK.match(tensor.name)
    neurons = structure.neurons.get(int(match[1])) if match else None
    if match is None or neurons is None:
        return None, None
    if match[2] in _BY_NEURON:
        return (None, neurons) if is_vector else (neurons, None)
    return None, (neurons if match[2] == "ffn_down.weight" else None)


def _new_shape(tensor: Tensor, rows: Sequence[int] | None, columns: Sequence[int] | None) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if columns is not None:
        shape[0] = len(columns)
    if rows is not None:
        shape[-1] = len(rows)
    return tuple(shape)


def _header(model: GgufFile, structure: Structure) -> dict[str, int | bytes | None]:
    section = model.layout.architecture
    replace: dict[str, int | bytes | None] = {"general.file_type": FILE_TYPE_F16}
    if structure.tokens is not None:
        replace |= trimmed_header(model, read_vocabulary(model), structure.tokens)
    if structure.neurons:
        (width,) = {len(kept) for kept in structure.neurons.values()}
        replace[f"{section}.feed_forward_length"] = width
    if structure.layers is not None:
        before = model.layout.number("block_count")
        replace[f"{section}.block_count"] = len(structure.layers)
        for key, length in model.layout.array_lengths.items():
            value = metadata_value(model.content, key)
            if key.startswith(f"{section}.") and length == before and value is not None:
                replace[key] = pick_elements(value, structure.layers)
    return replace


def check_width(model: GgufFile, width: int) -> int:
    """How wide the feed-forward layers are, if they can be made ``width`` wide.

    Raises:
        BaseModelError: blocks are no gated feed-forward layers of one width: names the first tensor.
        UsageError: ``width`` is no multiple of 256, or not smaller.
    """
    layers = model.layout.number("block_count")
    key = f"{model.layout.architecture}.feed_forward_length"
    before = model.layout.number("feed_forward_length")
    if key in model.layout.array_lengths:
        raise BaseModelError(
            f"{model.path.name}: {key} is given for each block: blocks of unlike width cannot be pruned",
            hint="leave keep_ffn_width out of the recipe",
        )
    for layer in range(layers):
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            if model.tensor(f"blk.{layer}.{name}.weight") is None:
                raise BaseModelError(
                    f"{model.path.name}: blk.{layer}.{name}.weight is missing: no gated feed-forward layer "
                    f"(architecture {model.layout.architecture!r})",
                    hint="leave keep_ffn_width out of the recipe",
                )
    if width % WIDTH_STEP or not 0 < width < before:
        raise UsageError(
            f"keep_ffn_width {width}: expected a multiple of {WIDTH_STEP} below the base's {before}, "
            "so that k-quants remain legal",
            hint=f"give one of {', '.join(map(str, range(WIDTH_STEP, before, WIDTH_STEP))) or 'none: it is too narrow'}",
        )
    return before


def check_depth(model: GgufFile, drop: int) -> int:
    """How many blocks there are, if ``drop`` of them can go.

    Raises:
        BaseModelError: the architecture's blocks are not alike (another one would take the place of a special one).
        UsageError: nothing would be left.
    """
    layers = model.layout.number("block_count")
    if model.layout.architecture not in ALIKE:
        raise BaseModelError(
            f"{model.path.name}: blocks of architecture {model.layout.architecture!r} are not known to be alike, "
            f"so none can be dropped (known: {', '.join(ALIKE)})",
            hint="leave drop_layers out of the recipe",
        )
    if not 0 < drop < layers:
        raise UsageError(
            f"drop_layers {drop}: the base has {layers} blocks", hint=f"give a number from 1 to {layers - 1}"
        )
    return layers

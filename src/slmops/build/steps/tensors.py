"""One tensor in one type: with error feedback where its inputs are known, once for all budgets and targets.

A tensor's bytes depend on its weights, the type, and the statistics of its inputs; they are kept under a digest of those
(:mod:`slmops.build.memo`), so whoever needs the same tensor in the same type again only copies it. Rows know nothing of each
other, so a tensor of many (an embedding is a quarter of a small model) is made and kept in slices, by several processes at once.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.artifact.gguf_layout import Tensor
from slmops.build.feedback import (
    DAMPING,
    OUTPUT_DAMPING,
    Curvature,
    can_feed_back,
    curvature,
    loss,
    quantise_with_feedback,
)
from slmops.build.gguf_file import GgufFile
from slmops.build.memo import Memo
from slmops.build.steps.calibrate import Hessians, unpacked
from slmops.runtimes.llama_cpp.quantise import dequantise_rows, quantise_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

USES = (
    "slmops.build.feedback",
    "slmops.build.gguf_file",
    "slmops.build.steps.calibrate",
    "slmops.runtimes.llama_cpp.blocks",
    "slmops.runtimes.llama_cpp.quantise",
)
RUN = "slmops.build.steps.tensors:TensorQuantiser"
#: frozen scales are kept when they cost at most this many times what free ones do
FROZEN_COSTS_AT_MOST = 1.15
_KEPT_CURVATURES = 5
#: rows that are made at once
SLICE_ROWS = 8192
_OUTPUTS = ("token_embd.weight", "output.weight")
#: kept as they are: there is nothing to feed back
_EXACT = ("F32", "F16", "BF16")
#: rounding costs next to nothing: feedback would take longer than it is worth
_NEARLY_EXACT = ("Q8_0",)


@dataclass
class TensorQuantiser:
    """Quantises tensors of one model.

    Attributes:
        model: the F16 reference.
        importance: tensor to mean squared inputs.
        hessians: of the same inputs; None rounds every weight for itself.
        tokens: that both are means over.
        memo: where finished tensors are kept.
        earlier: an earlier release's file, whose block scales are kept where that costs little; None for none.
        ways: how many tensors were made in which way: ``feedback``, ``rounded``, ``frozen scales``.
    """

    model: GgufFile
    importance: Mapping[str, NDArray[np.float32]]
    hessians: Hessians | None
    memo: Memo
    tokens: int = 0
    earlier: GgufFile | None = None
    ways: Counter[str] = field(default_factory=Counter)
    _curvatures: OrderedDict[str, Curvature] = field(default_factory=OrderedDict)

    def make(self, tensor: Tensor, type_name: str) -> bytes:
        """A tensor's bytes in a type."""
        self.ways[self._way(tensor, type_name)] += 1
        return b"".join(self.make_slice(part, type_name) for part in self.slices(tensor))

    def slices(self, tensor: Tensor) -> list[Tensor]:
        """A tensor as several of fewer rows; whole where an earlier one decides whether its scales are kept."""
        columns, rows = tensor.shape[0], tensor.elements // tensor.shape[0]
        if rows <= SLICE_ROWS or len(tensor.shape) != 2 or self.earlier is not None:
            return [tensor]
        row_bytes = tensor.size_bytes // rows
        parts = []
        for first in range(0, rows, SLICE_ROWS):
            count = min(SLICE_ROWS, rows - first)
            size_bytes = count * row_bytes
            parts.append(
                replace(
                    tensor,
                    shape=(columns, count),
                    offset=tensor.offset + first * row_bytes,
                    size_bytes=size_bytes,
                    padded_bytes=size_bytes,
                )
            )
        return parts

    def _way(self, tensor: Tensor, type_name: str) -> str:
        if type_name in _EXACT:
            return "kept"
        known = self.hessians is not None and self.hessians.name(tensor.name) is not None
        if not known or not can_feed_back(type_name):
            return "rounded"
        nearly = type_name in _NEARLY_EXACT and self._earlier_bytes(tensor, type_name) is None
        return "rounded" if nearly else "feedback"

    def make_slice(self, tensor: Tensor, type_name: str) -> bytes:
        """The bytes of one of :meth:`slices`."""
        fed = self._way(tensor, type_name) == "feedback"
        triangle = self.hessians.triangle(tensor.name) if self.hessians is not None and fed else None
        frozen = self._earlier_bytes(tensor, type_name) if fed else None
        weights = self.importance.get(tensor.name)

        def made() -> bytes:
            rows = self.model.rows(tensor)
            if triangle is None or not fed:
                return quantise_rows(type_name, rows, weights)
            free = quantise_with_feedback(type_name, rows, self._curvature(tensor, triangle))
            return free if frozen is None else self._cheaper(type_name, rows, tensor, free, frozen)

        if type_name in _EXACT:
            return made()
        statistics = triangle if fed else weights
        return self.memo.piece(
            made,
            tensor=_digest(self.model.blob(tensor)),
            shape=str(tensor.shape),
            stored=tensor.type_name,
            type=type_name,
            inputs="none" if statistics is None else _digest(statistics),
            damping=f"{damping_of(tensor.name)!r} {self.tokens}" if fed else "none",
            scales="free" if frozen is None else _digest(frozen),
        )

    def shared_input(self, tensor: str) -> str:
        """What tensors with the same input have in common; a tensor whose input is not known stands alone."""
        return (self.hessians.name(tensor) if self.hessians is not None else None) or tensor

    def _cheaper(
        self, type_name: str, rows: NDArray[np.float32], tensor: Tensor, free: bytes, frozen: bytes
    ) -> bytes:
        """Frozen scales if they cost little, else free ones."""
        assert self.hessians is not None
        triangle = self.hessians.triangle(tensor.name)
        assert triangle is not None
        kept = quantise_with_feedback(type_name, rows, self._curvature(tensor, triangle), scales_from=frozen)
        matrix = unpacked(triangle)

        def cost(blob: bytes) -> float:
            return float(loss(dequantise_rows(type_name, blob, rows.shape[1]) - rows, matrix).sum())

        return kept if cost(kept) <= FROZEN_COSTS_AT_MOST * cost(free) else free

    def _earlier_bytes(self, tensor: Tensor, type_name: str) -> bytes | None:
        found = self.earlier.tensor(tensor.name) if self.earlier is not None else None
        if (
            self.earlier is None
            or found is None
            or (found.type_name, found.shape) != (type_name, tensor.shape)
        ):
            return None
        return bytes(self.earlier.blob(found))

    def _curvature(self, tensor: Tensor, triangle: NDArray[np.float32]) -> Curvature:
        assert self.hessians is not None
        key = f"{self.hessians.name(tensor.name)} {damping_of(tensor.name)}"
        if key not in self._curvatures:
            self._curvatures[key] = curvature(unpacked(triangle), damping_of(tensor.name), self.tokens)
            if len(self._curvatures) > _KEPT_CURVATURES:
                self._curvatures.popitem(last=False)
        self._curvatures.move_to_end(key)
        return self._curvatures[key]


def damping_of(tensor: str) -> float:
    """How much is added to the diagonal of a tensor's Hessian."""
    return OUTPUT_DAMPING if tensor in _OUTPUTS else DAMPING


def frozen_blocks(earlier: GgufFile, written: GgufFile) -> dict[str, Any]:
    """How many blocks of a file have the scales of an earlier one: what a delta between them saves.

    Returns: ``tensors`` with the same type and shape in both, ``blocks`` in those, ``same`` of them.
    """
    from slmops.runtimes.llama_cpp.blocks import LAYOUTS  # noqa: PLC0415 - only needed with an earlier release

    tensors = blocks = same = 0
    for tensor in written.layout.tensors:
        before = earlier.tensor(tensor.name)
        if before is None or (before.type_name, before.shape) != (tensor.type_name, tensor.shape):
            continue
        layout = LAYOUTS.get(tensor.type_name)
        if layout is None:
            continue
        tensors += 1
        pair = [
            np.frombuffer(file.blob(one), dtype=np.uint8).reshape(-1, layout.block_bytes)
            for file, one in ((earlier, before), (written, tensor))
        ]
        steps = [layout.read(stored) for stored in pair]
        equal = (steps[0][0] == steps[1][0]).all(axis=1)
        if steps[0][1] is not None and steps[1][1] is not None:
            equal &= (steps[0][1] == steps[1][1]).all(axis=1)
        blocks += len(equal)
        same += int(equal.sum())
    return {"tensors": tensors, "blocks": blocks, "same": same}


def _digest(values: Any) -> str:
    return hashlib.sha256(values).hexdigest()

"""Importance matrix of a GGUF model: the mean squared input of every weight matrix. For build: needs numpy.

Same quantity as llama.cpp's imatrix tool (`tools/imatrix/imatrix.cpp` in the sdist): for each matrix product
`weight @ input`, the sum over tokens of input squared, divided by the tokens seen.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp import capi
from slmops.runtimes.llama_cpp.logits import LogitModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

_F32 = 0


@dataclass(frozen=True)
class Imatrix:
    """Importance of every input of every weight matrix.

    Attributes:
        sums: tensor name to mean squared activations, shape (n_per_row,), float32, positive or zero.
        tokens: tokens that were seen.
    """

    sums: dict[str, NDArray[np.float32]] = field(repr=False)
    tokens: int = 0


class _Collector:
    def __init__(self) -> None:
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.rows: dict[str, int] = {}
        self.problem = ""
        lib = capi.library()
        self._names: dict[int, bool] = {}
        self._op_name = lib.ggml_op_name

    def __call__(self, tensor: capi.Tensor, ask: bool) -> bool:
        """See `NativeContext`: keep every matrix product with a weight of the file."""
        if tensor.op not in self._names:
            self._names[tensor.op] = self._op_name(tensor.op) == b"MUL_MAT"
        if not self._names[tensor.op]:
            return not ask
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        if not name.endswith(".weight"):
            return not ask
        if not ask:
            self._add(name, inputs)
        return True

    def _add(self, name: str, inputs: capi.Tensor) -> None:
        width, rows = int(inputs.ne[0]), int(inputs.ne[1] * inputs.ne[2] * inputs.ne[3])
        if inputs.type != _F32 or inputs.nb[0] != 4 or inputs.nb[1] != width * 4 or not inputs.data:
            self.problem = f"{name}: expected contiguous float32 inputs, got type {inputs.type}"
            return
        values = np.ctypeslib.as_array((ct.c_float * (width * rows)).from_address(inputs.data)).reshape(
            rows, width
        )
        squared = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        if name in self.sums:
            self.sums[name] += squared
        else:
            self.sums[name] = squared
        self.rows[name] = self.rows.get(name, 0) + rows


def collect_imatrix(
    path: Path, token_ids: Sequence[int], *, window_tokens: int = 256, threads: int = 1
) -> Imatrix:
    """Run a calibration text and collect the importance matrix.

    Args:
        path: GGUF file, best of high precision. Mixture-of-experts products are not collected.
        token_ids: the text, at least one window.
        window_tokens: tokens of one independent window; a shorter rest is left out.
        threads: compute threads.

    Raises:
        BuildError: fewer tokens than a window, or the graph holds its inputs in another form.
    """
    if len(token_ids) < window_tokens:
        raise BuildError(
            f"imatrix: expected at least {window_tokens} calibration tokens, got {len(token_ids)}",
            hint="give more calibration text",
        )
    collector = _Collector()
    windows = len(token_ids) // window_tokens
    with LogitModel(path, context_tokens=window_tokens, threads=threads, on_node=collector) as model:
        for index in range(windows):
            model.logits(token_ids[index * window_tokens : (index + 1) * window_tokens])
    if collector.problem or not collector.sums:
        raise BuildError(f"imatrix: {collector.problem or 'no matrix product was seen'}", hint="report it")
    means = {
        name: (total / collector.rows[name]).astype(np.float32) for name, total in collector.sums.items()
    }
    return Imatrix(means, windows * window_tokens)

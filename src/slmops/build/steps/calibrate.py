"""Statistics of every weight matrix's inputs on the calibration text: the importance matrix and what error feedback needs.

The importance matrix holds the mean square of each input, the Hessian the mean product of each pair of inputs: one is the
other's diagonal, so one run gives both.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.build.graph import StepContext
from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.imatrix import collect_hessians

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

USES = (
    "slmops.runtimes.llama_cpp.imatrix",
    "slmops.runtimes.llama_cpp.logits",
    "slmops.runtimes.llama_cpp.native",
)
WINDOW_TOKENS = 256
LIMIT_BYTES = 1 << 30


def imatrix(context: StepContext) -> dict[str, Any]:
    """Collect them. Files in: ``model``, ``text``; out: ``imatrix.npz``, one float32 vector a tensor, and ``hessians.npz``.

    Params: ``limit_bytes`` (memory for sums, default 1 GiB). Value: ``tokens``, ``tensors``, and ``inputs``: tensor to the
    name under which its Hessian is kept (matrices with the same input share one).
    """
    sequences = json.loads(context.files["text"].read_text(encoding="utf-8"))
    token_ids = [token for sequence in sequences for token in sequence]
    window = min(WINDOW_TOKENS, len(token_ids))
    if window < 2:
        raise BuildError(
            "the calibration text has no tokens", hint="give some 100 sentences in task.calibration"
        )
    context.progress(None, f"{len(token_ids)} calibration tokens")
    vectors: dict[str, NDArray[np.float32]] = {}
    inputs: dict[str, str] = {}
    collected = collect_hessians(
        context.files["model"],
        token_ids,
        window_tokens=window,
        threads=1,
        limit_bytes=int(context.params.get("limit_bytes", LIMIT_BYTES)),
    )
    with zipfile.ZipFile(context.out / "hessians.npz", "w", zipfile.ZIP_STORED) as sink:
        for hessian in collected:
            first = hessian.tensors[0]
            inputs |= dict.fromkeys(hessian.tensors, first)
            vectors |= dict.fromkeys(hessian.tensors, np.diag(hessian.matrix).copy())
            with sink.open(zipfile.ZipInfo(f"{first}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, packed(hessian.matrix), allow_pickle=False)
    _write(context.out / "imatrix.npz", vectors)
    tokens = len(token_ids) // window * window
    return {"tokens": tokens, "tensors": len(vectors), "inputs": dict(sorted(inputs.items()))}


def packed(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The upper triangle of a symmetric matrix, row by row."""
    triangle: NDArray[np.float32] = matrix[np.triu_indices(len(matrix))]
    return triangle


def unpacked(triangle: NDArray[np.float32]) -> NDArray[np.float32]:
    """The symmetric matrix of :func:`packed`."""
    size = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    matrix: NDArray[np.float32] = np.zeros((size, size), dtype=np.float32)
    matrix[np.triu_indices(size)] = triangle
    matrix += np.triu(matrix, 1).T
    return matrix


class Hessians:
    """What :func:`imatrix` collected, read one at a time.

    Args:
        path: ``hessians.npz``.
        inputs: tensor to name, from the step's value.
    """

    def __init__(self, path: Path, inputs: Mapping[str, str]) -> None:
        self._path = path
        self._inputs = inputs
        self._last: tuple[str, NDArray[np.float32]] | None = None

    def triangle(self, tensor: str) -> NDArray[np.float32] | None:
        """The upper triangle of a tensor's Hessian; None when its inputs were not seen (an embedding that is only looked up)."""
        name = self._inputs.get(tensor)
        if name is None:
            return None
        if self._last is None or self._last[0] != name:
            with np.load(self._path) as stored:
                self._last = name, stored[name]
        return self._last[1]

    def name(self, tensor: str) -> str | None:
        """What tensors with the same input have in common."""
        return self._inputs.get(tensor)


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """Tensor name to mean squared activations, shape (columns,)."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def _write(path: Path, vectors: dict[str, NDArray[np.float32]]) -> None:
    np.savez(path, **{name: vectors[name] for name in sorted(vectors)})  # type: ignore[arg-type]

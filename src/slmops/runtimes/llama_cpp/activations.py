"""Second moments of what flows into weight matrices: for each, the sum over tokens of x xᵀ. For build: needs numpy.

Where the importance matrix (:mod:`.imatrix`) keeps the squares of single inputs, this keeps how inputs go together, which is what
it takes to make up for one with the others. Collected in the engine while it computes, by the same graph callback.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp import capi
from slmops.runtimes.llama_cpp.logits import LogitModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

_F32 = 0
#: tokens of one decode: large products are cheaper a token, and no score is compared with another's here
BATCH_TOKENS = 256


class _Moments:
    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(name.encode() for name in names)
        self.sums: dict[str, NDArray[np.float32]] = {}
        self.problem = ""
        self._product: dict[int, bool] = {}
        self._op_name = capi.library().ggml_op_name

    def __call__(self, tensor: capi.Tensor, ask: bool) -> bool:
        """See `NativeContext`: keep the matrix products with the named weights."""
        if tensor.op not in self._product:
            self._product[tensor.op] = self._op_name(tensor.op) == b"MUL_MAT"
        if not self._product[tensor.op] or tensor.src[0].contents.name not in self.names:
            return not ask
        if not ask:
            self._add(tensor.src[0].contents.name.decode(), tensor.src[1].contents)
        return True

    def _add(self, name: str, inputs: capi.Tensor) -> None:
        width, rows = int(inputs.ne[0]), int(inputs.ne[1] * inputs.ne[2] * inputs.ne[3])
        if inputs.type != _F32 or inputs.nb[0] != 4 or inputs.nb[1] != width * 4 or not inputs.data:
            self.problem = f"{name}: expected contiguous float32 inputs, got type {inputs.type}"
            return
        # Shape: (rows, width)
        values = np.ctypeslib.as_array((ct.c_float * (width * rows)).from_address(inputs.data)).reshape(
            rows, width
        )
        product = values.T @ values
        if name in self.sums:
            self.sums[name] += product
        else:
            self.sums[name] = product


def collect_moments(
    path: Path, sequences: Sequence[Sequence[int]], names: Collection[str], *, threads: int = 1
) -> dict[str, NDArray[np.float32]]:
    """Run independent sequences and sum x xᵀ for the inputs of some weight matrices.

    Args:
        path: GGUF file, best of high precision.
        sequences: token ids, each of at least one token.
        names: tensor names of the weights; n inputs cost 4 n² bytes each, so take a few at a time of a large model.
        threads: compute threads.

    Returns: tensor name to shape (n, n).

    Raises:
        BuildError: a weight takes part in no product, or the graph holds its inputs in another form.
    """
    collector = _Moments(names)
    longest = max((len(sequence) for sequence in sequences), default=0)
    if longest:
        with LogitModel(
            path, context_tokens=longest, threads=threads, on_node=collector, batch_tokens=BATCH_TOKENS
        ) as model:
            for sequence in sequences:
                model.logits(
                    sequence
                )  # all positions: the last block is computed only where logits are asked for
    missing = sorted(set(names) - set(collector.sums))
    if collector.problem or missing:
        raise BuildError(
            f"activations: {collector.problem or f'no product with {missing[0]} was seen'}", hint="report it"
        )
    return collector.sums

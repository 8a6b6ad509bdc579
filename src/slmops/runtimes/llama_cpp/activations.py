"""Second moments of what flows into weight matrices: for each, the sum over tokens of x xᵀ. For build: needs numpy.

Where the importance matrix (:mod:`.imatrix`) keeps the squares of single inputs, this keeps how inputs go together, which is what
it takes to make up for one with the others. Collected in the engine while it computes, by the same graph callback.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.imatrix import Collector
from slmops.runtimes.llama_cpp.logits import LogitModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: tokens of one decode: large products are cheaper a token, and no score is compared with another's here
BATCH_TOKENS = 256


class _Moments(Collector):
    """Sums the products of inputs, of the named weights only."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)
        self.moments: dict[str, NDArray[np.float32]] = {}

    def _wants(self, name: str) -> bool:
        return name in self.names

    def _take(self, name: str, address: int, values: NDArray[np.float32]) -> None:
        product = values.T @ values  # Shape: (width, width)
        if name in self.moments:
            self.moments[name] += product
        else:
            self.moments[name] = product


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
                model.evaluate(sequence, every_position=True)
    missing = sorted(set(names) - set(collector.moments))
    if collector.problem or missing:
        raise BuildError(
            f"activations: {collector.problem or f'no product with {missing[0]} was seen'}", hint="report it"
        )
    return collector.moments

"""Importance matrix of a GGUF model: the mean squared input of every weight matrix. For build: needs numpy.

Same quantity as llama.cpp's imatrix tool (`tools/imatrix/imatrix.cpp` in the sdist): for each matrix product
`weight @ input`, the sum over tokens of input squared, divided by the tokens seen. It is the diagonal of the mean
outer product of the inputs, the Hessian of a layer's squared output error, which error feedback needs whole.
"""

from __future__ import annotations

import ctypes as ct
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
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


@dataclass(frozen=True)
class Hessian:
    """Mean outer product of one input, which several weight matrices may share (queries, keys and values do).

    Attributes:
        tensors: the matrices that it goes into, the first seen first.
        matrix: (n_per_row, n_per_row), float32, symmetric.
    """

    tensors: tuple[str, ...]
    matrix: NDArray[np.float32] = field(repr=False)


class Collector:
    """Sees every matrix product with a wanted weight; what it keeps of the inputs is up to ``_take``.

    Nothing is wanted after the last of these inputs, so from the second run on the engine stops there: the product with the
    output matrix (62 % of the work in Gemma 3 270M) is not needed to know what flows into it.
    """

    def __init__(self) -> None:
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.rows: dict[str, int] = {}
        self.problem = ""
        lib = capi.library()
        self._names: dict[int, bool] = {}
        self._op_name = lib.ggml_op_name
        self._nodes: Counter[bytes] = Counter()
        #: the last wanted weight, and the node that flows into it
        self._last: tuple[str, bytes] | None = None
        self._stop_at: bytes | None = None

    def stop_early(self) -> None:
        """Call it after one whole run: the next ones, of the same graph, end where nothing is wanted any more."""
        if self._last is not None and self._last[1] and self._nodes[self._last[1]] == 1:
            self._stop_at = self._last[1]

    def __call__(self, tensor: capi.Tensor, ask: bool) -> bool:
        """See `NativeContext`: keep every matrix product with a weight of the file."""
        if self._stop_at is not None:
            if tensor.name == self._stop_at:
                if not ask and self._last is not None:
                    self._add(self._last[0], tensor)
                return ask  # once it was shown: no, which ends the computation
        elif ask:
            self._nodes[tensor.name] += 1
        if tensor.op not in self._names:
            self._names[tensor.op] = self._op_name(tensor.op) == b"MUL_MAT"
        if not self._names[tensor.op]:
            return not ask
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        if not self._wants(name):
            return not ask
        if not ask:
            self._add(name, inputs)
            if self._stop_at is None:
                self._last = name, inputs.name
        return True

    def _wants(self, name: str) -> bool:
        return name.endswith(".weight")

    def _add(self, name: str, inputs: capi.Tensor) -> None:
        width, rows = int(inputs.ne[0]), int(inputs.ne[1] * inputs.ne[2] * inputs.ne[3])
        if inputs.type != _F32 or inputs.nb[0] != 4 or inputs.nb[1] != width * 4 or not inputs.data:
            self.problem = f"{name}: expected contiguous float32 inputs, got type {inputs.type}"
            return
        values = np.ctypeslib.as_array((ct.c_float * (width * rows)).from_address(inputs.data)).reshape(
            rows, width
        )
        self._take(name, ct.addressof(inputs), values)

    def _take(self, name: str, address: int, values: NDArray[np.float32]) -> None:
        del address  # of the input, for those who care which matrices share it
        rows = len(values)
        squared = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        if name in self.sums:
            self.sums[name] += squared
        else:
            self.sums[name] = squared
        self.rows[name] = self.rows.get(name, 0) + rows


class _HessianCollector(Collector):
    """Outer products of as many inputs as fit; each input once, however many matrices it goes into.

    Args:
        done: matrices whose input is known already.
        limit_bytes: room for sums; one is always taken.
        only: matrices whose input is wanted; None for all.
    """

    def __init__(self, done: Collection[str], limit_bytes: int, only: Collection[str] | None = None) -> None:
        super().__init__()
        self._only = only
        self.products: dict[str, NDArray[np.float32]] = {}
        self.first_of: dict[str, str] = {}
        self.left_out = False
        self._done = done
        self._limit_bytes = limit_bytes
        self._graph: dict[
            int, str
        ] = {}  # address of an input to the first matrix of this graph that it goes into
        self._seen: set[str] = set()

    def _wants(self, name: str) -> bool:
        return super()._wants(name) if self._only is None else name in self._only

    def _take(self, name: str, address: int, values: NDArray[np.float32]) -> None:
        if name in self._seen:  # the next graph: addresses are given anew
            self._graph.clear()
            self._seen.clear()
        self._seen.add(name)
        if name in self._done:
            return
        first = self.first_of.setdefault(name, self._graph.setdefault(address, name))
        if first != name:
            return
        if first not in self.products:
            used_bytes = sum(product.nbytes for product in self.products.values())
            if self.products and used_bytes + 4 * values.shape[1] ** 2 > self._limit_bytes:
                self.left_out = True
                return
            self.products[first] = np.zeros((values.shape[1], values.shape[1]), dtype=np.float32)
        self.products[first] += values.T @ values
        self.rows[first] = self.rows.get(first, 0) + len(values)


def collect_hessians(
    path: Path,
    token_ids: Sequence[int],
    *,
    window_tokens: int = 256,
    threads: int = 1,
    limit_bytes: int = 1 << 30,
    only: Collection[str] | None = None,
) -> Iterator[Hessian]:
    """Run a calibration text and collect every input's mean outer product.

    Args:
        path: GGUF file, best of high precision.
        token_ids: the text, at least one window.
        window_tokens: tokens of one independent window; a shorter rest is left out.
        threads: compute threads.
        limit_bytes: memory for sums; when all do not fit, the text is run again for the rest.
        only: matrices whose inputs are wanted; None for all.

    Raises:
        BuildError: as :func:`collect_imatrix`.
    """
    done: set[str] = set()
    while True:
        collector = _HessianCollector(done, limit_bytes, only)
        _run(collector, path, token_ids, window_tokens, threads)
        for first, product in collector.products.items():
            tensors = tuple(name for name, one in collector.first_of.items() if one == first)
            done.update(tensors)
            yield Hessian(tensors, product / np.float32(collector.rows[first]))
        if not collector.left_out:
            return


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
    collector = Collector()
    windows = _run(collector, path, token_ids, window_tokens, threads)
    if not collector.sums:
        raise BuildError("imatrix: no matrix product was seen", hint="report it")
    means = {
        name: (total / collector.rows[name]).astype(np.float32) for name, total in collector.sums.items()
    }
    return Imatrix(means, windows * window_tokens)


def _run(collector: Collector, path: Path, token_ids: Sequence[int], window_tokens: int, threads: int) -> int:
    """Show a collector every window of a text; gives their number."""
    if len(token_ids) < window_tokens:
        raise BuildError(
            f"imatrix: expected at least {window_tokens} calibration tokens, got {len(token_ids)}",
            hint="give more calibration text",
        )
    windows = len(token_ids) // window_tokens
    with LogitModel(
        path, context_tokens=window_tokens, threads=threads, on_node=collector, batch_tokens=window_tokens
    ) as model:
        for index in range(windows):
            model.evaluate(
                token_ids[index * window_tokens : (index + 1) * window_tokens], every_position=True
            )
            collector.stop_early()
    if collector.problem:
        raise BuildError(f"imatrix: {collector.problem}", hint="report it")
    return windows

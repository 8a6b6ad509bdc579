"""The child of the ExecuTorch runtime: `python -m slmops.runtimes.executorch.engine`.

The binding is the wheel's ``_C`` module, loaded after torch as it wants; kernels are registered from their shared
libraries, because the Python modules around them import the compiler. With them a child without
a model has some 145 MB of its own, torch nearly all of it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmops.core.errors import RuntimeLoadError
from slmops.runtimes.token_loop.model import Logits, ModelCard
from slmops.runtimes.token_loop.server import serve

#: attention with a cache; and embeddings in few bits, which an 8da4w program cannot run without (error 0x14)
_KERNELS = (
    "extension/llm/custom_ops/libcustom_ops_aot_lib.so",
    "kernels/quantized/libquantized_ops_aot_lib.so",
)
_MAX_CHUNK_TOKENS = 64


class ExecutorchModel:
    """A loaded program, which is one sequence; see `TokenModel`."""

    max_sequences: int | None = 1
    max_chunk_tokens: int

    def __init__(self, spec: dict[str, Any], card: ModelCard) -> None:
        import torch  # noqa: PLC0415 - after the limits are in force, and before the binding, which needs it loaded

        torch.set_num_threads(spec["threads"])
        from executorch.extension.pybindings import _C  # noqa: PLC0415

        for kernels in _KERNELS:
            torch.ops.load_library(str(_folder_of("executorch") / kernels))
        self._torch = torch
        _set_threads(_C, spec["threads"])  # before the program, whose delegate keeps the pool that it met
        self._program = _C._load_for_executorch(spec["model_path"])
        facts = {
            name: self._program.run_method(name, [])[0]
            for name in self._program.method_names()
            if name != "forward"
        }
        if not facts.get("use_kv_cache", True):
            raise RuntimeLoadError(
                "the program was exported without use_kv_cache", hint="export it with a KV cache"
            )
        room = min(int(facts.get("get_max_context_len", card.context_tokens)), card.context_tokens)
        if spec["context_tokens"] > room:
            raise RuntimeLoadError(
                f"context_tokens: {spec['context_tokens']} asked, the program holds {room}",
                hint="ask for less",
            )
        # its dynamic length ends one before what it was exported for
        longest = int(facts.get("get_max_seq_len", _MAX_CHUNK_TOKENS + 1)) - 1
        self.max_chunk_tokens = max(min(_MAX_CHUNK_TOKENS, longest), 1)
        self.vocab_tokens = card.vocab_tokens
        probe = self.evaluate([0, 0], 0)  # a program that loads and cannot run is refused here
        self.gives_all_rows = len(probe) == 2
        width = probe.shape[-1]
        if width != self.vocab_tokens:
            raise RuntimeLoadError(
                f"expected {self.vocab_tokens} logits, the program gives {width}", hint="export it again"
            )

    def evaluate(self, token_ids: Sequence[int], position: int) -> Logits:
        """Logits from `position` on: (n, vocab), or (1, vocab) where the program gives those of the last token only."""
        tokens = self._torch.tensor([list(token_ids)], dtype=self._torch.long)
        at = self._torch.tensor([position], dtype=self._torch.long)
        rows = self._program.forward((tokens, at))[0].float().numpy()
        return np.array(rows, dtype=np.float32).reshape(-1, rows.shape[-1])

    def open_sequence(self) -> ExecutorchSequence:
        """The program's one sequence."""
        return ExecutorchSequence(self)


class ExecutorchSequence:
    """A position in the program's cache; see `TokenSequence`."""

    def __init__(self, model: ExecutorchModel) -> None:
        self._model = model
        self._length = 0

    def append(self, token_ids: Sequence[int]) -> Logits:
        """See `TokenSequence`."""
        rows = self._model.evaluate(token_ids, self._length)
        self._length += len(token_ids)
        last: Logits = rows[-1]
        return last

    def append_all(self, token_ids: Sequence[int]) -> Logits:
        """See `TokenSequence`; token by token where the program was exported without ``generate_full_logits``."""
        if self._model.gives_all_rows:
            rows = self._model.evaluate(token_ids, self._length)
            self._length += len(token_ids)
            return rows
        return np.stack([self.append([token]) for token in token_ids])

    def rewind(self, length_tokens: int) -> None:
        """See `TokenSequence`: what lies behind the position is overwritten before it is read."""
        self._length = length_tokens

    def close(self) -> None:
        """See `TokenSequence`."""


def _folder_of(distribution: str) -> Path:
    spec = importlib.util.find_spec(distribution)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeLoadError(f"{distribution} is not installed", hint="install its extra")
    return Path(next(iter(spec.submodule_search_locations)))


def _set_threads(binding: Any, threads: int) -> None:
    """ExecuTorch's own pool takes every core unless told; the binding tells it in some builds only."""
    if hasattr(binding, "_unsafe_reset_threadpool"):
        binding._unsafe_reset_threadpool(threads)


if __name__ == "__main__":
    sys.exit(serve(ExecutorchModel))

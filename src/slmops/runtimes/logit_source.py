"""The port for full logits: what a build measures divergence and perplexity through, whatever runtime a variant is for.

Unlike :class:`slmops.runtimes.ports.Engine` it runs in the calling process, needs numpy, and never runs on a device. A runtime
that can give logits has a method ``open_logits``; llama.cpp and the shipped fake do. Rules, pinned by
``tests/contract/test_logit_contract.py``:

- Row i of the logits speaks of token i + 1 and depends on tokens 0..i only.
- The same file, tokens and settings give the same bits.
- They are the logits of what the runtime serves: its ``Engine.score`` agrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from slmops.core.errors import UsageError
from slmops.runtimes.registry import load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@runtime_checkable
class LogitSource(Protocol):
    """A model file that gives every position's logits. A context manager; one caller at a time."""

    vocab_tokens: int
    context_tokens: int

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position of one sequence.

        Args:
            token_ids: 1..`context_tokens` ids.

        Returns: shape (len(token_ids), vocab_tokens), the caller's own.

        Raises:
            UsageError: too long, empty, or an id outside the vocabulary.
        """
        ...

    def close(self) -> None:
        """Free the model; safe to repeat."""
        ...

    def __enter__(self) -> LogitSource:
        """Give itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        ...


@runtime_checkable
class LogitRuntime(Protocol):
    """A runtime that can give logits."""

    def open_logits(
        self, path: Path, *, context_tokens: int, threads: int = 1, kv_cache: str = "f16"
    ) -> LogitSource:
        """Open a model file.

        Raises:
            RuntimeLoadError: it cannot be loaded, or the binding is missing.
        """
        ...


def open_logits(
    runtime: str, path: Path, *, context_tokens: int, threads: int = 1, kv_cache: str = "f16"
) -> LogitSource:
    """Open a model file by a runtime's name.

    Raises:
        NotFoundError: no such runtime.
        UsageError: it cannot give logits.
        RuntimeLoadError: the file cannot be loaded.
    """
    found = load(runtime)
    if not isinstance(found, LogitRuntime):
        raise UsageError(
            f"runtime {runtime!r} gives no logits, which KL divergence and perplexity need",
            hint="measure them with a variant for llama.cpp, or give the adapter an open_logits",
        )
    return found.open_logits(path, context_tokens=context_tokens, threads=threads, kv_cache=kv_cache)

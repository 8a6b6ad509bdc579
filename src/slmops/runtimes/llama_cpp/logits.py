"""Full logits of a GGUF model, in this process. For build: needs numpy.

The agent never imports this; on devices `scorer` gives log-probabilities without numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from slmops.core.errors import UsageError
from slmops.runtimes.llama_cpp.native import (
    SCORE_BATCH_TOKENS,
    EvalCallback,
    NativeContext,
    NativeModel,
    check_token_ids,
)
from slmops.runtimes.ports import AdapterSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LogitWindow:
    """Logits of one independent window of a text.

    Attributes:
        start: index of the window's first token in the text.
        token_ids: the n tokens of the window.
        logits: shape (n, vocab_tokens), float32; row i predicts token i + 1 of the window, the last row what
            follows.
    """

    start: int
    token_ids: tuple[int, ...]
    logits: NDArray[np.float32] = field(repr=False)


class LogitModel:
    """A model that gives every position's logits. Use as a context manager; not thread-safe.

    Args:
        path: GGUF file; must not change meanwhile.
        context_tokens: longest sequence.
        threads: compute threads.
        kv_cache: element type of the KV cache.
        adapters: LoRA files to apply.
        on_node: see `NativeContext`.
        repack: rearrange the weights for this CPU: faster for some types, costs private memory.
        batch_tokens: tokens of one decode. The default gives the bits that `Engine.score` gives; 256 is some
            15 % faster, for bulk comparisons in which every model uses the same.

    Raises:
        RuntimeLoadError: llama.cpp refused the file.
    """

    def __init__(  # noqa: PLR0913 - settings of one context, by keyword
        self,
        path: Path,
        *,
        context_tokens: int = 512,
        threads: int = 1,
        kv_cache: str = "f16",
        adapters: Sequence[AdapterSpec] = (),
        on_node: EvalCallback | None = None,
        repack: bool = False,
        batch_tokens: int = SCORE_BATCH_TOKENS,
    ) -> None:
        self.path = path
        self.context_tokens = context_tokens
        self._model = NativeModel(path, repack=repack)
        try:
            self._context = NativeContext(
                self._model,
                context_tokens=context_tokens,
                batch_tokens=min(batch_tokens, context_tokens),
                output_tokens=min(batch_tokens, context_tokens),
                threads=threads,
                kv_cache=kv_cache,
                adapters=adapters,
                on_node=on_node,
            )
        except BaseException:
            self._model.close()
            raise
        self.vocab_tokens = self._model.vocab_tokens
        self.n_layers = self._model.n_layers
        self.n_heads = self._model.n_heads
        self.n_kv_heads = self._model.n_kv_heads
        self.n_embd = self._model.n_embd
        self.head_dim = self._model.head_dim
        self.parameters = self._model.parameters
        self.model_bytes = self._model.model_bytes
        self.train_context_tokens = self._model.train_context_tokens
        self.bos_token = self._model.bos_token
        self.eos_token = self._model.eos_token

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text."""
        return self._model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens shown."""
        return self._model.detokenize(token_ids)

    def is_end(self, token_id: int) -> bool:
        """Tell whether a token ends a generation."""
        return self._model.is_end(token_id)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position of one sequence.

        Args:
            token_ids: 1..`context_tokens` ids.

        Returns: shape (len(token_ids), vocab_tokens), float32, the caller's own.

        Raises:
            UsageError: too long, empty, or an id outside the vocabulary.
        """
        self._check(token_ids)
        result = np.empty((len(token_ids), self.vocab_tokens), dtype=np.float32)
        for position, rows, pointer in self._context.chunks(token_ids, 0, len(token_ids)):
            result[position : position + rows] = np.ctypeslib.as_array(pointer, (rows, self.vocab_tokens))
        return result

    def evaluate(self, token_ids: Sequence[int], *, every_position: bool = False) -> None:
        """Run a sequence for its side effects (`on_node`).

        Args:
            token_ids: see `logits`.
            every_position: ask for the logits of all: the last block is computed only where logits are asked for.
        """
        self._check(token_ids)
        start = 0 if every_position else len(token_ids) - 1
        for _ in self._context.chunks(token_ids, start, len(token_ids)):
            pass

    def greedy(self, token_ids: Sequence[int], *, max_tokens: int, stop_ids: Sequence[int] = ()) -> list[int]:
        """Continue a sequence by the most likely tokens.

        Stops before a token of `stop_ids`, before the model's own end tokens, after `max_tokens`, or at the
        context's end.

        Raises:
            UsageError: as `logits`.
        """
        self._check(token_ids)
        stops = set(stop_ids)
        answer: list[int] = []
        count = len(token_ids)
        ((_, _, pointer),) = list(self._context.chunks(token_ids, count - 1, count))
        while len(answer) < max_tokens:
            best = int(np.ctypeslib.as_array(pointer, (self.vocab_tokens,)).argmax())
            if best in stops or self.is_end(best) or count >= self.context_tokens:
                break
            answer.append(best)
            pointer = self._context.decode([best], count, 1)
            count += 1
        return answer

    def _check(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise UsageError("logits: expected at least one token, got none", hint="tokenise a text first")
        check_token_ids(
            [token_ids[0], *token_ids] if len(token_ids) == 1 else token_ids,
            vocab_tokens=self.vocab_tokens,
            context_tokens=max(self.context_tokens, 2),
            start=1,
        )

    def close(self) -> None:
        """Free the model."""
        self._context.close()
        self._model.close()

    def __enter__(self) -> LogitModel:
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def iter_logits(
    model: Path | LogitModel, token_ids: Sequence[int], window_tokens: int = 256, *, threads: int = 1
) -> Iterator[LogitWindow]:
    """Logits of a text in independent windows without overlap; a last window of one token is left out.

    Args:
        model: a model, or a file that is opened for this call.
        token_ids: the text.
        window_tokens: at most the model's `context_tokens`.
        threads: for a file.
    """
    if isinstance(model, LogitModel):
        for start in range(0, len(token_ids) - 1, window_tokens):
            part = token_ids[start : start + window_tokens]
            yield LogitWindow(start, tuple(part), model.logits(part))
    else:
        with LogitModel(model, context_tokens=window_tokens, threads=threads) as opened:
            yield from iter_logits(opened, token_ids, window_tokens)

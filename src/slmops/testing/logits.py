"""Full logits of the scripted model of :mod:`slmops.testing.engine`, in this process. Needs numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from slmops.core.errors import RuntimeLoadError, UsageError
from slmops.testing.engine_child import VOCAB_TOKENS, FakeModel

if TYPE_CHECKING:
    from numpy.typing import NDArray


class FakeLogits:
    """See :class:`slmops.runtimes.logit_source.LogitSource`; the distribution is the one that the fake engine scores by.

    Raises:
        RuntimeLoadError: the file is no fake model.
    """

    def __init__(self, path: Path, *, context_tokens: int) -> None:
        try:
            self._model = FakeModel(path, [])
        except (OSError, ValueError) as error:
            raise RuntimeLoadError(
                f"{path.name!r} is no fake model: {error}", hint="check the path"
            ) from error
        self.vocab_tokens = VOCAB_TOKENS
        self.context_tokens = context_tokens

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities: the greedy token has the script's confidence, the others share the rest."""
        if not 1 <= len(token_ids) <= self.context_tokens or not all(
            0 <= token < VOCAB_TOKENS for token in token_ids
        ):
            raise UsageError(
                f"logits: expected 1..{self.context_tokens} ids in 0..{VOCAB_TOKENS - 1}, got {len(token_ids)} ids",
                hint="tokenise with this model",
            )
        other = math.log((1 - self._model.confidence) / (VOCAB_TOKENS - 1))
        rows = np.full((len(token_ids), VOCAB_TOKENS), other, dtype=np.float32)
        for at in range(len(token_ids)):
            rows[at, self._model.greedy(token_ids[: at + 1])] = math.log(self._model.confidence)
        return rows

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> FakeLogits:
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""

"""A quick measure: the KL divergence of one model after another from the same first one, on a little calibration text.

Used inside steps that decide by measurement, always on calibration text, never on the held-out text that judges the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slmops.build.steps.divergence import compact, divergence, log_softmax
from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.logits import LogitModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

LONGEST_TOKENS = 256


class Probe:
    """Distributions of a first model, kept compactly, and how far others are from them.

    Args:
        path: the first model.
        sequences: token ids that every compared model understands alike.
    """

    def __init__(self, path: Path, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = [list(sequence) for sequence in sequences]
        self.tokens = sum(map(len, self.sequences))
        self._exact = [compact(rows) for rows in _logprobs(path, self.sequences)]

    def divergence(self, path: Path, tokens: int | None = None) -> float:
        """Mean KL divergence of a model, nats a token.

        Args:
            path: the model.
            tokens: take the first sequences that hold so many; None for all.
        """
        count = 0
        for chosen, sequence in enumerate(self.sequences, start=1):  # noqa: B007 - its last value is used
            count += len(sequence)
            if tokens is not None and count >= tokens:
                break
        rows = _logprobs(path, self.sequences[:chosen])
        measured = [
            divergence(ids, kept, logprobs)
            for (ids, kept), logprobs in zip(self._exact[:chosen], rows, strict=True)
        ]
        return float(np.concatenate(measured).mean())


def probe_sequences(text: Path, tokens: int) -> list[list[int]]:
    """The first calibration sequences that hold so many tokens, each cut to 256.

    Raises:
        BuildError: there is no text.
    """
    chosen: list[list[int]] = []
    for sequence in json.loads(text.read_text(encoding="utf-8")):
        left = tokens - sum(map(len, chosen))
        if left < 2:
            break
        part = sequence[: min(LONGEST_TOKENS, left)]
        if len(part) > 1:
            chosen.append(part)
    if not chosen:
        raise BuildError(
            "the calibration text has no tokens", hint="give some 100 sentences in task.calibration"
        )
    return chosen


def _logprobs(path: Path, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    longest = max(len(sequence) for sequence in sequences)
    with LogitModel(path, context_tokens=math.ceil(longest / 64) * 64, threads=1) as model:
        return [log_softmax(model.logits(sequence)) for sequence in sequences]

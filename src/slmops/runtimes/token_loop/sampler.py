"""From logits to a token: llama.cpp's samplers in their order and with its defaults, so that every runtime is alike.

Order: bias, penalties, top-k, top-p, min-p, temperature (llama.cpp ``common/sampling.cpp``: its default chain without
the samplers that are off). Temperature 0 is the argmax; ties go to the lower id. Two differences, both OpenAI's
meaning: presence and frequency penalties count the answer only, and log-probabilities are the model's before any
of this.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_REPEAT_WINDOW_TOKENS = 64


@dataclass(frozen=True)
class Sampling:
    """How to choose. Defaults are llama.cpp's.

    Attributes:
        temperature: 0 for the best token always.
        top_k: keep so many; 0 or less keeps all.
        top_p: keep the smallest set with this much probability, 0..1.
        min_p: keep tokens at least this likely relative to the best.
        presence_penalty, frequency_penalty: OpenAI's, on the answer so far.
        repeat_penalty: llama.cpp's, on the last 64 tokens of prompt and answer; 1 is off.
        seed: of the choice; None for a fresh one.
        bias: added to logits by token id; minus infinity bans a token.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)


class Sampler:
    """One answer's chooser: its random state and what was said so far."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._how = sampling
        seed = None if sampling.seed is None else sampling.seed & ((1 << 64) - 1)
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._said: Counter[int] = Counter()
        self._recent = deque(prompt[-_REPEAT_WINDOW_TOKENS:], maxlen=_REPEAT_WINDOW_TOKENS)

    def choose(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token. Changes `logits`.

        Args:
            logits: shape (vocab,).
            allowed: shape (vocab,), False for what a grammar forbids; None allows all.
        """
        self._adjust(logits)
        if allowed is not None:
            logits[~allowed[: logits.size]] = -np.inf
        return self._pick(logits)

    def accept(self, token: int) -> None:
        """Remember what was said."""
        self._said[token] += 1
        self._recent.append(token)

    def _adjust(self, logits: NDArray[np.float32]) -> None:
        how = self._how
        for token, value in how.bias.items():
            if 0 <= token < logits.size:
                logits[token] += value
        if how.repeat_penalty != 1.0 and self._recent:
            ids = np.unique(np.fromiter(self._recent, dtype=np.int64))
            ids = ids[ids < logits.size]
            values = logits[ids]
            logits[ids] = np.where(values > 0, values / how.repeat_penalty, values * how.repeat_penalty)
        if (how.presence_penalty or how.frequency_penalty) and self._said:
            for token, count in self._said.items():
                logits[token] -= how.presence_penalty + how.frequency_penalty * count

    def _pick(self, logits: NDArray[np.float32]) -> int:
        how = self._how
        if how.temperature <= 0 or how.top_k == 1:
            return int(np.argmax(logits))
        size = logits.size
        count = size if how.top_k <= 0 else min(how.top_k, size)
        ids = np.argpartition(logits, size - count)[size - count :] if count < size else np.arange(size)
        ids = ids[
            np.lexsort((ids, -logits[ids]))
        ]  # best first, ties by id: the same whatever the partition did
        kept = logits[ids].astype(np.float64)
        chances = np.exp(kept - kept[0])
        if how.top_p < 1.0:
            share = np.cumsum(chances / chances.sum())
            keep = int(np.searchsorted(share, how.top_p)) + 1
            ids, kept, chances = ids[:keep], kept[:keep], chances[:keep]
        if how.min_p > 0.0:
            likely = chances >= how.min_p  # relative to the best, which is 1
            ids, kept = ids[likely], kept[likely]
        chances = np.exp((kept - kept[0]) / how.temperature)
        share = np.cumsum(chances / chances.sum())
        return int(ids[min(int(np.searchsorted(share, self._random.random(), side="right")), ids.size - 1)])


def log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural-log probabilities of the last axis."""
    wide = rows.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result


def best_of(logprobs: NDArray[np.float64], count: int) -> list[tuple[int, float]]:
    """The `count` likeliest (token, log-probability) pairs, best first, ties by id."""
    if count <= 0:
        return []
    count = min(count, logprobs.size)
    ids = np.argpartition(logprobs, logprobs.size - count)[logprobs.size - count :]
    ids = ids[np.lexsort((ids, -logprobs[ids]))]
    return [(int(token), float(logprobs[token])) for token in ids]

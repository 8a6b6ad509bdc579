"""Training examples, and how several of them become one row of tokens.

Owns: reading ``train.jsonl`` lines (messages and answer), turning them into ids, and packing a batch into one
row that needs no padding. The prompts of one recipe start alike (system prompt), so that common start is
computed once per row:

    row:   [ shared start | rest of example 1, answer 1 | rest of example 2, answer 2 | ... ]

Each example sees the shared start and itself, never its neighbours, and positions restart after the shared
start: the result equals one forward pass per example (tests/unit/train/test_packing.py). Only answers carry
loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slmops.core.errors import DocumentError
from slmops.train.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Example:
    """One prompt with its answer, in token ids; the answer ends with the end-of-turn token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Length of both together."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Row:
    """A packed batch.

    Attributes:
        tokens: (t,) int64.
        positions: (t,) int64.
        mask: (t, t) bool, True where the row's token may look at the column's.
        predicts: (n,) int64, indices in the row whose next token carries loss.
        targets: (n,) int64, those next tokens.
        examples: how many examples it holds.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    examples: int


def read_examples(path: Path, tokenizer: ChatTokenizer) -> list[Example]:
    """Read a JSON-lines file of ``{"messages": [...], "answer": "..."}``.

    Raises:
        DocumentError: a line is not such an object; the message starts with file:line:column.
    """
    examples: list[Example] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                messages, answer = entry["messages"], entry["answer"]
                prompt = tokenizer.render(messages)
            except json.JSONDecodeError as error:
                raise DocumentError(
                    f"{path}:{number}:{error.colno}: expected one JSON object, got {error.msg}",
                    hint="write one example a line",
                ) from error
            except (KeyError, TypeError) as error:
                raise DocumentError(
                    f"{path}:{number}:1: expected an object with messages and answer, got {line[:60]!r}",
                    hint="see examples/home-intents/README.md for the line format",
                ) from error
            examples.append(
                Example(tuple(tokenizer.encode(prompt)), tuple(tokenizer.encode(answer + tokenizer.end_text)))
            )
    if not examples:
        raise DocumentError(
            f"{path}:1:1: expected at least one example, got none", hint="generate the training set"
        )
    return examples


def pack(examples: Sequence[Example]) -> Row:
    """Pack examples into one row behind their common start.

    Args:
        examples: at least one; each prompt at least one token long.
    """
    shared = shared_start_tokens([example.prompt for example in examples])
    tokens = list(examples[0].prompt[:shared])
    positions = list(range(shared))
    segments = [0] * shared
    predicts: list[int] = []
    targets: list[int] = []
    for segment, example in enumerate(examples, start=1):
        rest = example.prompt[shared:] + example.answer[:-1]  # the last token predicts nothing
        first = len(tokens) + len(example.prompt) - shared - 1
        predicts.extend(range(first, first + len(example.answer)))
        targets.extend(example.answer)
        tokens.extend(rest)
        positions.extend(range(shared, shared + len(rest)))
        segments.extend([segment] * len(rest))
    of = torch.tensor(segments)
    mask = ((of[:, None] == of[None, :]) | (of[None, :] == 0)).tril()
    return Row(
        torch.tensor(tokens),
        torch.tensor(positions),
        mask,
        torch.tensor(predicts),
        torch.tensor(targets),
        len(examples),
    )


def shared_start_tokens(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return how many first tokens all prompts share, at most all but the last of the shortest prompt."""
    limit = min(len(prompt) for prompt in prompts) - 1
    first, last = min(prompts), max(prompts)
    for index in range(limit):
        if first[index] != last[index]:
            return index
    return limit


def batches(examples: Sequence[Example], row_tokens: int, seed: int) -> Iterator[tuple[int, list[Example]]]:
    """Yield (epoch, examples of one row) for ever, each epoch in a new seeded order.

    Args:
        examples: the training set.
        row_tokens: soft limit of a row's length, counted without sharing.
        seed: the order follows from seed and epoch alone.
    """
    epoch = 0
    batch: list[Example] = []
    filled = 0
    while True:
        order = torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        )
        for index in order.tolist():
            example = examples[index]
            if batch and filled + example.tokens > row_tokens:
                yield epoch, batch
                batch, filled = [], 0
            batch.append(example)
            filled += example.tokens
        epoch += 1

"""Logits and greedy answers of a program that takes a piece of text at a position and keeps its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Program(Protocol):
    """One sequence in a cache; what lies behind a position is overwritten before it is read."""

    def feed(self, token_ids: Sequence[int], position: int) -> Any:
        """Take these tokens from ``position`` on, and give the logits after the last one, shape (vocabulary,)."""
        ...


class WholeProgram(Program, Protocol):
    """A program that gives the logits after every token of a piece."""

    def feed_all(self, token_ids: Sequence[int], position: int) -> Any:
        """As :meth:`feed`, shape (n, vocabulary)."""
        ...


def logits_of(program: Program, token_ids: Sequence[int], first: int) -> Any:
    """Logits at every position from ``first`` on: the text before it in one piece, the rest token by token."""
    import numpy as np

    if first > 0:
        program.feed(token_ids[:first], 0)
    return np.stack([program.feed([token_ids[at]], at) for at in range(first, len(token_ids))])


def logits_in_pieces(program: WholeProgram, token_ids: Sequence[int], first: int) -> Any:
    """As :func:`logits_of`, in as few passes as the program takes."""
    if first > 0:
        program.feed(token_ids[:first], 0)
    return program.feed_all(token_ids[first:], first)


def greedy(
    program: Program, token_ids: Sequence[int], max_tokens: int, ends: set[int], *, context_tokens: int
) -> list[int]:
    """Greedy continuation; ``ends`` stop it and are left out."""
    made: list[int] = []
    row = program.feed(token_ids, 0)
    while len(made) < max_tokens:
        token = int(row.argmax())
        if token in ends:
            break
        made.append(token)
        at = len(token_ids) + len(made) - 1
        if at >= context_tokens or len(made) == max_tokens:
            break
        row = program.feed([token], at)
    return made

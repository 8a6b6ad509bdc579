"""The multiple-choice knapsack: one type for each tensor, least total loss within a byte budget. Exact.

Stages are the tensors; a state is (bytes so far, loss so far). After each stage only Pareto-optimal states
are kept: fewer bytes or less loss. Two bounds keep their number small without giving up exactness:

* a state whose bytes plus the cheapest rest exceed the budget is dropped;
* a state whose loss plus a lower bound on the rest's loss exceeds a solution that is already known is
  dropped. The lower bound is the linear relaxation's, by one multiplier for the budget (Lagrange).

Source: Sinha and Zoltners 1979, The Multiple-Choice Knapsack Problem, Operations Research 27(3); Pisinger
1995, A minimal algorithm for the multiple-choice knapsack problem, section 3, for pruning by the relaxation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BISECTIONS = 60
_PRICE_DOUBLINGS, _PRICE_BISECTIONS = 14, 12


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store one tensor.

    Attributes:
        name: the type's name.
        size_bytes: bytes of the tensor in this type, padding included.
        loss: what it costs, in any unit that adds up over tensors; finite and not negative.
        seconds: what it takes of one token's time, in the same way; 0 when that is not known.
    """

    name: str
    size_bytes: int
    loss: float
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The optimum.

    Attributes:
        picks: for each tensor the index of its option.
        size_bytes: total; ``loss``: total.
    """

    picks: tuple[int, ...]
    size_bytes: int
    loss: float


def smallest(tensors: Sequence[Sequence[Option]]) -> int:
    """Bytes of the smallest possible choice."""
    return sum(min(option.size_bytes for option in options) for options in tensors)


def solve(tensors: Sequence[Sequence[Option]], budget_bytes: int) -> Choice | None:
    """Find the choice of least loss within the budget; None when there is none.

    Ties go to fewer bytes. The result depends on the arguments only.

    Args:
        tensors: for each tensor at least one option.
        budget_bytes: largest total.
    """
    if smallest(tensors) > budget_bytes:
        return None
    sizes = [np.array([option.size_bytes for option in options], dtype=np.int64) for options in tensors]
    losses = [np.array([option.loss for option in options], dtype=np.float64) for options in tensors]
    multiplier, known = _relax(sizes, losses, budget_bytes)
    incumbent = _improve(sizes, losses, known, budget_bytes)
    # what the tensors from stage i on need at least: bytes, and bytes priced by the multiplier
    rest_bytes = _suffix([float(size.min()) for size in sizes])
    rest_price = _suffix(
        [float((loss + multiplier * size).min()) for size, loss in zip(sizes, losses, strict=True)]
    )
    best_loss = float(sum(loss[pick] for loss, pick in zip(losses, incumbent, strict=True)))
    slack = 1e-9 * max(best_loss, 1e-300)

    at_bytes = np.zeros(1, dtype=np.int64)
    at_loss = np.zeros(1, dtype=np.float64)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for stage, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        total_bytes = (at_bytes[:, None] + size[None, :]).ravel()
        total_loss = (at_loss[:, None] + loss[None, :]).ravel()
        origin = np.arange(total_bytes.size, dtype=np.int64)
        left = budget_bytes - total_bytes
        bound = total_loss + np.maximum(rest_price[stage + 1] - multiplier * left, 0.0)
        keep = np.flatnonzero((left >= rest_bytes[stage + 1]) & (bound <= best_loss + slack))
        if keep.size == 0:  # nothing beats what is known already
            break
        order = keep[np.lexsort((total_loss[keep], total_bytes[keep]))]
        best_before = np.minimum.accumulate(np.concatenate(([np.inf], total_loss[order][:-1])))
        front = order[total_loss[order] < best_before]
        at_bytes, at_loss = total_bytes[front], total_loss[front]
        history.append((origin[front] // size.size, origin[front] % size.size))
    else:
        found = int(np.lexsort((at_bytes, at_loss))[0])
        if at_loss[found] <= best_loss + slack:
            incumbent = _trace(history, found)
    picks = tuple(int(pick) for pick in incumbent)
    return Choice(
        picks,
        int(sum(size[pick] for size, pick in zip(sizes, picks, strict=True))),
        float(sum(loss[pick] for loss, pick in zip(losses, picks, strict=True))),
    )


def solve_within_time(
    tensors: Sequence[Sequence[Option]], budget_bytes: int, budget_s: float
) -> tuple[Choice, float] | None:
    """Find the choice of least loss within bytes, with a second price for time; None when the bytes do not suffice.

    The price of a second is raised until the choice is fast enough; at every price the choice is exact. The best choice under
    two limits can be a little better than any that a price gives (it may lie between two prices), never by more than one
    tensor's step. When nothing within the bytes is fast enough, the fastest is given.

    Args:
        tensors: see :func:`solve`, with ``seconds``.
        budget_bytes: largest total.
        budget_s: largest total of seconds.

    Returns: the choice, and its total seconds.
    """

    def priced(price: float) -> tuple[Choice, float] | None:
        table = [
            [Option(o.name, o.size_bytes, o.loss + price * o.seconds, o.seconds) for o in options]
            for options in tensors
        ]
        found = solve(table, budget_bytes)
        if found is None:
            return None
        picked = [options[pick] for options, pick in zip(tensors, found.picks, strict=True)]
        choice = Choice(found.picks, found.size_bytes, sum(option.loss for option in picked))
        return choice, sum(option.seconds for option in picked)

    best = priced(0.0)
    if best is None or best[1] <= budget_s:
        return best
    scale = max(best[0].loss, 1e-9) / max(best[1], 1e-12)
    low, high = 0.0, scale
    fast = priced(high)
    for _ in range(_PRICE_DOUBLINGS):
        if fast is not None and fast[1] <= budget_s:
            break
        low, high = high, high * 4
        fast = priced(high)
    assert fast is not None  # the bytes sufficed at the first price
    if fast[1] > budget_s:
        return fast
    for _ in range(_PRICE_BISECTIONS):
        middle = (low + high) / 2
        found = priced(middle)
        assert found is not None
        if found[1] <= budget_s:
            high = middle
            if found[0].loss <= fast[0].loss:
                fast = found
        else:
            low = middle
    return fast


def _relax(
    sizes: list[NDArray[np.int64]], losses: list[NDArray[np.float64]], budget_bytes: int
) -> tuple[float, list[int]]:
    """Price per byte at which the cheapest choice just fits, and that choice."""

    def choice(price: float) -> list[int]:
        # least priced loss; among equals the smaller, so that the search below ends inside the budget
        return [
            int(np.lexsort((size, loss + price * size))[0]) for size, loss in zip(sizes, losses, strict=True)
        ]

    def total(picks: list[int]) -> int:
        return int(sum(size[pick] for size, pick in zip(sizes, picks, strict=True)))

    free = choice(0.0)
    if total(free) <= budget_bytes:
        return 0.0, free
    high = 1e-12
    while total(choice(high)) > budget_bytes and high < 1e300:
        high *= 16
    low, picks = 0.0, choice(high)
    if total(picks) > budget_bytes:  # losses so large that no price decides: take the smallest of each
        return high, [int(np.lexsort((loss, size))[0]) for size, loss in zip(sizes, losses, strict=True)]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        candidate = choice(middle)
        if total(candidate) <= budget_bytes:
            high, picks = middle, candidate
        else:
            low = middle
    return high, picks


def _improve(
    sizes: list[NDArray[np.int64]], losses: list[NDArray[np.float64]], picks: list[int], budget_bytes: int
) -> list[int]:
    """Spend what is left of the budget, best gain for a byte first: a good solution to prune with."""
    picks = list(picks)
    left = budget_bytes - int(sum(size[pick] for size, pick in zip(sizes, picks, strict=True)))
    while True:
        best: tuple[float, int, int] | None = None
        for index, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
            more = size - size[picks[index]]
            gain = loss[picks[index]] - loss
            for option in np.flatnonzero((gain > 0) & (more <= left)):
                rate = float(gain[option]) / max(float(more[option]), 1e-9)
                if best is None or rate > best[0]:
                    best = (rate, index, int(option))
        if best is None:
            return picks
        _, at, chosen = best
        left -= int(sizes[at][chosen] - sizes[at][picks[at]])
        picks[at] = chosen


def _suffix(values: list[float]) -> NDArray[np.float64]:
    """Sums of values from each index to the end; one longer than ``values``."""
    return np.concatenate((np.cumsum(np.array(values[::-1], dtype=np.float64))[::-1], [0.0]))


def _trace(history: list[tuple[NDArray[np.int64], NDArray[np.int64]]], last: int) -> list[int]:
    picks: list[int] = []
    for parents, options in reversed(history):
        picks.append(int(options[last]))
        last = int(parents[last])
    return picks[::-1]

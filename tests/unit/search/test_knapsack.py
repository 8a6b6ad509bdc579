"""The knapsack is exact, keeps its budget, and says when there is no answer."""

from __future__ import annotations

import itertools
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.core.search.knapsack import Option, smallest, solve, solve_within_time

options = st.lists(
    st.builds(Option, st.just("t"), st.integers(1, 60), st.floats(0, 100, allow_nan=False)),
    min_size=1,
    max_size=4,
)


def by_hand(tensors: list[list[Option]], budget_bytes: int) -> float | None:
    """Least loss by trying everything."""
    losses = [
        sum(option.loss for option in picked)
        for picked in itertools.product(*tensors)
        if sum(option.size_bytes for option in picked) <= budget_bytes
    ]
    return min(losses) if losses else None


@given(st.lists(options, min_size=1, max_size=5), st.integers(1, 250))
@settings(max_examples=300, deadline=None)
def test_least_loss_of_all_choices(tensors: list[list[Option]], budget_bytes: int) -> None:
    """No choice that fits has less loss than the solver's, and the solver's fits."""
    expected = by_hand(tensors, budget_bytes)
    choice = solve(tensors, budget_bytes)
    if expected is None:
        assert choice is None
        return
    assert choice is not None
    picked = [tensor[pick] for tensor, pick in zip(tensors, choice.picks, strict=True)]
    assert sum(option.size_bytes for option in picked) == choice.size_bytes <= budget_bytes
    assert abs(choice.loss - expected) <= 1e-6 * max(expected, 1.0)
    assert abs(sum(option.loss for option in picked) - choice.loss) <= 1e-9


def test_smallest_is_the_edge_of_what_is_possible() -> None:
    """At the smallest total there is an answer, one byte below there is none."""
    tensors = [[Option("a", 10, 5.0), Option("b", 20, 1.0)], [Option("a", 7, 5.0), Option("b", 9, 1.0)]]
    assert smallest(tensors) == 17
    assert solve(tensors, 16) is None
    at_edge = solve(tensors, 17)
    assert at_edge is not None
    assert at_edge.picks == (0, 0)


def test_a_model_sized_problem_is_solved_better_than_greedy() -> None:
    """211 tensors with seven types: every byte of budget is spent or worthless, and more budget never hurts."""
    rng = random.Random(3)
    tensors = []
    for _ in range(211):
        weights = rng.choice([110592, 331776, 884736])
        scale = rng.lognormvariate(0, 1.5)
        tensors.append(
            [
                Option(f"{bits}", weights * bits // 16, scale * 2.0 ** (-bits / 8))
                for bits in (36, 40, 44, 48, 52, 68)
            ]
        )
    low, high = smallest(tensors), sum(max(option.size_bytes for option in row) for row in tensors)
    before = float("inf")
    for share in (0.0, 0.1, 0.35, 0.7, 1.0):
        choice = solve(tensors, low + int((high - low) * share))
        assert choice is not None
        assert choice.loss < before
        before = choice.loss


def test_a_second_price_buys_speed() -> None:
    """Within the same bytes: slow types give way until the time suffices, cheapest losses first; impossible gives the fastest."""
    rng = np.random.default_rng(4)
    tensors = [
        [
            Option("slow", 100, float(rng.uniform(0.1, 0.2)), 3e-5),
            Option("fast", 100, float(rng.uniform(0.2, 0.6)), 1e-5),
            Option("large", 200, 0.01, 2e-5),
        ]
        for _ in range(30)
    ]
    free = solve_within_time(tensors, 4000, float("inf"))
    assert free is not None and free[0] == solve(tensors, 4000)
    limit = 0.75 * free[1]
    timed = solve_within_time(tensors, 4000, limit)
    assert timed is not None and timed[1] <= limit < free[1]
    assert free[0].loss < timed[0].loss
    assert timed[0].size_bytes <= 4000
    best = _least_loss_by_force(tensors[:6], 800, 1.1e-4)
    small = solve_within_time(tensors[:6], 800, 1.1e-4)
    assert small is not None and small[1] <= 1.1e-4 and small[0].loss <= best * 1.25
    impossible = solve_within_time(tensors, 4000, 1e-6)
    assert impossible is not None and abs(impossible[1] - 30 * 1e-5) < 1e-12
    assert solve_within_time(tensors, 10, 1.0) is None


def _least_loss_by_force(tensors: list[list[Option]], budget_bytes: int, budget_s: float) -> float:
    return min(
        sum(o.loss for o in picked)
        for picked in itertools.product(*tensors)
        if sum(o.size_bytes for o in picked) <= budget_bytes and sum(o.seconds for o in picked) <= budget_s
    )

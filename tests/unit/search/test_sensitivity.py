"""What the knapsack is told about a tensor: measured damage, errors, and changes that a type would undo."""

from __future__ import annotations

import pytest

from slmops.core.search.sensitivity import (
    SLOW_FACTOR,
    SWALLOW_STEEPNESS,
    Group,
    corrections,
    options,
    rank_correlation,
    scales,
    swallow_prices,
)

ERRORS = {
    "a": {"Q4_0": 0.01, "Q8_0": 0.0001},
    "b": {"Q4_0": 0.03, "Q8_0": 0.0002},
    "c": {"Q4_0": 0.02, "Q8_0": 0.0001},
}


def test_a_group_in_the_probe_type_costs_what_was_measured() -> None:
    """Losses of a group's tensors in the probe type add up to the measured damage."""
    scale = scales([Group(("a", "b"), 0.4), Group(("c",), 0.1)], ERRORS, "Q4_0")
    assert sum(scale[name] * ERRORS[name]["Q4_0"] for name in ("a", "b")) == pytest.approx(0.4)
    assert scale["c"] * ERRORS["c"]["Q4_0"] == pytest.approx(0.1)


def test_no_damage_seen_is_not_no_damage() -> None:
    """A group whose damage drowned in noise still costs something, so it is never squeezed for free."""
    scale = scales([Group(("a", "b"), 0.4), Group(("c",), 0.0)], ERRORS, "Q4_0")
    assert scale["c"] > 0


def test_undoing_every_change_costs_the_measured_divergence() -> None:
    """The price is shared by the size of each tensor's change, and steeper than the divergence itself."""
    prices = swallow_prices({"a": 0.003, "b": 0.001, "c": 0.0}, undone=2.0)
    assert prices == {
        "a": pytest.approx(1.5 * SWALLOW_STEEPNESS),
        "b": pytest.approx(0.5 * SWALLOW_STEEPNESS),
        "c": 0.0,
    }
    assert swallow_prices({"a": 0.0}, undone=2.0) == {"a": 0.0}


def test_a_type_that_swallows_the_change_loses_against_a_larger_error() -> None:
    """A tiny error that undoes the fine-tune is worse than a hundredfold error that does not."""
    found = {
        option.name: option.loss
        for option in options(
            {"Q4_1": 20, "IQ4_NL": 18},
            {"Q4_1": 1e-5, "IQ4_NL": 1e-3},
            {"Q4_1": 0.6, "IQ4_NL": 1e-4},
            scale=1.0,
            swallow_price=0.5,
        )
    }
    assert found["Q4_1"] > found["IQ4_NL"]


def test_options_are_ordered_and_the_fast_type_wins_a_tie() -> None:
    """By size, then by name; equal errors cost a type without a fast kernel slightly more."""
    row = options(
        {"Q8_0": 34, "Q5_0": 22, "F16": 64}, {"Q8_0": 0.1, "Q5_0": 0.1}, {}, 1.0, 0.0, fast_types=("Q8_0",)
    )
    assert [option.name for option in row] == ["Q5_0", "Q8_0", "F16"]
    assert row[1].loss < row[0].loss == pytest.approx(0.1 * SLOW_FACTOR)
    assert row[2].loss == 0.0


def test_measured_damage_corrects_predictions_part_of_the_way() -> None:
    """A group that was predicted four times too bad is corrected by half of that (on a logarithmic scale), within bounds."""
    groups = [Group(("a", "b"), 0.1), Group(("c",), 0.05), Group(("d",), 100.0)]
    predicted = {"a": 0.3, "b": 0.1, "c": 0.05, "d": 1.0}
    none, half, full = (corrections(groups, predicted, strength) for strength in (0.0, 0.5, 1.0))
    assert none == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
    assert half == pytest.approx({"a": 0.5, "b": 0.5, "c": 1.0, "d": 2.0})
    assert full == pytest.approx({"a": 0.25, "b": 0.25, "c": 1.0, "d": 4.0})


def test_rank_correlation() -> None:
    """Known values; ties share ranks; too little says nothing."""
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None

"""Golden prompts are taken for what they notice: faults are covered, tolerance is in the unit, order decides between equals."""

from __future__ import annotations

import math

import pytest

from slmops.build.golden_choice import ENOUGH_PULL, choose, pulls, tolerances, vocabulary_parts

NOWHERE: frozenset[int] = frozenset()


def test_a_pull_is_in_units_of_what_a_device_tolerates() -> None:
    """The same shift pulls less on a prompt that quantising moves; the tolerance is the one that expectations will have."""
    reference, variant = {"calm": -0.01, "jumpy": -0.01}, {"calm": -0.01, "jumpy": -0.21}
    assert tolerances(reference, variant, 0.05) == {"calm": pytest.approx(0.25), "jumpy": pytest.approx(0.45)}
    found = pulls(reference, variant, {"calm": -0.26, "jumpy": -0.26}, base=0.05, slack=100.0)
    assert found == {"calm": pytest.approx(1.0), "jumpy": pytest.approx(0.25 / 0.45)}


def test_a_fall_below_the_floor_pulls_too() -> None:
    """0.35 below the worst good model is where a committed release refuses, whatever the own tolerance."""
    found = pulls({"x": 0.0}, {"x": -0.4}, {"x": -0.75}, base=0.05, slack=0.35)
    assert found["x"] == pytest.approx(1.0)


def test_what_cannot_be_scored_is_noticed_for_sure() -> None:
    for value in (None, math.nan):
        assert pulls({"x": 0.0}, {"x": 0.0}, {"x": value}, base=0.05, slack=0.35) == {"x": ENOUGH_PULL}
    assert pulls({"x": 0.0}, {"x": 0.0}, {"x": -90.0}, base=0.05, slack=0.35) == {"x": ENOUGH_PULL}


def test_each_fault_gets_a_prompt_that_notices_it() -> None:
    """The two with the largest pulls notice the same fault; the pack takes one of them and the other fault's only witness."""
    pull = {
        "rope": {"a": 3.0, "b": 2.9, "c": 0.0, "d": 0.2},
        "head": {"a": 0.0, "b": 0.0, "c": 1.6, "d": 0.1},
    }
    assert choose(["a", "b", "c", "d"], pull, dict.fromkeys("abcd", NOWHERE), 2) == ["a", "c"]


def test_a_second_witness_counts_half() -> None:
    """A new fault at 1.0 is worth more than a second witness at 1.9 of a known one."""
    pull = {"rope": {"a": 3.0, "b": 1.9, "c": 0.0}, "head": {"a": 0.0, "b": 0.0, "c": 1.0}}
    assert choose(["a", "b", "c"], pull, dict.fromkeys("abc", NOWHERE), 2) == ["a", "c"]


def test_vocabulary_decides_between_equals_and_order_the_rest() -> None:
    pull = {"rope": dict.fromkeys("abc", 1.0)}
    parts = {"a": frozenset({1}), "b": frozenset({1, 2, 3}), "c": frozenset({1})}
    assert choose(["a", "b", "c"], pull, parts, 3) == ["b", "a", "c"]
    assert choose(["c", "a"], pull, parts, 2) == ["c", "a"]


def test_unsure_answers_are_at_most_half_of_the_pack() -> None:
    """However much they notice; without enough others they fill up."""
    pull = {"rope": {"a": 3.0, "b": 3.0, "c": 3.0, "d": 0.1, "e": 0.0}}
    parts = dict.fromkeys("abcde", NOWHERE)
    chosen = choose(list("abcde"), pull, parts, 4, frozenset("abc"))
    assert len(set(chosen) & set("abc")) == 2
    assert set(choose(list("abcd"), pull, parts, 4, frozenset("abc"))) == set("abcd")


def test_more_than_there_are_takes_all() -> None:
    assert choose(["a"], {}, {"a": NOWHERE}, 8) == ["a"]
    assert choose([], {}, {}, 8) == []


def test_parts_of_a_vocabulary() -> None:
    """The first and the last token are in the first and the last part."""
    assert vocabulary_parts([0, 49_151, 24_576], 49_152) == frozenset({0, 32, 63})

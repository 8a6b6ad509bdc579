"""Time left: from what steps took before, honest about what it does not know."""

from __future__ import annotations

from pathlib import Path

from slmops.build.durations import Durations
from slmops.build.graph import Step


def step(name: str, run: str = "m:f", *, exclusive: bool = False) -> Step:
    return Step(name, run, exclusive=exclusive)


def test_unknown_steps_give_no_estimate(tmp_path: Path) -> None:
    known = Durations(tmp_path)
    assert known.left_s([step("a"), step("b")], {}, 2) is None
    known.note(step("a"), 10.0)
    assert known.left_s([step("a"), step("b", "m:other"), step("c", "m:third")], {}, 1) is None


def test_the_sum_of_what_is_left(tmp_path: Path) -> None:
    """Shared by the workers, never less than the longest, steps that run alone on top, running ones less what they have done."""
    known = Durations(tmp_path)
    known.note(step("a"), 10.0)
    known.note(step("b"), 30.0)
    known.note(step("s", "m:speed", exclusive=True), 5.0)
    assert known.left_s([step("a"), step("b")], {}, 1) == 40.0
    assert known.left_s([step("a"), step("b")], {}, 2) == 30.0
    assert known.left_s([step("s", "m:speed", exclusive=True)], {"b": (step("b"), 12.0)}, 2) == 23.0
    assert known.left_s([], {"a": (step("a"), 50.0)}, 2) == 0.0
    assert known.left_s([], {}, 2) == 0.0


def test_the_same_function_under_another_name(tmp_path: Path) -> None:
    """A new target's step is taken for as long as another target's; what is unknown for the mean."""
    known = Durations(tmp_path)
    known.note(step("quantise: a"), 8.0)
    assert known.of(step("quantise: b")) == 8.0
    assert known.left_s([step("quantise: b"), step("new", "m:new")], {}, 1) == 16.0


def test_kept_beside_the_cache(tmp_path: Path) -> None:
    """Read back; a damaged file is an empty one; a folder that is gone is no error."""
    known = Durations(tmp_path)
    known.note(step("a"), 2.0)
    known.save()
    assert Durations(tmp_path).of(step("a")) == 2.0
    (tmp_path / "durations.json").write_text("{")
    assert Durations(tmp_path).of(step("a")) is None
    Durations(tmp_path / "gone").save()

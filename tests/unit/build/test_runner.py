"""The runner runs what is not known, side by side where it may, and leaves nothing of a failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from slmops.build.cache import Cache
from slmops.build.events import StepEvent
from slmops.build.graph import Output, SourceFile, Step, code_digest, key_of
from slmops.build.runner import run_steps
from slmops.core.errors import BudgetError, BugError, BuildError, NoSpaceError, UsageError

STEPS = "tests.unit.build.steps_for_tests"
WORKERS = pytest.mark.parametrize("workers", [0, 2])


def chain(log: Path, *, last: str = "c") -> list[Step]:
    """A and b, then one that needs both."""
    params = {"log": str(log)}
    return [
        Step("a", f"{STEPS}:write", params={**params, "text": "a"}),
        Step("b", f"{STEPS}:write", params={**params, "text": "b"}),
        Step(
            "c",
            f"{STEPS}:write",
            {"1": Output("a", "out.txt"), "2": Output("b", "out.txt"), "v": Output("a")},
            {**params, "text": last},
        ),
    ]


def quiet(event: StepEvent) -> None:
    """No progress."""


@WORKERS
def test_what_is_known_is_not_run_again(tmp_path: Path, workers: int) -> None:
    """The first run runs all, the second none, and a changed parameter only what depends on it."""
    cache, log = Cache(tmp_path / "cache"), tmp_path / "log"
    events: list[StepEvent] = []
    first = run_steps(chain(log), cache, progress=events.append, workers=workers)
    assert sorted(first.ran) == ["a", "b", "c"]
    assert cache.path(first.results["c"].files["out.txt"].sha256).read_text() == "abc"
    assert first.results["c"].value == {"length": 3, "seen": ["v"]}
    assert {event.state for event in events if event.step == "c"} == {"started", "progress", "done"}
    second = run_steps(chain(log), cache, progress=events.append, workers=workers)
    assert second.ran == ()
    assert [event.state for event in events[-3:]] == ["cached"] * 3
    assert (events[-1].finished, events[-1].total) == (3, 3)
    third = run_steps(chain(log, last="d"), cache, progress=quiet, workers=workers)
    assert third.ran == ("c",)
    assert sorted(log.read_text().split()) == ["a", "b", "c", "d"]


@WORKERS
def test_an_equal_result_of_a_changed_step_stops_the_change(tmp_path: Path, workers: int) -> None:
    """What comes after a step is keyed by what it gave, not by how."""
    cache = Cache(tmp_path / "cache")
    run_steps(chain(tmp_path / "log"), cache, progress=quiet, workers=workers)
    again = run_steps(chain(tmp_path / "another-log"), cache, progress=quiet, workers=workers)
    assert set(again.ran) == {"a", "b", "c"}  # the log's name is a parameter of each
    names = {step.name: step for step in chain(tmp_path / "log")}
    inputs = {"1": "x", "2": "y", "v": "z"}
    assert key_of(names["c"], inputs) == key_of(
        Step("other name", names["c"].run, params=names["c"].params), inputs
    )


@WORKERS
def test_a_named_error_arrives_as_it_was_raised(tmp_path: Path, workers: int) -> None:
    """Class, message, hint and fields cross the process; nothing of the step stays; the good step is cached."""
    cache = Cache(tmp_path / "cache")
    steps = [chain(tmp_path / "log")[0], Step("bad", f"{STEPS}:refuse", {"x": Output("a", "out.txt")})]
    events: list[StepEvent] = []
    for _ in range(2):
        with pytest.raises(BudgetError, match="too small") as caught:
            run_steps(steps, cache, progress=events.append, workers=workers)
        assert (caught.value.hint, caught.value.fields) == ("take more", {"smallest_bytes": 5})
    assert [event.state for event in events if event.step == "bad"].count("failed") == 2
    assert [event.state for event in events if event.step == "a"].count("cached") == 1
    assert list((tmp_path / "cache" / "work").iterdir()) == []
    assert len(list((tmp_path / "cache" / "steps").iterdir())) == 1


def test_a_crash_is_an_error_of_its_step(tmp_path: Path) -> None:
    """Native code that dies takes its own process only, and leaves nothing."""
    cache = Cache(tmp_path / "cache")
    with pytest.raises(BuildError, match="exit status -11"):
        run_steps([Step("bad", f"{STEPS}:crash")], cache, progress=quiet, workers=1)
    assert list((tmp_path / "cache" / "work").iterdir()) == []
    assert list((tmp_path / "cache" / "steps").iterdir()) == []


def test_an_unplanned_error_tells_its_last_line(tmp_path: Path) -> None:
    """The traceback's end is in the message."""
    with pytest.raises(BuildError, match="ZeroDivisionError: by zero"):
        run_steps([Step("bad", f"{STEPS}:break_down")], Cache(tmp_path), progress=quiet, workers=1)


@WORKERS
def test_a_full_disk_is_named(tmp_path: Path, workers: int) -> None:
    """With the place and the free bytes."""
    with pytest.raises(NoSpaceError, match="No space left") as caught:
        run_steps([Step("bad", f"{STEPS}:lose_the_disk")], Cache(tmp_path), progress=quiet, workers=workers)
    assert isinstance(caught.value.fields["free_bytes"], int)


def test_exclusive_steps_run_alone_and_last(tmp_path: Path) -> None:
    """While one runs no other does, and it waits for all that could disturb it."""
    cache = Cache(tmp_path / "cache")
    steps = [
        Step("measure 1", f"{STEPS}:write", params={"text": "m1"}, exclusive=True),
        Step("measure 2", f"{STEPS}:write", params={"text": "m2"}, exclusive=True),
        *chain(tmp_path / "log"),
    ]
    running: set[str] = set()
    order: list[str] = []

    def watch(event: StepEvent) -> None:
        if event.state == "started":
            assert not any(name.startswith("measure") for name in running)
            assert not (event.step.startswith("measure") and running)
            running.add(event.step)
            order.append(event.step)
        elif event.state == "done":
            running.discard(event.step)

    run_steps(steps, cache, progress=watch, workers=2)
    assert order[-2:] == ["measure 1", "measure 2"]


def test_sources_are_keyed_by_content(tmp_path: Path) -> None:
    """The path of a user's file does not matter, its digest does."""
    step = Step("s", f"{STEPS}:write", {"x": SourceFile(tmp_path / "a", "1" * 64)}, {"text": "t"})
    moved = Step("s", f"{STEPS}:write", {"x": SourceFile(tmp_path / "b", "1" * 64)}, {"text": "t"})
    digests = {name: source.sha256 for name, source in step.inputs.items() if isinstance(source, SourceFile)}
    assert key_of(step, digests) == key_of(moved, digests)
    assert key_of(step, digests) != key_of(step, {"x": "2" * 64})


def test_code_is_part_of_the_key() -> None:
    """Modules with different sources have different digests."""
    assert code_digest(f"{STEPS}:write") == code_digest(f"{STEPS}:crash")
    assert code_digest(f"{STEPS}:write") != code_digest("slmops.build.steps.weights:merge")


def test_a_graph_out_of_order_is_our_bug(tmp_path: Path) -> None:
    """A step before what it needs would wait for ever."""
    steps = list(reversed(chain(tmp_path / "log")))
    with pytest.raises(BugError, match="needs"):
        run_steps(steps, Cache(tmp_path / "cache"), progress=quiet, workers=0)


def test_a_step_that_was_killed_finds_its_checkpoint(tmp_path: Path) -> None:
    """Across runs, for the same inputs, settings and code only; nothing is left when it ended well."""
    cache = Cache(tmp_path / "cache")
    step = Step("train", f"{STEPS}:train", params={"seed": 1})
    for _ in range(2):
        with pytest.raises(BuildError, match="died with exit status -9"):
            run_steps([step], cache, progress=quiet, workers=1)
    with pytest.raises(BuildError, match="died with exit status -9"):
        run_steps([Step("train", f"{STEPS}:train", params={"seed": 2})], cache, progress=quiet, workers=1)
    finished = run_steps([step], cache, progress=quiet, workers=1)
    assert finished.results["train"].value == {"rounds": 3}
    left = list((tmp_path / "cache" / "checkpoints").iterdir())
    assert [(folder / "state").read_text() for folder in left] == ["1"]  # the other seed's


def test_a_cluster_without_ray_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any step is run."""
    monkeypatch.setitem(sys.modules, "ray", None)
    step = Step("one", "tests.unit.build.steps_for_tests:write", params={"text": "x"})
    with pytest.raises(UsageError, match="--engine ray needs ray") as caught:
        run_steps([step], Cache(tmp_path / "c"), progress=lambda event: None, engine="ray")
    assert "slmops[ray]" in caught.value.hint
    assert list((tmp_path / "c" / "steps").iterdir()) == []


def test_the_second_run_knows_how_long_it_takes(tmp_path: Path) -> None:
    """No guess the first time; from then on the time left falls to nothing."""

    def left(text: str) -> list[float | None]:
        steps = [
            Step(f"s{i}", "tests.unit.build.steps_for_tests:write", params={"text": f"{text}{i}"})
            for i in range(3)
        ]
        events: list[StepEvent] = []
        run_steps(steps, Cache(tmp_path / "c"), progress=events.append, workers=0)
        return [event.left_s for event in events]

    assert left("a")[0] is None
    kept = tmp_path / "c" / "durations.json"
    kept.write_text(json.dumps(dict.fromkeys(json.loads(kept.read_text()), 2.0)))  # as if each had taken 2 s
    second = left("b")
    assert second[0] is not None
    assert 5 < second[0] <= 6
    assert second[-1] == 0

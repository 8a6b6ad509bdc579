"""What a build tells about its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

StepState = Literal["started", "cached", "progress", "done", "failed"]


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One thing that happened to one step.

    Attributes:
        step: name, such as ``quantise pi5-8gb``.
        state: ``cached`` means that it was not run because its result is known.
        ratio: how much of the step is done, 0..1; None when that is not known.
        seconds: since the step started.
        note: what it is doing, or what came out, for people.
        finished: steps of this run that are done; ``total``: steps of this run.
        left_s: seconds until the end, from how long steps took before; None when that is not known.
    """

    step: str
    state: StepState
    ratio: float | None
    seconds: float
    note: str
    finished: int
    total: int
    left_s: float | None = None


#: Called with every event, from the thread that called ``run_build``.
Progress = Callable[[StepEvent], None]

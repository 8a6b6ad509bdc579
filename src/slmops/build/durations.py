"""How long a build will still take, from how long its steps took before.

Durations are kept beside the cache, by function and by step name; they change no result and are lost without harm. A
step that never ran is taken for as long as the same function took under another name, else as the mean of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from slmops.build.files import write_whole
from slmops.build.graph import Step

FILE = "durations.json"
_KNOWN_SHARE = 0.5


class Durations:
    """Seconds of steps in one cache folder.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        try:
            self.seconds = msgspec.json.decode(self.path.read_bytes(), type=dict[str, float])
        except (OSError, msgspec.MsgspecError):
            self.seconds = {}

    def note(self, step: Step, seconds: float) -> None:
        """A step was run."""
        self.seconds[step.run] = self.seconds[_named(step)] = round(seconds, 3)

    def save(self) -> None:
        """Write what was noted; a full disk is no error here."""
        try:
            write_whole(self.path, msgspec.json.encode(self.seconds, order="deterministic"))
        except Exception:  # an estimate is not worth a failed build
            return

    def of(self, step: Step) -> float | None:
        """What a step took, s; None when it is not known."""
        return self.seconds.get(_named(step), self.seconds.get(step.run))

    def left_s(
        self, waiting: Iterable[Step], running: Mapping[str, tuple[Step, float]], workers: int
    ) -> float | None:
        """Seconds until the end; None when less than half of what is left is known.

        Args:
            waiting: steps that are neither done nor running.
            running: by name: step, and seconds since it started.
            workers: steps at once.
        """
        ahead = [(step, 0.0) for step in waiting] + list(running.values())
        known = [(step, spent, seconds) for step, spent in ahead if (seconds := self.of(step)) is not None]
        if not ahead:
            return 0.0
        if len(known) < _KNOWN_SHARE * len(ahead):
            return None
        mean = sum(seconds for _, _, seconds in known) / len(known)
        shared = alone = 0.0
        for step, spent in ahead:
            rest = max((self.of(step) or mean) - spent, 0.0)
            if step.exclusive:
                alone += rest
            else:
                shared += rest
        longest = max((max(seconds - spent, 0.0) for _, spent, seconds in known), default=0.0)
        return max(shared / max(workers, 1), longest) + alone


def _named(step: Step) -> str:
    return f"{step.run} {step.name}"

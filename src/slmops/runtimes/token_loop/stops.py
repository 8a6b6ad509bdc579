"""Stop strings across token borders: text is held back for as long as it may still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Watches an answer for the first of several strings, which is not part of it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Text that is surely part of the answer; after a stop string was found, nothing more is."""
        if self.found:
            return ""
        self._held += text
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            sure, self._held = self._held[: min(places)[0]], ""
            return sure
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure

    def end(self) -> str:
        """What was held back and became no stop string."""
        rest, self._held = self._held, ""
        return "" if self.found else rest


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that begin the stop string, the whole of it excluded."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

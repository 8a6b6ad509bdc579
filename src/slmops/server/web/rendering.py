"""Templates and the few ways in which numbers, sizes and times are written for people."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from slmops.server.ports.world import Clock

FOLDER = Path(__file__).parent / "templates"


class Templates:
    """The templates of the dashboard; everything that is put into one is escaped."""

    def __init__(self, clock: Clock) -> None:
        """Read nothing yet; ``clock`` is for "3 min ago"."""
        self._clock = clock
        self._environment = Environment(
            loader=FileSystemLoader(FOLDER),
            autoescape=select_autoescape(default=True, default_for_string=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(
            size=size, ago=self.ago, short=short, ratio=ratio, number=number, words=words, tone=tone
        )

    def render(self, template: str, **values: Any) -> str:
        """One page."""
        return self._environment.get_template(template).render(**values)

    def ago(self, moment: str) -> str:
        """How long ago; a dash for never."""
        if not moment:
            return "–"
        seconds = (self._clock.now() - datetime.fromisoformat(moment.replace("Z", "+00:00"))).total_seconds()
        if seconds < 2:
            return "now"
        for limit, length, unit in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
            if seconds < limit:
                return f"{seconds / length:.0f} {unit} ago"
        return f"{seconds / 86_400:.0f} days ago"


def size(count_bytes: float | None) -> str:
    """Bytes in decimal units, three digits."""
    if count_bytes is None:
        return "–"
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def short(digest: str) -> str:
    """The beginning of a digest."""
    return digest[:12]


def ratio(value: float | None) -> str:
    """A ratio as people read it."""
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | int | None, digits: int = 2) -> str:
    """A figure; a dash when it was not measured."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def words(name: str) -> str:
    """``in_progress`` as people write it."""
    return name.replace("_", " ")


_TONES = {
    "good": {"committed", "completed", "pass", "passed", "active", "done"},
    "bad": {
        "failed",
        "fail",
        "reverted",
        "rolled_back",
        "rollback_incomplete",
        "aborted",
        "safe_fallback",
        "rejected",
        "presumed_failed",
        "error",
        "fallback",
        "stopped",
        "revert",
    },
    "warn": {
        "paused",
        "refused",
        "inconclusive",
        "rolling_back",
        "reverting",
        "withdrawn",
        "awaiting_approval",
        "completed_partial",
        "not_reached",
        "unreached",
        "withdraw",
        "wanted",
        "ordered",
    },
    "busy": {
        "open",
        "baking",
        "in_progress",
        "offered",
        "admission",
        "downloading",
        "verifying",
        "staged",
        "activating",
        "probation",
        "scheduled",
        "run",
    },
}


def tone(status: str) -> str:
    """The colour of a status: good, bad, warn, busy or quiet."""
    return next((name for name, members in _TONES.items() if status in members), "quiet")

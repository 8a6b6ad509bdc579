"""Progress of a build: what runs, how far it is, how long it will take."""

from __future__ import annotations

from typing import Any

from slmops.build import StepEvent
from slmops.cli.output import Progress


def show_steps(progress: Progress) -> Any:
    """A callback that prints step events."""

    def show(event: StepEvent) -> None:
        left = "" if event.left_s is None else f", about {duration(event.left_s)} left"
        where = f"[{event.finished}/{event.total}{left}]"
        if event.state in ("started", "progress"):
            share = f" {event.ratio:.0%}" if event.ratio is not None else ""
            progress.update(f"{where} {event.step}{share} {event.note} ({event.seconds:.0f} s)")
        elif event.state == "cached":
            progress.done(f"{where} {event.step}: known, not run again")
        else:
            progress.done(
                f"{where} {event.step}: {event.state} in {event.seconds:.1f} s {event.note}".rstrip()
            )

    return show


def duration(seconds: float) -> str:
    """For people: ``40 s``, ``3 min``, ``1.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

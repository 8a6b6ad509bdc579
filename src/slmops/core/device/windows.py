"""Windows: the hours in which a device may download or activate, in the device's own local time.

A window is a start in cron's five fields and a length: ``0 1 * * * +4h`` opens every day at 01:00 for four hours.

Grammar (crontab(5) without names, macros and ``L W #``; day of month and day of week must both match)::

    window = minute " " hour " " day " " month " " weekday " +" length
    field  = "*" ["/" step] | item {"," item}      item = number | number "-" number ["/" step]
    length = number ("m" | "h" | "d")              weekday: 0 to 7, 0 and 7 are Sunday
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta

from slmops.core.errors import UsageError

#: longest window: what is longer is better said by no window
MAX_LENGTH = timedelta(days=7)
#: how far ahead an opening is looked for: every date of the calendar comes within four years and a leap day
_HORIZON_DAYS = 4 * 366
_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
_ITEM = re.compile(r"^(?:(\*)|(\d{1,2})(?:-(\d{1,2}))?)(?:/(\d{1,2}))?$")
_LENGTH = re.compile(r"^\+(\d{1,4})([mhd])$")
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}


@dataclass(frozen=True, slots=True)
class Window:
    """A window.

    Attributes:
        minutes, hours, days, months, weekdays: of its starts; weekday 0 is Sunday.
        length: how long it stays open.
    """

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    length: timedelta

    def is_open(self, local: datetime) -> bool:
        """Whether the window is open at a local time (naive, or aware: its wall clock counts)."""
        wall = local.replace(tzinfo=None)
        first = (wall - self.length).date()
        return any(start <= wall < start + self.length for start in self._starts(first, wall.date()))

    def next_opening(self, local: datetime) -> datetime | None:
        """The first start after a local time, naive; None when none comes within four years (31 February)."""
        wall = local.replace(tzinfo=None)
        starts = self._starts(wall.date(), wall.date() + timedelta(days=_HORIZON_DAYS))
        return next((start for start in starts if start > wall), None)

    def longest_wait(self) -> timedelta:
        """Longest time between a closing and the next opening, over five years: what a deadline must allow for."""
        year = date(2028, 1, 1)  # a leap year
        weekly = len(self.days) == 31 and len(self.months) == 12
        longest, closes = timedelta(0), None
        for start in self._starts(year, year + timedelta(days=15 if weekly else 5 * 366)):
            if closes is not None:
                longest = max(longest, start - closes)
            closes = max(closes or start, start + self.length)
        return longest

    def _starts(self, first: date, last: date) -> Iterator[datetime]:
        """Starts on these days, in order."""
        day = first
        while day <= last:
            if day.month in self.months and day.day in self.days and day.isoweekday() % 7 in self.weekdays:
                for hour in self.hours:
                    for minute in self.minutes:
                        yield datetime.combine(day, time(hour, minute))
            day += timedelta(days=1)


def parse_window(text: str) -> Window:
    """Read a window.

    Raises:
        UsageError: it is not of the grammar, never opens, or is longer than a week; says which field.
    """
    parts = text.split()
    if len(parts) != len(_FIELDS) + 1:
        raise _refusal(text, f"it has {len(parts)} fields instead of 6")
    sets = [
        _field(text, name, low, high, part)
        for (name, low, high), part in zip(_FIELDS, parts[:5], strict=True)
    ]
    match = _LENGTH.match(parts[5])
    if match is None:
        raise _refusal(text, f"length {parts[5]!r} is not like +4h")
    length = int(match[1]) * _UNITS[match[2]]
    if not timedelta(0) < length <= MAX_LENGTH:
        raise _refusal(text, f"length {parts[5]} is not between one minute and 7 days")
    window = Window(
        tuple(sorted(sets[0])),
        tuple(sorted(sets[1])),
        frozenset(sets[2]),
        frozenset(sets[3]),
        frozenset(day % 7 for day in sets[4]),
        length,
    )
    if window.next_opening(datetime(2028, 1, 1)) is None:
        raise _refusal(text, "no such date comes: it never opens")
    return window


def _field(text: str, name: str, low: int, high: int, part: str) -> set[int]:
    found: set[int] = set()
    for item in part.split(","):
        match = _ITEM.match(item)
        if match is None:
            raise _refusal(text, f"{name} {item!r} cannot be read")
        star, first, last, step = match.groups()
        if step is not None and (int(step) == 0 or (star is None and last is None)):
            raise _refusal(text, f"{name} {item!r}: a step needs a range and is at least 1")
        begin = low if star else int(first)
        end = high if star else int(last if last is not None else first)
        if not low <= begin <= end <= high:
            raise _refusal(text, f"{name} {item!r} is not within {low} to {high}")
        found.update(range(begin, end + 1, int(step or 1)))
    return found


def _refusal(text: str, why: str) -> UsageError:
    return UsageError(
        f"window {text!r}: {why}",
        hint='write minute hour day month weekday and a length: "0 1 * * * +4h" is every night from 1 to 5 o\'clock',
    )

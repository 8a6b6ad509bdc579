"""Windows in local time: cron's five fields and a length."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.core.device.windows import parse_window
from slmops.core.errors import UsageError

NIGHT = parse_window("0 1 * * * +4h")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.mark.parametrize(
    ("when", "is_open"),
    [
        ("2026-11-24 00:59:59", False),
        ("2026-11-24 01:00:00", True),
        ("2026-11-24 04:59:59", True),
        ("2026-11-24 05:00:00", False),
    ],
)
def test_a_window_is_open_from_its_start_until_its_length_is_over(when: str, is_open: bool) -> None:
    assert NIGHT.is_open(at(when)) is is_open


def test_a_window_reaches_over_midnight_and_over_the_turn_of_a_month() -> None:
    late = parse_window("0 23 * * * +3h")
    assert late.is_open(at("2026-12-01 01:59:00"))
    assert not late.is_open(at("2026-12-01 02:00:00"))
    weekend = parse_window("0 18 * * 5 +60h")  # 27 November 2026 is a Friday
    assert weekend.is_open(at("2026-11-30 05:59:00"))
    assert not weekend.is_open(at("2026-11-30 06:00:00"))


def test_the_wall_clock_of_an_aware_time_counts() -> None:
    helsinki = timezone(timedelta(hours=2))
    assert NIGHT.is_open(datetime(2026, 11, 24, 1, 30, tzinfo=helsinki))
    assert not NIGHT.is_open(datetime(2026, 11, 23, 23, 30, tzinfo=timezone.utc))


def test_the_next_opening() -> None:
    assert NIGHT.next_opening(at("2026-11-24 01:00:00")) == at("2026-11-25 01:00:00")
    assert parse_window("15 */6 1,15 2-4 * +1h").next_opening(at("2026-11-24 12:00:00")) == at(
        "2027-02-01 00:15:00"
    )
    assert parse_window("0 0 29 2 * +1d").next_opening(at("2026-11-24 12:00:00")) == at("2028-02-29 00:00:00")
    assert parse_window("0 3 * * 7 +1h").next_opening(at("2026-11-24 12:00:00")) == at("2026-11-29 03:00:00")


@pytest.mark.parametrize(
    ("text", "wait"),
    [
        ("0 1 * * * +4h", timedelta(hours=20)),
        ("0 * * * * +1h", timedelta(0)),
        ("0 3 * * 0 +2h", timedelta(days=7) - timedelta(hours=2)),
        ("0 0 1 * * +1d", timedelta(days=30)),
        ("0 0 29 2 * +1d", timedelta(days=4 * 365)),
    ],
)
def test_the_longest_wait_is_what_a_deadline_must_allow_for(text: str, wait: timedelta) -> None:
    assert parse_window(text).longest_wait() == wait


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 fields instead of 6"),
        ("0 1 * * +4h", "5 fields instead of 6"),
        ("0 24 * * * +4h", "hour '24' is not within 0 to 23"),
        ("60 1 * * * +4h", "minute '60'"),
        ("0 1 0 * * +4h", "day '0'"),
        ("0 1 * 13 * +4h", "month '13'"),
        ("0 1 * * 8 +4h", "weekday '8'"),
        ("0 5-2 * * * +4h", "hour '5-2'"),
        ("0 1/2 * * * +4h", "a step needs a range"),
        ("*/0 1 * * * +4h", "a step needs a range and is at least 1"),
        ("0 one * * * +4h", "hour 'one' cannot be read"),
        ("0 1 * * * 4h", "length '4h'"),
        ("0 1 * * * +0h", "not between one minute and 7 days"),
        ("0 1 * * * +8d", "not between one minute and 7 days"),
        ("0 1 31 2 * +1h", "it never opens"),
        ("0 1 ,, * * +1h", "cannot be read"),
    ],
)
def test_what_cannot_be_read_names_the_field(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_window(text)
    assert said in str(caught.value)
    assert "0 1 * * * +4h" in str(caught.value.hint)


@given(
    hour=st.integers(0, 23),
    minute=st.integers(0, 59),
    hours=st.integers(1, 30),
    when=st.datetimes(datetime(2024, 1, 1), datetime(2032, 1, 1)),
)
def test_it_opens_when_it_says_so(hour: int, minute: int, hours: int, when: datetime) -> None:
    """The next opening is open, the second before it is not (unless the last one still is), and nothing opens between."""
    window = parse_window(f"{minute} {hour} * * * +{hours}h")
    opens = window.next_opening(when)
    assert opens is not None
    assert when < opens <= when + timedelta(days=1)
    assert window.is_open(opens)
    if hours < 24:
        assert not window.is_open(opens - timedelta(seconds=1))
    else:
        assert window.is_open(when)

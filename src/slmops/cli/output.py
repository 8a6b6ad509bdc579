"""What the command line prints: tables for people, JSON for programs, errors with their fix."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import click
import msgspec

from slmops.core.errors import SlmopsError

_KIB = 1024.0


def print_json(value: Any) -> None:
    """One JSON value, indented, keys as they are."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str = "nothing") -> None:
    """An aligned table; numbers to the right."""
    if not rows:
        click.echo(empty)
        return
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(heading), *(len(row[i]) for row in cells)) for i, heading in enumerate(headings)]
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(headings))]
    click.secho("  ".join(_pad(h, widths[i], numeric[i]) for i, h in enumerate(headings)).rstrip(), bold=True)
    for row in cells:
        click.echo("  ".join(_pad(cell, widths[i], numeric[i]) for i, cell in enumerate(row)).rstrip())


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def _is_number(text: str) -> bool:
    return (
        text.replace(".", "", 1)
        .replace("-", "", 1)
        .replace("%", "")
        .replace("MB", "")
        .replace(" ", "")
        .isdigit()
        or text == "-"
    )


def print_error(error: SlmopsError, *, as_json: bool) -> None:
    """An error on stderr: code, message, fix."""
    if as_json:
        body = {
            "error": {
                "code": error.code,
                "message": error.message,
                "hint": error.hint,
                "fields": error.fields,
            }
        }
        click.echo(msgspec.json.format(msgspec.json.encode(body), indent=2).decode(), err=True)
        return
    click.secho(f"error[{error.code}]: ", fg="red", bold=True, err=True, nl=False)
    click.echo(error.message, err=True)
    if error.hint:
        click.echo(f"  fix: {error.hint}", err=True)


def megabytes(size_bytes: int) -> str:
    """Bytes as MB (10^6), one decimal."""
    return f"{size_bytes / 1e6:.1f} MB"


def percent(ratio: float | None) -> str:
    """A ratio for people."""
    return "-" if ratio is None else f"{ratio * 100:.1f}%"


class Progress:
    """Lines for steps that take time; one line that moves on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Write to stderr, so that stdout stays for results."""
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._open = ""
        self._last_plain = 0.0

    def update(self, text: str) -> None:
        """Work goes on."""
        if self._quiet:
            return
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            click.echo(f"\r{text[:width]:<{width}}", err=True, nl=False)
            self._open = text
        elif time.monotonic() - self._last_plain > 15:  # logs of CI: a sign of life, not a flood
            click.echo(text, err=True)
            self._last_plain = time.monotonic()

    def done(self, text: str) -> None:
        """A step has ended."""
        if self._quiet:
            return
        if self._live and self._open:
            width = shutil.get_terminal_size().columns - 1
            click.echo(f"\r{' ' * width}\r", err=True, nl=False)
            self._open = ""
        click.echo(text, err=True)

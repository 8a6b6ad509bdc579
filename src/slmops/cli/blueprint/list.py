"""``slmops blueprint list``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json, print_table


@click.command("list")
@with_server
@json_option
def list_command(server: str, token_file: Path | None, as_json: bool) -> None:
    """List blueprints.

    \b
    Example:
      slmops blueprint list
    """
    with connect(server, token_file) as plane:
        found = plane.blueprints()
    if as_json:
        print_json(found)
        return
    rows = [
        (b.name, b.revision, b.model, b.channel or b.version, b.selector or "all", b.applied_by, b.applied_at)
        for b in found
    ]
    print_table(
        ("blueprint", "rev", "model", "release", "selector", "by", "when"),
        rows,
        empty="no blueprints: slmops blueprint apply -f FILE",
    )

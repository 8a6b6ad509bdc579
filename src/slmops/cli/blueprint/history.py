"""``slmops blueprint history``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json, print_table


@click.command("history")
@click.argument("name")
@with_server
@json_option
def history(name: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show all revisions of a blueprint, newest first.

    \b
    Example:
      slmops blueprint history home-assistant
    """
    with connect(server, token_file) as plane:
        found = plane.blueprint_history(name)
    if as_json:
        print_json(found)
        return
    print_table(
        ("rev", "release", "rollout", "by", "when"),
        [
            (b.revision, b.channel or b.version, b.rollout_id or "-", b.applied_by, b.applied_at)
            for b in found
        ],
    )

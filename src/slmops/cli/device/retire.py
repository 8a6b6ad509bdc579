"""``slmops device retire``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json


@click.command("retire")
@click.argument("device_id")
@with_server
@json_option
def retire(device_id: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Refuse a device from now on; its history stays.

    \b
    Example:
      slmops device retire kitchen-1
    """
    with connect(server, token_file) as plane:
        found = plane.retire(device_id)
    print_json(found) if as_json else click.echo(f"{found.id} is retired")

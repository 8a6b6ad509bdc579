"""``slmops device list``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json, print_table


@click.command("list")
@click.option("--selector", default="", help="For example: profile = pi5-8gb and site != lab.")
@with_server
@json_option
def list_command(selector: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """List devices.

    \b
    Example:
      slmops device list --selector "profile = pi5-8gb and site != lab"
    """
    with connect(server, token_file) as plane:
        found = plane.devices(selector)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            d.id,
            d.profile,
            d.release or "-",
            d.phase or "never seen",
            d.last_seen_at or "-",
            d.requests,
            d.failed_requests,
        )
        for d in found
    ]
    print_table(
        ("device", "profile", "release", "phase", "last seen", "requests", "failed"),
        rows,
        empty="no devices: slmops device token create",
    )

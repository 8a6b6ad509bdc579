"""``slmops release list``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json, print_table


@click.command("list")
@click.option("--model", default="", help="Only this model.")
@with_server
@json_option
def list_command(model: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """List published releases, newest first.

    \b
    Example:
      slmops release list
    """
    with connect(server, token_file) as plane:
        found = plane.releases(model)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            r.model,
            r.version,
            r.release_seq,
            r.digest[:12],
            ", ".join(r.channels),
            ", ".join(r.profiles),
            "waived: " + ", ".join(w.gate for w in r.waivers) if r.waivers else "",
        )
        for r in found
    ]
    print_table(
        ("model", "version", "seq", "digest", "channels", "profiles", "notes"),
        rows,
        empty="no releases: slmops release publish BUNDLE",
    )

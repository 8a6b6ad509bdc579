"""``slmops profile list``."""

from __future__ import annotations

import click

from slmops.cli.connection import json_option
from slmops.cli.output import megabytes, print_json, print_table
from slmops.core.device.profile import BUILTIN_PROFILES


@click.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the built-in profiles.

    \b
    Example:
      slmops profile list
    """
    if as_json:
        print_json(list(BUILTIN_PROFILES.values()))
        return
    rows = [
        (p.name, p.arch, megabytes(p.ram_bytes), megabytes(p.disk_bytes), p.cores, ", ".join(p.runtimes))
        for p in BUILTIN_PROFILES.values()
    ]
    print_table(("name", "arch", "RAM for slmops", "disk for slmops", "cores", "runtimes"), rows)

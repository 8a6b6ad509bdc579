"""``slmops rollout show``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json
from slmops.cli.rollout.printing import print_rollout


@click.command("show")
@click.argument("rollout_id")
@with_server
@json_option
def show(rollout_id: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show one rollout: waves, devices, findings.

    \b
    Example:
      slmops rollout show r-v387nr7bet
    """
    with connect(server, token_file) as plane:
        found = plane.rollout(rollout_id)
    print_json(found) if as_json else print_rollout(found)

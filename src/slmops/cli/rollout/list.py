"""``slmops rollout list``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json, print_table


@click.command("list")
@with_server
@json_option
def list_command(server: str, token_file: Path | None, as_json: bool) -> None:
    """List rollouts, newest first.

    \b
    Example:
      slmops rollout list
    """
    with connect(server, token_file) as plane:
        found = plane.rollouts()
    if as_json:
        print_json(found)
        return
    rows = [
        (
            r.id,
            r.blueprint,
            f"{r.model}@{r.version}",
            r.phase,
            f"{r.wave + 1}/{r.waves_total}",
            r.counts.committed,
            r.counts.reverted + r.counts.failed,
            r.counts.untouched,
            r.reason,
        )
        for r in found
    ]
    print_table(
        ("rollout", "blueprint", "release", "phase", "wave", "committed", "failed", "untouched", "why"),
        rows,
        empty="no rollouts yet",
    )

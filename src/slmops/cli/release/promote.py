"""``slmops release promote``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json


@click.command("promote")
@click.argument("reference")
@click.option("--channel", required=True, help="For example stable.")
@with_server
@json_option
def promote(reference: str, channel: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Point a channel at a release; blueprints that follow it begin a rollout.

    \b
    Example:
      slmops release promote home-intents@1.2.0 --channel stable
    """
    with connect(server, token_file) as plane:
        result = plane.promote(reference, channel)
    if as_json:
        print_json(result)
        return
    click.echo(
        f"{result.model} {result.channel} -> {result.version}" + ("" if result.changed else " (as before)")
    )
    for rollout in result.rollouts:
        click.echo(f"  rollout {rollout}: slmops rollout watch {rollout}")

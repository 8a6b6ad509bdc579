"""``slmops blueprint apply``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.blueprint.document import file_option, print_plan, read_blueprint
from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json


@click.command("apply")
@file_option
@with_server
@json_option
def apply(file: Path, server: str, token_file: Path | None, as_json: bool) -> None:
    """Apply a blueprint; begins a rollout when it changes what devices run.

    \b
    Example:
      slmops blueprint apply -f examples/home-intents/blueprint.yaml
    """
    with connect(server, token_file) as plane:
        applied = plane.apply_blueprint(read_blueprint(file), str(file))
    if as_json:
        print_json(applied)
        return
    print_plan(applied.plan)
    if applied.rollout_id:
        click.echo(f"rollout {applied.rollout_id}: slmops rollout watch {applied.rollout_id}")
    else:
        click.echo("nothing to roll out")

"""``slmops blueprint plan``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.blueprint.document import file_option, print_plan, read_blueprint
from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json


@click.command("plan")
@file_option
@with_server
@json_option
def plan(file: Path, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show waves and the variant for each device; change nothing.

    \b
    Example:
      slmops blueprint plan -f blueprint.yaml
    """
    with connect(server, token_file) as plane:
        planned = plane.plan_blueprint(read_blueprint(file), str(file))
    print_json(planned) if as_json else print_plan(planned)

"""``slmops device token create``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json


@click.command("create")
@click.option("--ttl-s", default=3600, show_default=True, help="Life, seconds.")
@click.option("--uses", default=1, show_default=True, help="How many devices may enrol with it.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Labels that the devices get.")
@with_server
@json_option
def create(
    ttl_s: int, uses: int, labels: tuple[str, ...], server: str, token_file: Path | None, as_json: bool
) -> None:
    """Make an enrolment token and print it once.

    \b
    Example:
      slmops device token create --uses 20 --ttl-s 86400 --label site=hki
    """
    wanted = dict(item.partition("=")[::2] for item in labels)
    with connect(server, token_file) as plane:
        made = plane.create_device_token(ttl_s, uses, wanted)
    print_json(made) if as_json else click.echo(made.token)

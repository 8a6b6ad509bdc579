"""``slmops server token create``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import json_option
from slmops.cli.output import print_json
from slmops.cli.server.folder import data_option


@click.command("create")
@data_option
@click.option(
    "--role",
    type=click.Choice(["viewer", "operator", "approver", "admin"]),
    default="operator",
    show_default=True,
)
@click.option(
    "--name", default="operator", show_default=True, help="Who it is for; shown in the audit trail."
)
@click.option("--ttl-s", default=30 * 86_400, show_default=True, help="Life, seconds.")
@click.option("--database-url", help="SQLAlchemy URL.  [default: SQLite in the data folder]")
@json_option
def create(data_dir: Path, role: str, name: str, ttl_s: int, database_url: str | None, as_json: bool) -> None:
    """Make an operator token and print it once.

    \b
    Example:
      slmops server token create --data-dir data --role admin > ~/.config/slmops/token
    """
    from slmops.server.main import ServerOptions, create_operator_token  # noqa: PLC0415

    options = ServerOptions(data_dir=data_dir, database_url=database_url)
    made = create_operator_token(options, role, name, ttl_s)
    print_json({"token": made, "role": role, "name": name, "ttl_s": ttl_s}) if as_json else click.echo(made)

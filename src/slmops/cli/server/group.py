"""``slmops server``: the control plane."""

from __future__ import annotations

import click

from slmops.cli.server.run import run
from slmops.cli.server.token_create import create as token_create_command


@click.group()
def server() -> None:
    """The control plane: API, rollouts, dashboard."""


@server.group("token")
def token() -> None:
    """Operator tokens."""


server.add_command(run)
token.add_command(token_create_command)

"""``slmops profile``: classes of devices that every installation knows."""

from __future__ import annotations

import click

from slmops.cli.profile.list import list_command
from slmops.cli.profile.show import show


@click.group()
def profile() -> None:
    """Device profiles: what a class of devices has."""


for _verb in (list_command, show):
    profile.add_command(_verb)

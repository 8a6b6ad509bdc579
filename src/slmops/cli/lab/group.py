"""``slmops lab``."""

from __future__ import annotations

import click

from slmops.cli.lab.run import run


@click.group()
def lab() -> None:
    """Run what was built on devices unlike this machine, before anybody else's device gets it."""


lab.add_command(run)

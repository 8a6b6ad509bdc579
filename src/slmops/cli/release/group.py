"""``slmops release``: sign, publish, promote."""

from __future__ import annotations

import click

from slmops.cli.release.create import create
from slmops.cli.release.list import list_command
from slmops.cli.release.promote import promote
from slmops.cli.release.publish import publish
from slmops.cli.release.show import show
from slmops.cli.release.verify import verify


@click.group()
def release() -> None:
    """Signed releases: create, verify, publish, promote to a channel."""


for _verb in (create, verify, publish, list_command, show, promote):
    release.add_command(_verb)

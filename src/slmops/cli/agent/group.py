"""``slmops agent``: the device side."""

from __future__ import annotations

import click

from slmops.cli.agent.bench import bench
from slmops.cli.agent.cache import cache
from slmops.cli.agent.enroll import enroll_command
from slmops.cli.agent.revert import revert
from slmops.cli.agent.run import run
from slmops.cli.agent.status import status


@click.group()
def agent() -> None:
    """One device: enrol it, run it, ask it, take it back."""


for _verb in (enroll_command, run, status, revert, bench, cache):
    agent.add_command(_verb)

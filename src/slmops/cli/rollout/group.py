"""``slmops rollout``: watch waves, and act on them."""

from __future__ import annotations

import click

from slmops.cli.rollout.actions import ACTIONS
from slmops.cli.rollout.list import list_command
from slmops.cli.rollout.show import show
from slmops.cli.rollout.watch import watch


@click.group()
def rollout() -> None:
    """Rollouts: list, show, watch, approve, pause, resume, abort, rollback."""


for _verb in (list_command, show, watch, *ACTIONS):
    rollout.add_command(_verb)

"""``slmops blueprint``: declare what a cohort should run."""

from __future__ import annotations

import click

from slmops.cli.blueprint.apply import apply
from slmops.cli.blueprint.diff import diff
from slmops.cli.blueprint.history import history
from slmops.cli.blueprint.list import list_command
from slmops.cli.blueprint.plan import plan


@click.group()
def blueprint() -> None:
    """Blueprints: the declared state of a cohort, and how a change reaches it."""


for _verb in (plan, apply, list_command, history, diff):
    blueprint.add_command(_verb)

"""``slmops build``: from a recipe to measured variants."""

from __future__ import annotations

import click

from slmops.cli.build.diff import diff_command
from slmops.cli.build.run import run
from slmops.cli.build.show import show


@click.group()
def build() -> None:
    """Build a model's variants from a recipe, and measure the shipped files."""


for _verb in (run, show, diff_command):
    build.add_command(_verb)

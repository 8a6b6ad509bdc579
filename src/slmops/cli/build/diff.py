"""``slmops build diff``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.build import diff, load_build
from slmops.cli.build.directory import BUILD_DIRECTORY
from slmops.cli.build.printing import print_diff
from slmops.cli.connection import json_option
from slmops.cli.output import print_json


@click.command("diff")
@click.argument("old", type=BUILD_DIRECTORY)
@click.argument("new", type=BUILD_DIRECTORY)
@json_option
def diff_command(old: Path, new: Path, as_json: bool) -> None:
    """Say what differs between two build directories, figure by figure.

    \b
    Example:
      slmops build diff build/home-intents-1 build/home-intents-2
    """
    difference = diff(load_build(old), load_build(new))
    if as_json:
        print_json(difference)
        return
    print_diff(difference, str(old), str(new))

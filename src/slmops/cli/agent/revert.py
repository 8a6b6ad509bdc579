"""``slmops agent revert``."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click

from slmops.agent.identity import load_config
from slmops.agent.main import order_revert_offline, running_pid
from slmops.agent.store.layout import Layout
from slmops.cli.agent.folder import in_folder


@click.command("revert")
@in_folder
def revert(directory: Path) -> None:
    """Go back to the previous release, with no network needed.

    \b
    Example:
      slmops agent revert --dir /var/lib/slmops-device
    """
    layout = Layout(directory)
    load_config(layout)
    pid = running_pid(layout)
    if pid is not None:
        os.kill(pid, signal.SIGUSR1)
        click.echo("the running agent was told to go back: slmops agent status")
        return
    click.echo(order_revert_offline(layout))

"""``slmops agent run``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.agent.main import run_agent
from slmops.cli.agent.folder import in_folder


@click.command("run")
@in_folder
def run(directory: Path) -> None:
    """Run the agent: serve what is proved, take what is assigned. Logs are JSON lines on stderr.

    \b
    Example:
      slmops agent run --dir /var/lib/slmops-device 2>> agent.log
    """
    run_agent(directory)

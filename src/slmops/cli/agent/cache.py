"""``slmops agent cache``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.agent.identity import load_config
from slmops.agent.main import running_pid
from slmops.agent.store.artifacts import ArtifactStore
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import read_slot
from slmops.cli.agent.folder import in_folder
from slmops.cli.connection import json_option
from slmops.cli.output import megabytes, print_json, print_table
from slmops.core.device.machine import SlotName
from slmops.core.errors import UsageError


@click.command("cache")
@in_folder
@click.option("--prune", is_flag=True, help="Remove what no slot needs.")
@json_option
def cache(directory: Path, prune: bool, as_json: bool) -> None:
    """Show the files that this device keeps, and what needs them.

    \b
    Example:
      slmops agent cache --dir /var/lib/slmops-device --json
    """
    layout = Layout(directory)
    load_config(layout)
    wanted: dict[str, list[str]] = {}
    for name in _SLOTS:
        slot = read_slot(layout, name)
        for artifact in slot.artifacts if slot is not None else ():
            wanted.setdefault(artifact.sha256, []).append(f"{name}:{artifact.role}")
    if prune:
        if running_pid(layout) is not None:
            raise UsageError(
                "the agent is running and keeps this folder tidy by itself",
                hint="stop the agent first, or let it be",
            )
        freed = ArtifactStore(layout).collect_garbage(wanted)
        click.echo(f"{megabytes(freed)} removed")
        return
    files = sorted(((path.stat().st_size, path.name) for path in layout.artifacts.iterdir()), reverse=True)
    if as_json:
        print_json([{"file": name, "bytes": size, "needed_by": wanted.get(name, [])} for size, name in files])
        return
    rows = [(name[:20], megabytes(size), ", ".join(wanted.get(name, ["nothing"]))) for size, name in files]
    print_table(("file", "size", "needed by"), rows, empty="no files")


_SLOTS: tuple[SlotName, SlotName] = ("a", "b")

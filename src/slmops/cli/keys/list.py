"""``slmops keys list``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import json_option
from slmops.cli.keys.workspace import keys_option, workspace_of
from slmops.cli.output import print_json, print_table
from slmops.release import list_keys


@click.command("list")
@keys_option
@json_option
def list_command(keys_folder: Path | None, as_json: bool) -> None:
    """List the keys of the workspace.

    \b
    Example:
      slmops keys list
    """
    found = list_keys(workspace_of(keys_folder))
    if as_json:
        print_json(found)
        return
    print_table(
        ("role", "key id", "where", "offline"),
        [(k.role, k.keyid[:16], k.place, "yes" if k.offline else "no") for k in found],
        empty="no keys: slmops keys init",
    )

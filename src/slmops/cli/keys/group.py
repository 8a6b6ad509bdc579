"""``slmops keys``: the offline keys that sign releases."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import click

from slmops.cli.connection import json_option
from slmops.cli.output import print_json, print_table
from slmops.release import Workspace, init_keys, list_keys, read_passphrase


@click.group()
def keys() -> None:
    """Offline signing keys: root and release. The control plane's own keys never sign a release."""


def ask_passphrase() -> str:
    """The passphrase from SLMOPS_PASSPHRASE, else asked for; never from the command line."""
    return read_passphrase(lambda prompt: click.prompt(prompt, hide_input=True))


def workspace_of(folder: Path | None) -> Workspace:
    """The given workspace, else the user's."""
    return Workspace(folder) if folder is not None else Workspace.default()


keys_option = click.option(
    "--keys",
    "keys_folder",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="SLMOPS_KEYS",
    help="Folder of the offline keys.",
)


@keys.command("init")
@click.option(
    "--server-data",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The control plane's data folder: gets its online key and the signed root.",
)
@keys_option
@json_option
def init(server_data: Path, keys_folder: Path | None, as_json: bool) -> None:
    r"""Make root and release keys, and trust for one control plane.

    \b
    Example:
      slmops keys init --server-data /var/lib/slmops
    """
    report = init_keys(workspace_of(keys_folder), server_data, ask_passphrase(), datetime.now(timezone.utc))
    if as_json:
        print_json(report)
        return
    click.echo(f"keys made: {workspace_of(keys_folder).path}")
    print_table(
        ("role", "key id", "where", "offline"),
        [(k.role, k.keyid[:16], k.place, "yes" if k.offline else "no") for k in report.keys],
    )
    click.echo(
        "Keep the offline keys and their passphrase away from the control plane. There is no way to restore them."
    )


@keys.command("list")
@keys_option
@json_option
def list_command(keys_folder: Path | None, as_json: bool) -> None:
    """List the keys of the workspace."""
    found = list_keys(workspace_of(keys_folder))
    if as_json:
        print_json(found)
        return
    print_table(
        ("role", "key id", "where", "offline"),
        [(k.role, k.keyid[:16], k.place, "yes" if k.offline else "no") for k in found],
        empty="no keys: slmops keys init",
    )

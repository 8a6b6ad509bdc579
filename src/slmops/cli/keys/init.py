"""``slmops keys init``."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import click

from slmops.cli.connection import json_option
from slmops.cli.keys.workspace import ask_passphrase, keys_option, workspace_of
from slmops.cli.output import print_json, print_table
from slmops.release import init_keys


@click.command("init")
@click.option(
    "--server-data",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The control plane's data folder: gets its online key and the signed root.",
)
@keys_option
@json_option
def init(server_data: Path, keys_folder: Path | None, as_json: bool) -> None:
    """Make root and release keys, and trust for one control plane.

    \b
    Example:
      slmops keys init --server-data /var/lib/slmops
    """
    report = init_keys(
        workspace_of(keys_folder), server_data, ask_passphrase(new=True), datetime.now(timezone.utc)
    )
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

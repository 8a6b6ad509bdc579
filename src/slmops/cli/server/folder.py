"""The control plane's data folder."""

from __future__ import annotations

from pathlib import Path

import click

data_option = click.option(
    "--data-dir",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    envvar="SLMOPS_SERVER_DATA",
    help="Data folder: database, chunks, online keys.",
)

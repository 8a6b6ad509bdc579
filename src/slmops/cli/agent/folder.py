"""Which device: the folder that an agent keeps."""

from __future__ import annotations

from pathlib import Path

import click

in_folder = click.option(
    "--dir",
    "directory",
    default=Path("slmops-device"),
    type=click.Path(file_okay=False, path_type=Path),
    envvar="SLMOPS_DEVICE_DIR",
    show_default=True,
    help="The device's folder.",
)

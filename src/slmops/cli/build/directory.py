"""The folder of a build."""

from __future__ import annotations

from pathlib import Path

import click

BUILD_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)

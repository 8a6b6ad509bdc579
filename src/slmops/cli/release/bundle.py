"""The folder of a release."""

from __future__ import annotations

from pathlib import Path

import click

BUNDLE = click.Path(exists=True, file_okay=False, path_type=Path)

"""Where offline keys lie, and how their passphrase is asked for."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.release import Workspace, read_passphrase


def ask_passphrase(*, new: bool = False) -> str:
    """The passphrase from SLMOPS_PASSPHRASE, else asked for (a new one twice); never from the command line."""
    return read_passphrase(lambda prompt: click.prompt(prompt, hide_input=True, confirmation_prompt=new))


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

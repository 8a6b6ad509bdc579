"""``slmops release verify``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import json_option
from slmops.cli.keys.workspace import keys_option, workspace_of
from slmops.cli.output import print_json
from slmops.cli.release.bundle import BUNDLE
from slmops.release import open_bundle, verify_bundle


@click.command("verify")
@click.argument("bundle", type=BUNDLE)
@keys_option
@json_option
def verify(bundle: Path, keys_folder: Path | None, as_json: bool) -> None:
    """Hash every byte of BUNDLE again and check its signatures.

    \b
    Example:
      slmops release verify releases/home-intents-1.2.0
    """
    report = verify_bundle(open_bundle(bundle), workspace_of(keys_folder))
    if as_json:
        print_json(report)
    else:
        click.echo(f"{bundle}: verified ({report})")

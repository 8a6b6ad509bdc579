"""``slmops profile show``."""

from __future__ import annotations

import click

from slmops.cli.connection import json_option
from slmops.cli.output import print_json
from slmops.core.device.profile import BUILTIN_PROFILES
from slmops.core.errors import NotFoundError


@click.command("show")
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one profile.

    \b
    Example:
      slmops profile show pi5-8gb
    """
    found = BUILTIN_PROFILES.get(name)
    if found is None:
        raise NotFoundError(f"profile {name!r} is not known", hint=f"one of {', '.join(BUILTIN_PROFILES)}")
    if as_json:
        print_json(found)
        return
    for attribute in found.__dataclass_fields__:
        click.echo(f"{attribute}: {getattr(found, attribute)}")

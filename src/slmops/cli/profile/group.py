"""``slmops profile``: classes of devices that every installation knows."""

from __future__ import annotations

import click

from slmops.cli.connection import json_option
from slmops.cli.output import megabytes, print_json, print_table
from slmops.core.device.profile import BUILTIN_PROFILES
from slmops.core.errors import NotFoundError


@click.group()
def profile() -> None:
    """Device profiles: what a class of devices has."""


@profile.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the built-in profiles."""
    if as_json:
        print_json(list(BUILTIN_PROFILES.values()))
        return
    rows = [
        (p.name, p.arch, megabytes(p.ram_bytes), megabytes(p.disk_bytes), p.cores, ", ".join(p.runtimes))
        for p in BUILTIN_PROFILES.values()
    ]
    print_table(("name", "arch", "RAM for slmops", "disk for slmops", "cores", "runtimes"), rows)


@profile.command("show")
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one profile."""
    found = BUILTIN_PROFILES.get(name)
    if found is None:
        raise NotFoundError(f"profile {name!r} is not known", hint=f"one of {', '.join(BUILTIN_PROFILES)}")
    if as_json:
        print_json(found)
        return
    for attribute in found.__dataclass_fields__:
        click.echo(f"{attribute}: {getattr(found, attribute)}")

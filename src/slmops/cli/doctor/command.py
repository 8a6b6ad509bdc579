"""``slmops doctor``: what works here, and what this machine can hold."""

from __future__ import annotations

import os
from pathlib import Path

import click

from slmops.build.cache import DEFAULT_FOLDER, FOLDER_VARIABLE
from slmops.build.export.machine import machine_facts
from slmops.cli.connection import json_option
from slmops.cli.output import megabytes, print_json, print_table


@click.command("doctor")
@json_option
def doctor(as_json: bool) -> None:
    """Show what works on this machine: cores, memory, disk, runtimes, toolchains of exporters.

    \b
    Example:
      slmops doctor --json
    """
    facts = machine_facts(Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).absolute())
    if as_json:
        print_json(facts)
        return
    click.echo(f"{facts['machine']}, Python {facts['python']}, {facts['cores']} cores")
    click.echo(f"memory: {megabytes(facts['ram_bytes'])}, {megabytes(facts['ram_available_bytes'])} free")
    click.echo(f"disk: {megabytes(facts['disk_free_bytes'])} free for the cache {facts['cache']}")
    click.echo(f"GPU: {facts['gpu'] or 'none'} (slmops uses none)")
    click.echo(
        f"torch: {facts['torch'] or 'not installed'}"
        + ("" if facts["torch"] else ' (training and searches by gradients: pip install "slmops[train]")')
    )
    click.echo()
    runtimes = [(r["name"], r["version"] or "not installed", r["missing"] or "") for r in facts["runtimes"]]
    print_table(("runtime", "version", "to install it"), runtimes)
    click.echo()
    rows = [
        (
            t["name"],
            "made"
            if t["made"]
            else f"on demand (Python {t['python']} {'found' if t['python_found'] else 'MISSING'})",
            megabytes(t["bytes"]),
            t["purpose"],
        )
        for t in facts["toolchains"]
    ]
    print_table(("toolchain", "state", "size", "for"), rows)

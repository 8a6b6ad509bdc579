"""``slmops device show``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import megabytes, print_json, print_table


@click.command("show")
@click.argument("device_id")
@with_server
@json_option
def show(device_id: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show one device with its facts and its history.

    \b
    Example:
      slmops device show kitchen-1
    """
    with connect(server, token_file) as plane:
        found = plane.device(device_id)
    if as_json:
        print_json(found)
        return
    click.echo(
        f"{found.id} ({found.profile}, {found.state}): {found.phase or 'never seen'}, release {found.release or '-'}"
    )
    click.echo(f"labels: {', '.join(f'{k}={v}' for k, v in sorted(found.labels.items())) or '-'}")
    facts = found.facts
    click.echo(
        f"facts: {facts.arch}, {facts.cores} cores, {megabytes(facts.ram_limit_bytes)} RAM allowed, "
        f"{megabytes(facts.disk_free_bytes)} disk free"
    )
    if facts.bench is not None:
        click.echo(
            f"bench: {facts.bench.decode_tps:.1f} decode tokens/s, {facts.bench.prefill_tps:.1f} prefill, "
            f"RSS {megabytes(facts.bench.rss_bytes)}"
        )
    rows = [(o.received_at, o.status, o.code or "-", o.detail) for o in found.outcomes]
    print_table(("when", "outcome", "code", "detail"), rows, empty="no outcomes yet")

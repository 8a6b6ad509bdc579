"""``slmops release show``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import megabytes, print_json, print_table


@click.command("show")
@click.argument("reference")
@with_server
@json_option
def show(reference: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show a published release: MODEL@VERSION, or the beginning of its digest.

    \b
    Example:
      slmops release show home-intents@1.2.0
    """
    with connect(server, token_file) as plane:
        found = plane.release(reference)
    if as_json:
        print_json(found)
        return
    click.echo(
        f"{found.model}@{found.version}  {found.digest}\nlicence {found.licence}, built from {found.base.name}"
    )
    for waiver in found.waivers:
        click.secho(f"waived {waiver.gate}: {waiver.reason}", fg="yellow")
    rows = [
        (
            v.profile,
            megabytes(v.artifact_bytes),
            f"{v.measured.bits_per_weight:.2f}",
            f"{v.measured.kld_mean:.4f}",
            f"{v.measured.decode_tps:.0f}",
        )
        for v in found.variants
    ]
    print_table(("profile", "file", "bits/w", "mean KL", "decode/s"), rows)

"""``slmops release create``."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import click

from slmops.cli.connection import json_option
from slmops.cli.keys.workspace import ask_passphrase, keys_option, workspace_of
from slmops.cli.output import print_json
from slmops.cli.release.bundle import BUNDLE
from slmops.core.errors import UsageError
from slmops.release import create_release


def parse_waivers(waive: tuple[str, ...], reasons: tuple[str, ...]) -> dict[str, str]:
    """Pair ``--waive`` with ``--reason`` in order.

    Raises:
        UsageError: a gate is waived without saying why.
    """
    if len(waive) != len(reasons) or not all(reason.strip() for reason in reasons):
        raise UsageError(
            f"{len(waive)} gates are waived, {len(reasons)} reasons are given",
            hint="write --waive GATE --reason 'why' for each gate",
        )
    return dict(zip(waive, reasons, strict=True))


@click.command("create")
@click.argument("build", type=BUNDLE)
@click.option(
    "--version",
    required=True,
    help="Version label, for example 1.0.0. A version never changes once it is released.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Bundle directory.  [default: releases/MODEL-VERSION]",
)
@click.option(
    "--waive",
    multiple=True,
    metavar="GATE",
    help="Let a gate through that did not pass (metric, or profile:metric).",
)
@click.option("--reason", multiple=True, help="Why; signed into the release and shown. One for each --waive.")
@keys_option
@json_option
def create(
    build: Path,
    version: str,
    out: Path | None,
    waive: tuple[str, ...],
    reason: tuple[str, ...],
    keys_folder: Path | None,
    as_json: bool,
) -> None:
    """Sign BUILD (a build directory) as a release.

    \b
    Examples:
      slmops release create build/home-intents --version 1.0.0
      slmops release create build/x --version 1.0.1 --waive task.exact_match --reason "pilot, agreed with Ann"
    """
    folder = out or Path("releases") / f"{build.resolve().name}-{version}"
    bundle = create_release(
        build,
        version=version,
        workspace=workspace_of(keys_folder),
        passphrase=ask_passphrase(),
        waivers=parse_waivers(waive, reason),
        out_dir=folder,
        created=datetime.now(timezone.utc),
    )
    if as_json:
        print_json(
            {
                "directory": str(folder),
                "digest": bundle.digest,
                "model": bundle.release.model,
                "version": bundle.release.version,
                "release_seq": bundle.release.release_seq,
            }
        )
        return
    click.echo(
        f"signed {bundle.release.model}@{bundle.release.version} (release_seq {bundle.release.release_seq})"
    )
    click.echo(f"  digest {bundle.digest}")
    for waiver in bundle.release.waivers:
        click.secho(f"  waived {waiver.gate}: {waiver.reason}", fg="yellow")
    click.echo(f"  next: slmops release publish {folder}")

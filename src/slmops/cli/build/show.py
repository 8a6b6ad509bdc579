"""``slmops build show``."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.build import describe, load_build
from slmops.build.picture import svg
from slmops.build.report import evidence_of, explain, points
from slmops.cli.build.directory import BUILD_DIRECTORY
from slmops.cli.build.printing import print_explained, print_points
from slmops.cli.build.tables import print_build
from slmops.cli.connection import json_option
from slmops.cli.output import print_json


@click.command("show")
@click.argument("directory", type=BUILD_DIRECTORY)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write size, divergence and speed of all variants to this SVG file.",
)
@json_option
def show(directory: Path, picture: Path | None, as_json: bool) -> None:
    """Show a build: variants and gates, what was chosen, what it costs in quality, what would help.

    \b
    Examples:
      slmops build show build/home-intents
      slmops build show build/home-intents --picture variants.svg
    """
    built = load_build(directory)
    described = describe(built)
    explained, compared = explain(built, evidence_of(directory, built)), points(built)
    if picture is not None:
        picture.write_text(svg(f"{built.model}: {len(compared)} variants", compared), encoding="utf-8")
    if as_json:
        print_json({**described, "explained": explained, "points": compared})
        return
    print_build(described)
    print_points(compared)
    print_explained(explained)
    if picture is not None:
        click.echo(f"\nwrote {picture}")

"""The blueprint file that a command was given, and how its plan is printed."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.output import megabytes, print_table
from slmops.client.records import BlueprintPlan
from slmops.core.errors import DocumentError


def read_blueprint(file: Path) -> str:
    """The file's text.

    Raises:
        DocumentError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(
            f"{file}: cannot be read as UTF-8 text: {error}", hint="save the blueprint as UTF-8"
        ) from error


def print_plan(planned: BlueprintPlan) -> None:
    """Waves and variants, for people."""
    click.echo(f"{planned.blueprint}: {planned.model}@{planned.version or '?'}")
    for wave in planned.waves:
        click.echo(f"  wave {wave.index + 1} ({wave.rule}): {', '.join(wave.devices) or 'nobody'}")
    rows = [
        (
            c.device_id,
            c.wave + 1,
            c.variant or "-",
            megabytes(c.artifact_bytes),
            megabytes(c.memory_bytes),
            f"{c.predicted_decode_tps:.0f}" + ("" if c.speed_is_measured else " predicted"),
            "; ".join(r for v in c.refused for r in v.reasons),
        )
        for c in planned.choices
    ]
    print_table(
        ("device", "wave", "variant", "file", "memory", "decode/s", "refused"),
        rows,
        empty="  no devices match",
    )
    for note in planned.notes:
        click.secho(f"  note: {note}", fg="yellow")


file_option = click.option(
    "-f",
    "--file",
    "file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Blueprint YAML.",
)

"""The blueprint file that a command was given, and how its plan is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from slmops.cli.output import megabytes, print_table
from slmops.client.records import BlueprintPlan, DeviceChoice
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
    if planned.choices:
        click.echo(f"  in sum: {_sums(planned.choices)}")
    for note in planned.notes:
        click.secho(f"  note: {note}", fg="yellow")


def _sums(choices: Sequence[DeviceChoice]) -> str:
    """What a plan comes to: devices by variant, those that fit nothing, and the bytes that it may move."""
    variants = Counter(choice.variant for choice in choices if choice.variant)
    parts = [f"{number} x {variant}" for variant, number in variants.most_common()]
    none = sum(not choice.variant for choice in choices)
    parts += [f"{none} that fit no variant"] if none else []
    moved = sum(choice.artifact_bytes for choice in choices)
    return f"{len(choices)} devices ({', '.join(parts)}), {megabytes(moved)} at most to move"


file_option = click.option(
    "-f",
    "--file",
    "file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Blueprint YAML.",
)

"""``slmops blueprint``: declare what a cohort should run."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import megabytes, print_json, print_table
from slmops.client.records import BlueprintPlan

_file = click.option(
    "-f",
    "--file",
    "file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Blueprint YAML.",
)


@click.group()
def blueprint() -> None:
    """Blueprints: the declared state of a cohort, and how a change reaches it."""


@blueprint.command("plan")
@_file
@with_server
@json_option
def plan(file: Path, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show waves and the variant for each device; change nothing."""
    with connect(server, token_file) as plane:
        planned = plane.plan_blueprint(file.read_text(encoding="utf-8"), str(file))
    print_json(planned) if as_json else print_plan(planned)


@blueprint.command("apply")
@_file
@with_server
@json_option
def apply(file: Path, server: str, token_file: Path | None, as_json: bool) -> None:
    r"""Apply a blueprint; begins a rollout when it changes what devices run.

    \b
    Example:
      slmops blueprint apply -f examples/home-intents/blueprint.yaml
    """
    with connect(server, token_file) as plane:
        applied = plane.apply_blueprint(file.read_text(encoding="utf-8"), str(file))
    if as_json:
        print_json(applied)
        return
    print_plan(applied.plan)
    if applied.rollout_id:
        click.echo(f"rollout {applied.rollout_id}: slmops rollout watch {applied.rollout_id}")
    else:
        click.echo("nothing to roll out")


@blueprint.command("list")
@with_server
@json_option
def list_command(server: str, token_file: Path | None, as_json: bool) -> None:
    """List blueprints."""
    with connect(server, token_file) as plane:
        found = plane.blueprints()
    if as_json:
        print_json(found)
        return
    rows = [
        (b.name, b.revision, b.model, b.channel or b.version, b.selector or "all", b.applied_by, b.applied_at)
        for b in found
    ]
    print_table(
        ("blueprint", "rev", "model", "release", "selector", "by", "when"),
        rows,
        empty="no blueprints: slmops blueprint apply -f FILE",
    )


@blueprint.command("history")
@click.argument("name")
@with_server
@json_option
def history(name: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show all revisions of a blueprint, newest first."""
    with connect(server, token_file) as plane:
        found = plane.blueprint_history(name)
    if as_json:
        print_json(found)
        return
    print_table(
        ("rev", "release", "rollout", "by", "when"),
        [
            (b.revision, b.channel or b.version, b.rollout_id or "-", b.applied_by, b.applied_at)
            for b in found
        ],
    )


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

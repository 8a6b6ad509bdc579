"""``slmops build``: from a recipe to measured variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slmops.build import StepEvent, describe, diff, load_build, run_build
from slmops.cli.connection import json_option
from slmops.cli.output import Progress, megabytes, percent, print_json, print_table
from slmops.core.evidence.gates import Verdict

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def build() -> None:
    """Build a model's variants from a recipe, and measure the shipped files."""


def show_steps(progress: Progress) -> Any:
    """A callback that prints step events."""

    def show(event: StepEvent) -> None:
        where = f"[{event.finished}/{event.total}]"
        if event.state in ("started", "progress"):
            share = f" {event.ratio:.0%}" if event.ratio is not None else ""
            progress.update(f"{where} {event.step}{share} {event.note} ({event.seconds:.0f} s)")
        elif event.state == "cached":
            progress.done(f"{where} {event.step}: known, not run again")
        else:
            progress.done(
                f"{where} {event.step}: {event.state} in {event.seconds:.1f} s {event.note}".rstrip()
            )

    return show


@build.command("run")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Build directory.  [default: build/RECIPE'S NAME]",
)
@click.option("--target", "targets", multiple=True, help="Only this profile (may be repeated).")
@click.option(
    "--engine", type=click.Choice(["local"]), default="local", show_default=True, help="Where the steps run."
)
@click.option(
    "--cache",
    "cache_folder",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="SLMOPS_CACHE",
    help="Step cache.  [default: .slmops-cache]",
)
@click.option("--fast", is_flag=True, help="Evaluate less (recorded in the evidence).")
@click.option("--workers", default=2, show_default=True, help="Steps at once.")
@click.option(
    "--speed-table",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Speed of each type on another machine (JSON), instead of the recipe's search.speed.",
)
@json_option
def run(
    recipe: Path,
    out: Path | None,
    targets: tuple[str, ...],
    engine: str,
    cache_folder: Path | None,
    fast: bool,
    workers: int,
    speed_table: Path | None,
    as_json: bool,
) -> None:
    """Build what RECIPE describes. Steps whose inputs did not change are not run again.

    \b
    Examples:
      slmops build run examples/home-intents/recipe.yaml
      slmops build run recipe.yaml --target pi5-8gb --fast
    """
    folder = out or Path("build") / recipe.resolve().parent.name
    result = run_build(
        recipe,
        folder,
        cache_dir=cache_folder,
        targets=list(targets) or None,
        fast=fast,
        progress=show_steps(Progress(quiet=as_json)),
        workers=workers,
        speed_table=speed_table,
    )
    if as_json:
        print_json(
            {
                "directory": str(folder),
                "changed": result.changed,
                "steps_run": result.steps_run,
                "steps_cached": result.steps_cached,
                "seconds": result.seconds,
                "verdict": result.verdict,
                **describe(load_build(folder)),
            }
        )
        return
    if not result.changed:
        click.echo(f"nothing to do: {folder} already holds this build ({result.steps_cached} steps known)")
    else:
        click.echo(
            f"built {folder} in {result.seconds:.0f} s ({result.steps_run} steps run, {result.steps_cached} known)"
        )
    _print_build(describe(load_build(folder)))


@build.command("show")
@click.argument("directory", type=_DIRECTORY)
@json_option
def show(directory: Path, as_json: bool) -> None:
    """Show variants, gates and steps of a build directory.

    \b
    Example:
      slmops build show build/home-intents
    """
    described = describe(load_build(directory))
    print_json(described) if as_json else _print_build(described)


@build.command("diff")
@click.argument("old", type=_DIRECTORY)
@click.argument("new", type=_DIRECTORY)
@json_option
def diff_command(old: Path, new: Path, as_json: bool) -> None:
    """Say what differs between two build directories.

    \b
    Example:
      slmops build diff build/home-intents-1 build/home-intents-2
    """
    difference = diff(load_build(old), load_build(new))
    if as_json:
        print_json(difference)
        return
    _print_nested(difference, "")


def _print_nested(value: Any, indent: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, (dict, list)):
                click.echo(f"{indent}{key}:")
                _print_nested(item, indent + "  ")
            else:
                click.echo(f"{indent}{key}: {item}")
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, (dict, list)):
                _print_nested(item, indent)
                click.echo("")
            else:
                click.echo(f"{indent}- {item}")


_COLOURS = {
    Verdict.PASS.value: "green",
    Verdict.FAIL.value: "red",
    Verdict.ERROR.value: "red",
    Verdict.INCONCLUSIVE.value: "yellow",
}
_LIGHTS = {"amber": "yellow", "red": "red"}


def _print_build(described: dict[str, Any]) -> None:
    print_variants(described["variants"])
    print_weight_steps(described["weight_steps"])
    for gate in described["gates"]:
        click.secho(f"{gate['verdict']:<12} ", fg=_COLOURS.get(gate["verdict"]), nl=False)
        click.echo(f"{gate.get('profile', '')} {gate['gate']}: {gate['reason']}".strip())
    for warning in described["warnings"]:
        if warning["light"] != "green":
            click.secho(f"{'warning':<12} ", fg=_LIGHTS[warning["light"]], nl=False)
            sure = "" if warning["sure"] else ", not surely"
            click.echo(
                f"{warning['profile']} {warning['signal']}: {warning['value']:.4g} is {warning['light']}{sure} "
                f"(amber from {warning['amber_from']:g}, red from {warning['red_from']:g}); it stops nothing by itself"
            )


def print_weight_steps(figures: dict[str, dict[str, Any]]) -> None:
    """What pruning, recovery and sparsity did, one line a step, and the sparsity report's verdict."""
    for name, value in figures.items():
        if "verdict" in value:
            click.echo(f"{name}: {value['verdict']}")
            continue
        shown = [
            f"{key} {number:.4g}" if isinstance(number, float) else f"{key} {number}"
            for key, number in value.items()
            if isinstance(number, (int, float, str))
        ]
        click.echo(f"{name}: {', '.join(shown)}")


def print_variants(variants: list[dict[str, Any]]) -> None:
    """The variants' table, as ``build run``, ``build show`` and the demo print it."""
    rows = []
    for variant in variants:
        m = variant["measured"]
        rows.append(
            (
                variant["profile"],
                megabytes(variant["artifact_bytes"]),
                f"{m['bits_per_weight']:.2f}",
                f"{m['kld_mean']:.4f}",
                percent(m["same_top_ratio"]),
                f"{m['perplexity']:.2f}",
                f"{m['decode_tps']:.0f}",
                f"{m['prefill_tps']:.0f}",
                f"{m['load_s']:.1f}",
                megabytes(m["rss_bytes"]),
                percent(m.get("exact_match_ratio")),
                f"{percent(m.get('schema_valid_ratio'))} / {percent(m.get('schema_valid_constrained_ratio'))}",
            )
        )
    headings = (
        "profile",
        "file",
        "bits/w",
        "mean KL",
        "same top",
        "ppl",
        "decode/s",
        "prefill/s",
        "load s",
        "peak RSS",
        "exact",
        "valid JSON free / constrained",
    )
    print_table(headings, rows)

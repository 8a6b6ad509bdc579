"""``slmops build``: from a recipe to measured variants."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from slmops.build import StepEvent, describe, diff, load_build, run_build
from slmops.build.picture import svg
from slmops.build.report import evidence_of, explain, points
from slmops.cli.build.printing import print_diff, print_explained, print_points
from slmops.cli.build.starter import DEFAULT_PROFILES, base_lines, model_name, recipe_text, write_recipe
from slmops.cli.connection import json_option
from slmops.cli.output import Progress, megabytes, percent, print_json, print_table
from slmops.core.errors import UsageError
from slmops.core.evidence.gates import Verdict

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def build() -> None:
    """Build a model's variants from a recipe, and measure the shipped files."""


def show_steps(progress: Progress) -> Any:
    """A callback that prints step events."""

    def show(event: StepEvent) -> None:
        left = "" if event.left_s is None else f", about {_duration(event.left_s)} left"
        where = f"[{event.finished}/{event.total}{left}]"
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


def _duration(seconds: float) -> str:
    """For people: ``40 s``, ``3 min``, ``1.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@build.command("run")
@click.argument("recipe", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Instead of RECIPE: a GGUF file or Hugging Face directory, with --examples.",
)
@click.option(
    "--examples",
    type=click.Path(dir_okay=False, path_type=Path),
    help='Instead of RECIPE: JSON lines such as {"prompt": "...", "answer": "..."}.',
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    help="Instead of RECIPE: build for this device profile (may be repeated).  [default: pi5-8gb]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Build directory.  [default: build/NAME]",
)
@click.option("--target", "targets", multiple=True, help="Only this profile of RECIPE (may be repeated).")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where the steps run: this machine, or a Ray cluster (RAY_ADDRESS; needs slmops[ray]).",
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
    recipe: Path | None,
    base: Path | None,
    examples: Path | None,
    profiles: tuple[str, ...],
    out: Path | None,
    targets: tuple[str, ...],
    engine: str,
    cache_folder: Path | None,
    fast: bool,
    workers: int,
    speed_table: Path | None,
    as_json: bool,
) -> None:
    """Build what RECIPE describes, or from a base and a handful of examples alone.

    Steps whose inputs did not change are not run again; a build that was killed goes on where it was.

    \b
    Examples:
      slmops build run examples/home-intents/recipe.yaml
      slmops build run recipe.yaml --target pi5-8gb --fast
      slmops build run --base model.gguf --examples examples.jsonl --profile pi5-8gb --profile pi-zero2-512mb
      RAY_ADDRESS=auto slmops build run recipe.yaml --engine ray --workers 8
    """
    if recipe is not None and (base or examples or profiles):
        raise UsageError(
            f"RECIPE {recipe} and --base, --examples or --profile were given, expected one or the other",
            hint="put base, examples and profiles into the recipe, or leave the recipe out",
        )
    if recipe is None:
        recipe, out = _recipe_from_flags(base, examples, profiles, out)
        click.echo(f"wrote {recipe}: edit it to change anything, and build it again by its name", err=True)
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
        engine=engine,
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


def _recipe_from_flags(
    base: Path | None, examples: Path | None, profiles: tuple[str, ...], out: Path | None
) -> tuple[Path, Path]:
    """Write the recipe that the flags mean beside the build directory; give its path and the directory's."""
    if base is None or examples is None:
        missing = (
            "RECIPE" if base is None and examples is None else "--base" if base is None else "--examples"
        )
        raise UsageError(
            f"{missing} is missing",
            hint="slmops build run RECIPE, or slmops build run --base model.gguf --examples examples.jsonl; "
            "to begin from nothing: slmops init DIR",
        )
    if not examples.is_file():
        raise UsageError(
            f"--examples {examples}: does not exist",
            hint='make it: one object a line, {"prompt": "what is asked", "answer": "what is right"}',
        )
    name = model_name(base.absolute())
    folder = out or Path("build") / name
    recipe = folder.with_name(f"{folder.name}.yaml")
    text = recipe_text(
        name,
        base_lines(base, recipe.parent),
        os.path.relpath(examples, recipe.parent),
        profiles or DEFAULT_PROFILES,
    )
    write_recipe(recipe, text)
    return recipe, folder


@build.command("show")
@click.argument("directory", type=_DIRECTORY)
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
    _print_build(described)
    print_points(compared)
    print_explained(explained)
    if picture is not None:
        click.echo(f"\nwrote {picture}")


@build.command("diff")
@click.argument("old", type=_DIRECTORY)
@click.argument("new", type=_DIRECTORY)
@json_option
def diff_command(old: Path, new: Path, as_json: bool) -> None:
    """Say what differs between two build directories, figure by figure.

    \b
    Example:
      slmops build diff build/home-intents-1 build/home-intents-2
    """
    difference = diff(load_build(old), load_build(new))
    if as_json:
        print_json(difference)
        return
    print_diff(difference, str(old), str(new))


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

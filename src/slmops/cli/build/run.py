"""``slmops build run``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from slmops.build import describe, load_build, run_build
from slmops.cli.build.starter import (
    DEFAULT_PROFILES,
    RECIPE,
    base_lines,
    model_name,
    recipe_text,
    write_recipe,
)
from slmops.cli.build.steps import show_steps
from slmops.cli.build.tables import print_build
from slmops.cli.connection import json_option
from slmops.cli.output import Progress, print_json
from slmops.core.errors import UsageError


@click.command("run")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
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
    help="Build directory.  [default: build/NAME, NAME being the recipe's folder or the base]",
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
    """Build what RECIPE (a file, or a folder with recipe.yaml) describes, or from a base and a handful of examples alone.

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
    elif recipe.is_dir():
        recipe = _recipe_in(recipe)
    folder = out or Path("build") / recipe.resolve().parent.name
    _require_writable(folder)
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
    print_build(describe(load_build(folder)))


def _require_writable(folder: Path) -> None:
    """Say now, not after minutes of work, that the build has nowhere to go.

    Raises:
        UsageError: the nearest folder that exists above may not be written to, or is none.
    """
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder}: {above} may not be written to", hint="give another --out")


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
        recipe,
    )
    if write_recipe(recipe, text):
        click.echo(f"wrote {recipe}: edit it to change anything, and build it again by its name", err=True)
    return recipe, folder


def _recipe_in(folder: Path) -> Path:
    """The recipe of a project folder.

    Raises:
        UsageError: it has none.
    """
    recipe = folder / RECIPE
    if not recipe.is_file():
        raise UsageError(
            f"{folder} is a folder without {RECIPE}",
            hint="give the recipe's file, or make a project: slmops init DIR",
        )
    return recipe

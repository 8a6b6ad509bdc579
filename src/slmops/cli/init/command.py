"""``slmops init``: a starter project that builds as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from slmops.cli.build.starter import (
    DEFAULT_PROFILES,
    RECIPE,
    STARTER_BASE,
    STARTER_EXAMPLES,
    base_lines,
    model_name,
    recipe_text,
)
from slmops.core.errors import ConflictError

EXAMPLES = "examples.jsonl"


@click.command("init")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="GGUF file or Hugging Face directory.  [default: SmolLM2-135M]",
)
@click.option(
    "--examples",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines with prompt and answer, copied into the project.  [default: a few to begin with]",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    default=DEFAULT_PROFILES,
    show_default=True,
    help="May be repeated.",
)
def init(directory: Path, base: Path | None, examples: Path | None, profiles: tuple[str, ...]) -> None:
    """Make a starter project in DIRECTORY: a recipe that builds as it is, and examples to replace by yours.

    \b
    Examples:
      slmops init my-model
      slmops init my-model --base model.gguf --profile pi5-8gb --profile n100-16gb
    """
    taken = [name for name in (RECIPE, EXAMPLES) if (directory / name).exists()]
    if taken:
        raise ConflictError(
            f"{directory / taken[0]} exists", hint="choose another directory, or remove the file"
        )
    lines = base_lines(base, directory) if base is not None else STARTER_BASE
    text = recipe_text(model_name(directory.absolute()), lines, EXAMPLES, profiles, directory / RECIPE)
    directory.mkdir(parents=True, exist_ok=True)
    if examples is not None:
        shutil.copyfile(examples, directory / EXAMPLES)
    else:
        (directory / EXAMPLES).write_text(
            "".join(json.dumps({"prompt": asked, "answer": said}) + "\n" for asked, said in STARTER_EXAMPLES),
            encoding="utf-8",
        )
    (directory / RECIPE).write_text(text, encoding="utf-8")
    click.echo(f"wrote {directory / RECIPE} and {directory / EXAMPLES}")
    click.echo(f"  put your own examples into {directory / EXAMPLES}, one JSON object a line")
    click.echo(f"  then: slmops build run {directory / RECIPE}")

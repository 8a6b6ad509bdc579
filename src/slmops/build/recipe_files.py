"""Reading a recipe with everything that it names: profiles, and the user's files by digest."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slmops.artifact.digest import sha256_hex
from slmops.build.conversations import read_items
from slmops.build.files import sha256_of_file
from slmops.build.first_steps import (
    hf_sources,
    split_sources,
    with_defaults,
)
from slmops.build.graph import SourceFile
from slmops.build.speeds import read_table
from slmops.core.device.profile import BUILTIN_PROFILES, DeviceProfile
from slmops.core.errors import BaseModelError, DigestError, DocumentError, NotFoundError
from slmops.protocol.documents.profile import Profile
from slmops.protocol.documents.reader import load_documents
from slmops.protocol.documents.recipe import Recipe

#: ``search.speed``: measure the speed of every type here; else a file with another machine's table
MEASURE = "measure"


@dataclass(frozen=True, slots=True)
class ReadRecipe:
    """A recipe with everything that it names.

    Attributes:
        folder: that its paths are relative to; ``sha256``: of the recipe's bytes.
        profiles: of its targets, by name.
        sources: the user's files by role: eval, calibration, schema, system_prompt, base, adapter-0...; of a
            recipe with ``examples``, eval, calibration and general text are what the split of them gave.
        split: counts of that split, and the kind of the task; None without examples.
    """

    recipe: Recipe
    folder: Path
    sha256: str
    profiles: dict[str, DeviceProfile]
    sources: dict[str, SourceFile]
    split: dict[str, Any] | None = None


def read_recipe(path: Path, cache_dir: Path | None = None) -> ReadRecipe:
    """Read and check a recipe and hash the files that it names.

    Raises:
        DocumentError: not valid, or a file that it names does not exist.
        DocumentError: the answers are not of the kind that the task is said to be.
        NotFoundError: a target's profile is neither built in nor in the same file.
        BaseModelError, DigestError: the base file is missing or is another one.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(
            f"{path}: cannot be read: {error}",
            hint="give the path of a recipe, for example examples/home-intents/recipe.yaml",
        ) from error
    documents = load_documents(text, str(path))
    recipes = [document for document in documents if isinstance(document, Recipe)]
    if len(recipes) != 1:
        raise DocumentError(
            f"{path}: has {len(recipes)} documents of kind Recipe, expected one",
            hint="give a file with one kind: Recipe",
        )
    known = BUILTIN_PROFILES | {d.metadata.name: d.profile() for d in documents if isinstance(d, Profile)}
    recipe, folder = recipes[0], path.absolute().parent
    for target in recipe.targets:
        if target.profile not in known:
            raise NotFoundError(
                f"profile {target.profile!r} is not known",
                hint=f"one of {', '.join(known)}, or add a kind: DeviceProfile document to the recipe's file",
            )
    sources = _sources(recipe, folder)
    made, split = split_sources(recipe, sources, cache_dir)
    sources |= made
    recipe = with_defaults(recipe, read_items(sources["eval"].path))
    return ReadRecipe(recipe, folder, sha256_hex(content), known, sources, split)


def with_speed_table(read: ReadRecipe, path: Path) -> ReadRecipe:
    """The recipe with another machine's speed table.

    Raises:
        DocumentError: the file is no speed table.
    """
    read_table(path)
    search = read.recipe.search.model_copy(update={"speed": str(path)})
    source = SourceFile(path.absolute(), sha256_of_file(path))
    recipe = read.recipe.model_copy(update={"search": search})
    return replace(read, recipe=recipe, sources={**read.sources, "speed": source})


def _sources(recipe: Recipe, folder: Path) -> dict[str, SourceFile]:
    task = recipe.task
    paths = {
        "examples": task.examples,
        "chat-template": recipe.base.chat_template,
        "eval": task.eval,
        "calibration": task.calibration,
        "schema": task.answer_schema,
        "system_prompt": task.system_prompt,
        "train": task.train,
        "scales": recipe.search.scales_from,
        "speed": None if recipe.search.speed == MEASURE else recipe.search.speed,
    }
    paths |= {
        f"adapter-{index}": step.merge.adapter
        for index, step in enumerate(recipe.steps)
        if step.merge is not None
    }
    for index, step in enumerate(recipe.steps):
        cut = step.prune or step.distil
        paths |= {
            f"general-{index}-{number}": name for number, name in enumerate(cut.general_text if cut else ())
        }
    sources: dict[str, SourceFile] = {}
    for role, name in paths.items():
        if name is None:
            continue
        path = _plain(folder / name)
        if role == "train" and not path.is_file():
            continue  # only recorded: what the adapter was trained on
        if not path.is_file():
            raise DocumentError(
                f"{path} does not exist (the recipe's {role.split('-')[0]})",
                hint="paths are relative to the recipe's folder; make the data first: see the example's README",
            )
        sources[role] = SourceFile(path, sha256_of_file(path))
    sources |= hf_sources(recipe, folder)
    if recipe.base.gguf is not None:
        path = _plain(folder / recipe.base.gguf)
        if not path.is_file():
            raise BaseModelError(
                f"{path} does not exist (the recipe's base)", hint="paths are relative to the recipe's folder"
            )
        sources["base"] = base = SourceFile(path, sha256_of_file(path))
        expected = recipe.base.sha256
        if expected is not None and base.sha256 != expected:
            raise DigestError(
                f"{path}: expected sha256 {expected}, got {base.sha256} ({path.stat().st_size} bytes)",
                hint="the file is damaged or is another one: fetch it again; if it is wanted, put its digest into the recipe",
                expected=expected,
                actual=base.sha256,
            )
    return sources


def _plain(path: Path) -> Path:
    """A path without detours, as people expect it in messages: a recipe beside its build names ``../examples.jsonl``."""
    return Path(os.path.normpath(path))


def serving_of(recipe: Recipe) -> dict[str, Any]:
    """Serving settings as JSON, as ``core.device.fit.Serving`` takes them."""
    return recipe.serving.model_dump()


def profile_facts(profile: DeviceProfile) -> dict[str, Any]:
    """A profile as JSON, for the evidence."""
    return asdict(profile)

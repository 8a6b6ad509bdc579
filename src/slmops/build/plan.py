"""From a recipe to the step graph.

The order of the list is also the order of preference: what the longest chain waits for comes first.

                                                     (budget P) ┐
    base ─ text ─────────────┬─ imatrix ─┬─ errors, damage 1, damage 2 ─ choose P ─ quantise P ─┬─ likelihood P
      └─ merge, permute = reference ─────┤                                                     ├─ answers P
                             ├─ distributions                                                  ├─ golden scores P
                             └─ answers reference ─ golden pack                                └─ speed P (alone)

A recipe that prunes, sparsifies or distils adds the steps of :mod:`slmops.build.weight_plan`, the answers of the model before
those cuts, and how far the unquantised reference is from it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmops.artifact.digest import sha256_hex
from slmops.build.files import sha256_of_file
from slmops.build.first_steps import (
    BASE,
    base_step,
    budget_step,
    hf_sources,
    split_sources,
    with_defaults,
)
from slmops.build.graph import Output, SourceFile, Step
from slmops.build.speeds import TABLE, read_table
from slmops.build.weight_plan import Weights, plan_weights
from slmops.core.device.profile import BUILTIN_PROFILES, DeviceProfile
from slmops.core.errors import BaseModelError, DigestError, DocumentError, NotFoundError
from slmops.protocol.documents.profile import Profile
from slmops.protocol.documents.reader import load_documents
from slmops.protocol.documents.recipe import Evaluation, Recipe, Search, Target

DAMAGE_PARTS = 2
PREDICTION_PARTS = 2
#: ``search.speed``: measure the speed of every type here; else a file with another machine's table
MEASURE = "measure"
PROMPT_TOKENS, DECODE_TOKENS = 128, 48
#: only where the recipe cuts or trains: the model before that, and what the cuts alone cost
ASKED_PARENT, LIKELIHOOD_REFERENCE, SPARSITY = "answers: dense", "likelihood: unquantised", "sparsity report"
SPEEDS = "speed of types"
TEXT, PACK, ASKED_BASE, ASKED_REFERENCE, DISTRIBUTIONS, GOLDEN_REFERENCE = (
    "render text",
    "golden pack",
    "answers: base",
    "answers: unquantised",
    "distributions: unquantised",
    "golden scores: unquantised",
)


_DISTRIBUTIONS: dict[str, Output | SourceFile] = {
    "ids": Output(DISTRIBUTIONS, "ids.npy"),
    "logprobs": Output(DISTRIBUTIONS, "logprobs.npy"),
    "mass": Output(DISTRIBUTIONS, "tail-mass.npy"),
}


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


@dataclass(frozen=True, slots=True)
class Plan:
    """The graph of a build.

    Attributes:
        steps: in order.
        reference: where the unquantised model comes from; ``base``: where the untouched base comes from.
        targets: those that are built.
        weights: the models of the build by their part; ``paired``: the step whose answers variants are judged against.
    """

    steps: tuple[Step, ...]
    reference: Output
    base: Output | SourceFile
    targets: tuple[Target, ...]
    evaluation: Evaluation
    weights: Weights
    paired: str


def of_target(kind: str, target: Target) -> str:
    """Name of a target's step."""
    return f"{kind}: {target.profile}"


def read_recipe(path: Path, cache_dir: Path | None = None) -> ReadRecipe:
    """Read and check a recipe and hash the files that it names.

    Raises:
        DocumentError: not valid, or a file that it names does not exist.
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
    return ReadRecipe(with_defaults(recipe, split), folder, sha256_hex(content), known, sources, split)


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


def make_plan(read: ReadRecipe, *, only: tuple[str, ...] | None, evaluation: Evaluation) -> Plan:
    """Make the graph.

    Args:
        read: the recipe.
        only: profiles to build; None for all.
        evaluation: how much to measure.

    Raises:
        NotFoundError: ``only`` names a profile that is no target.
    """
    targets = _chosen(read.recipe, only)
    steps: list[Step] = []
    base = base_step(read, steps)
    made = plan_weights(
        read.recipe, read.sources, base, steps, lambda model: _text_step(read, model, evaluation)
    )
    reference = made.reference
    calibration, held_out = Output(TEXT, "calibration.json"), Output(TEXT, "held-out.json")
    imatrix = Output("imatrix", "imatrix.npz")
    search = read.recipe.search
    steps.append(
        Step("imatrix", "slmops.build.steps.calibrate:imatrix", {"model": reference, "text": calibration})
    )
    weights: dict[str, Output | SourceFile] = {"model": reference, "imatrix": imatrix}
    for part in range(DAMAGE_PARTS if search.probe_tokens else 0):
        params = {"probe_tokens": search.probe_tokens, "part": part, "parts": DAMAGE_PARTS}
        steps.append(
            Step(
                f"damage {part + 1}",
                "slmops.build.steps.sensitivity:damage",
                {**weights, "base": made.base, "text": calibration},
                params,
            )
        )
    rows = {"types": list(search.types), "sample_rows": search.sample_rows}
    steps.append(
        Step("errors", "slmops.build.steps.sensitivity:errors", {**weights, "base": made.base}, rows)
    )
    steps += _gradient_steps(read, weights, calibration)
    if search.speed == MEASURE:
        types = {"types": list(search.types), "repeats": evaluation.bench_repeats}
        run = "slmops.build.steps.type_speed:measure"
        steps.append(Step(SPEEDS, run, {"model": reference}, types, exclusive=True))
    variants = {target.profile: Output(of_target("quantise", target), "model.gguf") for target in targets}
    unbounded = [target for target in targets if target.budget.artifact_bytes is None]
    steps += [budget_step(of_target("budget", t), read, t, reference) for t in unbounded]
    for target in targets:
        choosing = _choose_step(read, target, reference)
        steps.append(choosing)
        if search.verify_tokens:
            steps.append(_verify_step(read, target, choosing, calibration))
    steps.append(_answers_step(read, ASKED_REFERENCE, reference, evaluation))
    for target in targets:
        choice = Output(_chosen_by(read.recipe, target))
        inputs: dict[str, Output | SourceFile] = {**weights, "choice": choice, **_feedback_inputs(read)}
        steps.append(Step(of_target("quantise", target), "slmops.build.steps.quantise:write_variant", inputs))
    steps.append(
        Step(
            DISTRIBUTIONS, "slmops.build.steps.divergence:reference", {"model": made.dense, "text": held_out}
        )
    )
    if made.is_cut:
        steps += _cut_steps(read, made, held_out, evaluation)
    if evaluation.base_items:
        few = evaluation.model_copy(update={"task_items": evaluation.base_items, "constrained_items": 0})
        steps.append(_answers_step(read, ASKED_BASE, base, few))
    # without a budget of its own a variant is at most what its profile's memory holds
    smallest = min(targets, key=lambda t: t.budget.artifact_bytes or read.profiles[t.profile].ram_bytes)
    steps += _golden_pack_steps(read, reference, variants[smallest.profile], evaluation)
    for target in targets:
        steps += _measure_steps(read, target, variants[target.profile], held_out, evaluation)
    steps += [_expect_step(target, targets) for target in targets]
    steps += [_speed_step(read, target, variants[target.profile], evaluation) for target in targets]
    if made.before_zeros is not None:
        steps.append(
            _sparsity_step(read, targets[0], variants[targets[0].profile], made.before_zeros, evaluation)
        )
    paired = ASKED_PARENT if made.is_cut else ASKED_REFERENCE
    return Plan(tuple(steps), reference, base, targets, evaluation, made, paired)


def _gradient_steps(read: ReadRecipe, weights: dict[str, Output | SourceFile], text: Output) -> list[Step]:
    """Gradients of sampled targets, and what they predict for every type: where torch is installed, unless told otherwise."""
    search = read.recipe.search
    if not predicts(search):
        return []
    params = {
        "tokens": search.gradient_tokens,
        "seed": read.recipe.evaluation.seed,
        "torch": version("torch"),
    }
    inputs: dict[str, Output | SourceFile] = {"model": weights["model"], "text": text}
    gradients = Step("gradients", "slmops.train.gradients:collect", inputs, params)
    given: dict[str, Output | SourceFile] = {
        **weights,
        "hessians": Output("imatrix", "hessians.npz"),
        "inputs": Output("imatrix"),
        "gradients": Output("gradients", "gradients.npz"),
        "gradients-facts": Output("gradients"),
    }
    rows = {"types": list(search.types), "sample_rows": search.sample_rows, "parts": PREDICTION_PARTS}
    return [
        gradients,
        *(
            Step(
                f"predictions {part + 1}",
                "slmops.build.steps.predicted:predict",
                given,
                {**rows, "part": part},
            )
            for part in range(PREDICTION_PARTS)
        ),
    ]


def predicts(search: Search) -> bool:
    """Whether losses are predicted from gradients.

    Raises:
        DocumentError: the recipe insists on it and torch is not installed.
    """
    present = importlib.util.find_spec("torch") is not None
    if search.sensitivity == "kfac" and not present:
        raise DocumentError(
            "search.sensitivity: kfac needs torch, which is not installed",
            hint='pip install "slmops[train]", or sensitivity: auto (torch where it is installed, else measured damage)',
        )
    return present and search.sensitivity != "measured"


def _feedback_inputs(read: ReadRecipe) -> dict[str, Output | SourceFile]:
    """What quantising with error feedback takes besides weights and importance matrix; feedback would fill up zeros."""
    inputs: dict[str, Output | SourceFile] = {}
    if read.recipe.search.feedback and not any(step.sparsify for step in read.recipe.steps):
        inputs |= {"hessians": Output("imatrix", "hessians.npz"), "inputs": Output("imatrix")}
        if "scales" in read.sources:
            inputs["scales"] = read.sources["scales"]
    return inputs


def _chosen(recipe: Recipe, only: tuple[str, ...] | None) -> tuple[Target, ...]:
    if only is None:
        return recipe.targets
    missing = [name for name in only if name not in {target.profile for target in recipe.targets}]
    if missing:
        raise NotFoundError(
            f"the recipe has no target {', '.join(missing)}",
            hint=f"its targets: {', '.join(t.profile for t in recipe.targets)}",
        )
    return tuple(target for target in recipe.targets if target.profile in only)


def _text_step(read: ReadRecipe, base: Output | SourceFile, evaluation: Evaluation) -> Step:
    inputs: dict[str, Output | SourceFile] = {"model": base, "facts": Output(BASE)}
    inputs |= {
        name: read.sources[name]
        for name in ("eval", "calibration", "general", "system_prompt")
        if name in read.sources
    }
    params = {
        "calibration_tokens": read.recipe.search.calibration_tokens,
        "text_tokens": evaluation.text_tokens,
        "task_items": evaluation.task_items,
        "seed": evaluation.seed,
    }
    return Step(TEXT, "slmops.build.steps.text:render", inputs, params)


def _choose_step(read: ReadRecipe, target: Target, reference: Output) -> Step:
    profile = read.profiles[target.profile]
    params: dict[str, Any] = {
        "profile": target.profile,
        "types": list(read.recipe.search.types),
        "artifact_bytes": target.budget.artifact_bytes,
        "ram_bytes": target.budget.ram_bytes or profile.ram_bytes,
        "serving": serving_of(read.recipe),
    }
    inputs: dict[str, Output | SourceFile] = {"model": reference, "errors": Output("errors")}
    if read.recipe.search.speed is not None:
        params["decode_tps"] = target.budget.decode_tps
        inputs[TABLE] = read.sources["speed"] if "speed" in read.sources else Output(SPEEDS)
    if read.recipe.search.probe_tokens:
        inputs |= {f"damage-{part + 1}": Output(f"damage {part + 1}") for part in range(DAMAGE_PARTS)}
    if target.budget.artifact_bytes is None:
        inputs["budget"] = Output(of_target("budget", target))
    if predicts(read.recipe.search):
        inputs |= {
            f"predictions-{part + 1}": Output(f"predictions {part + 1}") for part in range(PREDICTION_PARTS)
        }
    return Step(of_target("choose", target), "slmops.build.steps.choose:choose", inputs, params, light=True)


def _verify_step(read: ReadRecipe, target: Target, choosing: Step, text: Output) -> Step:
    """The best choices by their true divergence, and better ones near them."""
    search = read.recipe.search
    params = {
        **choosing.params,
        "tokens": search.verify_tokens,
        "neighbours": search.neighbours,
        "seed": read.recipe.evaluation.seed,
    }
    inputs = {
        **choosing.inputs,
        "imatrix": Output("imatrix", "imatrix.npz"),
        "choice": Output(choosing.name),
        "text": text,
        **_feedback_inputs(read),
    }
    return Step(of_target("verify", target), "slmops.build.steps.repair:repair", inputs, params)


def _chosen_by(recipe: Recipe, target: Target) -> str:
    """Name of the step that has the last word on a target's types."""
    return of_target("verify" if recipe.search.verify_tokens else "choose", target)


def _answers_step(read: ReadRecipe, name: str, model: Output | SourceFile, evaluation: Evaluation) -> Step:
    inputs: dict[str, Output | SourceFile] = {
        "model": model,
        "text": Output(TEXT),
        "eval": read.sources["eval"],
    }
    if "schema" in read.sources:
        inputs["schema"] = read.sources["schema"]
    params = {
        "task_items": evaluation.task_items,
        "constrained_items": evaluation.constrained_items,
        "seed": evaluation.seed,
    }
    return Step(name, "slmops.build.steps.answers:ask", inputs, params)


def _golden_pack_steps(
    read: ReadRecipe, reference: Output, variant: Output, evaluation: Evaluation
) -> list[Step]:
    """Choose the pack, on the smallest variant as it is and damaged, and score it with the reference."""
    inputs: dict[str, Output | SourceFile] = {
        "eval": read.sources["eval"],
        "answers": Output(ASKED_REFERENCE, "answers.jsonl"),
        "asked": Output(ASKED_REFERENCE),
    }
    params: dict[str, Any] = {
        "count": evaluation.golden_prompts,
        "max_drop_ratio": evaluation.golden_max_drop,
    }
    light = evaluation.golden_candidates <= evaluation.golden_prompts
    if not light:
        inputs |= {"reference": reference, "variant": variant}
        params |= {"candidates": evaluation.golden_candidates, "serving": serving_of(read.recipe)}
    exact = {**serving_of(read.recipe), "kv_cache": "f16"}
    return [
        Step(PACK, "slmops.build.steps.golden:select", inputs, params, light=light),
        Step(
            GOLDEN_REFERENCE,
            "slmops.build.steps.golden:score",
            {"model": reference, "pack": Output(PACK, "golden-pack.json")},
            {"serving": exact},
        ),
    ]


def _measure_steps(
    read: ReadRecipe, target: Target, variant: Output, text: Output, evaluation: Evaluation
) -> list[Step]:
    return [
        _answers_step(read, of_target("answers", target), variant, evaluation),
        Step(
            of_target("likelihood", target),
            "slmops.build.steps.divergence:compare",
            {"model": variant, "text": text, **_DISTRIBUTIONS},
            {"runtime": target.runtime},
        ),
        Step(
            of_target("golden scores", target),
            "slmops.build.steps.golden:score",
            {"model": variant, "pack": Output(PACK, "golden-pack.json")},
            {"serving": serving_of(read.recipe)},
        ),
    ]


def _cut_steps(read: ReadRecipe, made: Weights, text: Output, evaluation: Evaluation) -> list[Step]:
    """The dense model's answers, and how far the cuts alone led from it."""
    inputs: dict[str, Output | SourceFile] = {"model": made.reference, "text": text, **_DISTRIBUTIONS}
    return [
        _answers_step(read, ASKED_PARENT, made.parent, evaluation),
        Step(LIKELIHOOD_REFERENCE, "slmops.build.steps.divergence:compare", inputs, {"runtime": "llama.cpp"}),
    ]


def _sparsity_step(
    read: ReadRecipe, target: Target, variant: Output, dense: Output, evaluation: Evaluation
) -> Step:
    inputs: dict[str, Output | SourceFile] = {
        "dense": dense,
        "variant": variant,
        "imatrix": Output("imatrix", "imatrix.npz"),
        "choice": Output(_chosen_by(read.recipe, target)),
    }
    run = "slmops.build.steps.sparsify:report"
    return Step(SPARSITY, run, inputs, _speed_params(read, evaluation), exclusive=True)


def _speed_params(read: ReadRecipe, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "serving": serving_of(read.recipe),
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "repeats": evaluation.bench_repeats,
    }


def _expect_step(target: Target, targets: tuple[Target, ...]) -> Step:
    inputs: dict[str, Output | SourceFile] = {
        "pack": Output(PACK, "golden-pack.json"),
        "chosen": Output(PACK),
        "reference": Output(GOLDEN_REFERENCE),
        "own": Output(of_target("golden scores", target)),
    }
    inputs |= {f"variant-{other.profile}": Output(of_target("golden scores", other)) for other in targets}
    return Step(of_target("expectations", target), "slmops.build.steps.golden:expect", inputs, light=True)


def _speed_step(read: ReadRecipe, target: Target, variant: Output, evaluation: Evaluation) -> Step:
    return Step(
        of_target("speed", target),
        "slmops.build.steps.speed:measure",
        {"model": variant},
        _speed_params(read, evaluation),
        exclusive=True,
    )


def serving_of(recipe: Recipe) -> dict[str, Any]:
    """Serving settings as JSON, as ``core.device.fit.Serving`` takes them."""
    return recipe.serving.model_dump()


def profile_facts(profile: DeviceProfile) -> dict[str, Any]:
    """A profile as JSON, for the evidence."""
    return asdict(profile)


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
        path = folder / name
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
        path = folder / recipe.base.gguf
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

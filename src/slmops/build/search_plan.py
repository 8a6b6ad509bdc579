"""The part of the graph that decides: sensitivities, and the choice of types for each target, verified when asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from slmops.build.graph import Output, SourceFile, Step
from slmops.build.recipe_files import ReadRecipe, serving_of
from slmops.build.speeds import TABLE
from slmops.build.step_names import (
    DAMAGE_PARTS,
    KV_CACHES,
    PREDICTION_PARTS,
    PROJECTION,
    SPEEDS,
    TENSOR_PARTS,
    of_target,
)
from slmops.core.device.fit import KV_CHOICES
from slmops.core.errors import DocumentError
from slmops.protocol.documents.recipe import Recipe, Search, Target

#: texts of so many tokens are projected: a few dozen for each row, and hundreds of rows
PROJECTED_TOKENS = 4096
#: input by which the choice knows what cache types cost
KV_INPUT = "kv-caches"


def gradient_steps(read: ReadRecipe, weights: dict[str, Output | SourceFile], text: Output) -> list[Step]:
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
    if projects(search):
        rows["keep_errors"] = True
    predictions = [
        Step(f"predictions {part + 1}", "slmops.build.steps.predicted:predict", given, {**rows, "part": part})
        for part in range(PREDICTION_PARTS)
    ]
    return [gradients, *predictions, *([projection_step(inputs, params)] if projects(search) else [])]


def projection_step(inputs: Mapping[str, Output | SourceFile], params: Mapping[str, Any]) -> Step:
    """Gradients projected on the errors that the predictions kept.

    Args:
        inputs: ``model`` and ``text``.
        params: of the gradients; on fewer tokens, because this pass costs more for each.
    """
    errors = {
        f"errors-{part + 1}": Output(f"predictions {part + 1}", "errors.npz")
        for part in range(PREDICTION_PARTS)
    }
    return Step(
        PROJECTION,
        "slmops.train.gradients:project",
        {**inputs, "gradients-facts": Output("gradients"), **errors},
        {**params, "tokens": min(int(params["tokens"]), PROJECTED_TOKENS)},
    )


def predicts(search: Search) -> bool:
    """Whether losses are predicted from gradients.

    Raises:
        DocumentError: the recipe insists on it and torch is not installed.
    """
    present = importlib.util.find_spec("torch") is not None
    if search.sensitivity in ("kfac", "fisher") and not present:
        raise DocumentError(
            f"search.sensitivity: {search.sensitivity} needs torch, which is not installed",
            hint='pip install "slmops[train]", or sensitivity: auto (torch where it is installed, else measured damage)',
        )
    return present and search.sensitivity != "measured"


def projects(search: Search) -> bool:
    """Whether gradients are also projected on errors; only where they are taken at all."""
    return search.sensitivity in ("auto", "fisher") and predicts(search)


def feedback_inputs(read: ReadRecipe) -> dict[str, Output | SourceFile]:
    """What quantising with error feedback takes besides weights and importance matrix; feedback would fill up zeros."""
    inputs: dict[str, Output | SourceFile] = {}
    if read.recipe.search.feedback and not any(step.sparsify for step in read.recipe.steps):
        inputs |= {"hessians": Output("imatrix", "hessians.npz"), "inputs": Output("imatrix")}
        if "scales" in read.sources:
            inputs["scales"] = read.sources["scales"]
    return inputs


def quantise_steps(
    read: ReadRecipe, target: Target, weights: Mapping[str, Output | SourceFile], text: Output
) -> list[Step]:
    """A target's tensors, by two processes, and the file that they make."""
    room = "slmops.build.steps"
    fed = feedback_inputs(read)
    inputs = {**weights, "choice": Output(chosen_by(read.recipe, target)), **fed}
    steps: list[Step] = []
    if read.recipe.search.sequential and fed:
        given = {name: source for name, source in inputs.items() if name != "scales"} | {"text": text}
        stages = {"stages": read.recipe.search.sequential}
        again = Step(of_target("sequential", target), f"{room}.sequential:recollect", given, stages)
        inputs |= {"hessians": Output(again.name, "hessians.npz"), "inputs": Output(again.name)}
        steps.append(again)
    ahead = [
        Step(
            of_target(f"tensors {part + 1}", target),
            f"{room}.quantise:make_tensors",
            dict(inputs),
            {"part": part, "parts": TENSOR_PARTS},
        )
        for part in range(TENSOR_PARTS)
    ]
    made = {f"ahead-{part + 1}": Output(step.name) for part, step in enumerate(ahead)}
    whole = Step(of_target("quantise", target), f"{room}.quantise:write_variant", {**inputs, **made})
    return [*steps, *ahead, whole]


def possible_step(read: ReadRecipe, target: Target, reference: Output) -> Step:
    """The early no to a budget that cannot be met."""
    run = "slmops.build.steps.choose:possible"
    inputs = {"model": reference, **_budget_input(target)}
    return Step(of_target("possible", target), run, inputs, _space_params(read, target), light=True)


def choose_step(read: ReadRecipe, target: Target, reference: Output) -> Step:
    """The choice of types for a target, within its budget."""
    params = _space_params(read, target)
    inputs: dict[str, Output | SourceFile] = {"model": reference, "errors": Output("errors")}
    if read.recipe.search.speed is not None:
        params["decode_tps"] = target.budget.decode_tps
        inputs[TABLE] = read.sources["speed"] if "speed" in read.sources else Output(SPEEDS)
    if read.recipe.search.probe_tokens:
        inputs |= {f"damage-{part + 1}": Output(f"damage {part + 1}") for part in range(DAMAGE_PARTS)}
    if serves_freely(read.recipe):
        inputs[KV_INPUT] = Output(KV_CACHES)
    inputs |= _budget_input(target)
    if predicts(read.recipe.search):
        inputs |= {
            f"predictions-{part + 1}": Output(f"predictions {part + 1}") for part in range(PREDICTION_PARTS)
        }
    if projects(read.recipe.search):
        inputs[PROJECTION] = Output(PROJECTION)
        params["sensitivity"] = read.recipe.search.sensitivity
    return Step(of_target("choose", target), "slmops.build.steps.choose:choose", inputs, params, light=True)


def _space_params(read: ReadRecipe, target: Target) -> dict[str, Any]:
    free: dict[str, Any] = {}
    if serves_freely(read.recipe):
        least = read.recipe.search.least_context_tokens
        free = {"kv_caches": list(_kv_caches(read.recipe)), "least_context_tokens": least}
    return {
        "profile": target.profile,
        "types": list(read.recipe.search.types),
        "serving": serving_of(read.recipe),
        **_bytes(read, target),
        **free,
    }


def _budget_input(target: Target) -> dict[str, Output]:
    """Where the bytes come from that the recipe does not give."""
    return {"budget": Output(of_target("budget", target))} if target.budget.artifact_bytes is None else {}


def _bytes(read: ReadRecipe, target: Target) -> dict[str, int | None]:
    return {
        "artifact_bytes": target.budget.artifact_bytes,
        "ram_bytes": target.budget.ram_bytes or read.profiles[target.profile].ram_bytes,
    }


def serves_freely(recipe: Recipe) -> bool:
    """Whether the search may choose how variants are served: what the recipe says of the KV cache holds."""
    return bool(_kv_caches(recipe)) or recipe.search.least_context_tokens is not None


def _kv_caches(recipe: Recipe) -> tuple[str, ...]:
    if recipe.search.kv_caches is not None:
        return recipe.search.kv_caches
    return () if "kv_cache" in recipe.serving.model_fields_set else KV_CHOICES


def kv_step(read: ReadRecipe, targets: Sequence[Target], reference: Output, text: Output) -> Step:
    """What each type of KV cache costs, where memory is the bound of a target."""
    inputs: dict[str, Output | SourceFile] = {"model": reference, "text": text}
    inputs |= {
        f"budget-{target.profile}": Output(of_target("budget", target))
        for target in targets
        if target.budget.artifact_bytes is None
    }
    params = {
        "serving": serving_of(read.recipe),
        "kv_caches": list(_kv_caches(read.recipe) or (read.recipe.serving.kv_cache,)),
        "targets": {target.profile: _bytes(read, target) for target in targets},
    }
    return Step(KV_CACHES, "slmops.build.steps.memory:prices", inputs, params)


def serving_inputs(read: ReadRecipe, target: Target) -> dict[str, Output | SourceFile]:
    """What a step that serves a variant needs besides the recipe's settings."""
    return {"choice": Output(chosen_by(read.recipe, target))} if serves_freely(read.recipe) else {}


def verify_step(read: ReadRecipe, target: Target, choosing: Step, text: Output) -> Step:
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
        **feedback_inputs(read),
    }
    return Step(of_target("verify", target), "slmops.build.steps.repair:repair", inputs, params)


def chosen_by(recipe: Recipe, target: Target) -> str:
    """Name of the step that has the last word on a target's types."""
    return of_target("verify" if recipe.search.verify_tokens else "choose", target)

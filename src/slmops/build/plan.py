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

from dataclasses import dataclass

from slmops.build.export.formats import format_of
from slmops.build.export_plan import (
    archive_step,
    export_steps,
    exported_measure_steps,
    exported_speed_step,
    handed_over,
    source_step,
)
from slmops.build.first_steps import (
    BASE,
    base_step,
    budget_step,
)
from slmops.build.graph import Output, SourceFile, Step
from slmops.build.measure_plan import (
    answers_step,
    cut_steps,
    expect_step,
    golden_pack_steps,
    measure_steps,
    sparsity_step,
    speed_params,
    speed_step,
)
from slmops.build.recipe_files import MEASURE, ReadRecipe
from slmops.build.search_plan import (
    choose_step,
    gradient_steps,
    kv_step,
    possible_step,
    quantise_steps,
    serves_freely,
    verify_step,
)
from slmops.build.step_names import (
    ASKED_BASE,
    ASKED_PARENT,
    ASKED_REFERENCE,
    DAMAGE_PARTS,
    DISTRIBUTIONS,
    SPEEDS,
    TEXT,
    of_target,
)
from slmops.build.weight_plan import Weights, plan_weights
from slmops.core.errors import NotFoundError
from slmops.protocol.documents.recipe import Recipe, Target
from slmops.protocol.documents.recipe_gates import Evaluation


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
    exports = tuple(target for target in targets if target.is_export)
    ggufs = tuple(target for target in targets if not target.is_export)
    for target in exports:
        format_of(target.runtime, target.precision)
    steps: list[Step] = []
    base = base_step(read, steps)
    made = plan_weights(
        read.recipe, read.sources, base, steps, lambda model: _text_step(read, model, evaluation)
    )
    reference = made.reference
    calibration, held_out = Output(TEXT, "calibration.json"), Output(TEXT, "held-out.json")
    imatrix = Output("imatrix", "imatrix.npz")
    search = read.recipe.search
    unbounded = [target for target in ggufs if target.budget.artifact_bytes is None]
    steps += [budget_step(of_target("budget", t), read, t, reference) for t in unbounded]
    steps += [possible_step(read, target, reference) for target in ggufs]
    if exports:
        steps.append(source_step(reference))
        for target in exports:
            steps += export_steps(read, target, reference, held_out)
    searched = steps if ggufs else []  # what only a search needs: exports alone have none
    searched.append(
        Step("imatrix", "slmops.build.steps.calibrate:imatrix", {"model": reference, "text": calibration})
    )
    weights: dict[str, Output | SourceFile] = {"model": reference, "imatrix": imatrix}
    for part in range(DAMAGE_PARTS if search.probe_tokens else 0):
        params = {"probe_tokens": search.probe_tokens, "part": part, "parts": DAMAGE_PARTS}
        searched.append(
            Step(
                f"damage {part + 1}",
                "slmops.build.steps.sensitivity:damage",
                {**weights, "base": made.base, "text": calibration},
                params,
            )
        )
    rows = {"types": list(search.types), "sample_rows": search.sample_rows}
    searched.append(
        Step("errors", "slmops.build.steps.sensitivity:errors", {**weights, "base": made.base}, rows)
    )
    searched += gradient_steps(read, weights, calibration)
    if search.speed == MEASURE:
        types = {"types": list(search.types), "repeats": evaluation.bench_repeats}
        run = "slmops.build.steps.type_speed:measure"
        searched.append(Step(SPEEDS, run, {"model": reference}, types, exclusive=True))
    variants = {target.profile: Output(of_target("quantise", target), "model.gguf") for target in ggufs}
    if ggufs and serves_freely(read.recipe):
        steps.append(kv_step(read, ggufs, reference, calibration))
    for target in ggufs:
        choosing = choose_step(read, target, reference)
        steps.append(choosing)
        if search.verify_tokens:
            steps.append(verify_step(read, target, choosing, calibration))
    steps.append(answers_step(read, ASKED_REFERENCE, reference, evaluation))
    for target in ggufs:
        steps += quantise_steps(read, target, weights, calibration)
    steps.append(
        Step(
            DISTRIBUTIONS, "slmops.build.steps.divergence:reference", {"model": made.dense, "text": held_out}
        )
    )
    if made.is_cut:
        steps += cut_steps(read, made, held_out, evaluation)
    if evaluation.base_items:
        few = evaluation.model_copy(update={"task_items": evaluation.base_items, "constrained_items": 0})
        steps.append(answers_step(read, ASKED_BASE, base, few))
    # without a budget of its own a variant is at most what its profile's memory holds
    smallest = min(
        ggufs, key=lambda t: t.budget.artifact_bytes or read.profiles[t.profile].ram_bytes, default=None
    )
    steps += golden_pack_steps(
        read, reference, variants[smallest.profile] if smallest else reference, evaluation
    )
    for target in ggufs:
        steps += measure_steps(read, target, variants[target.profile], held_out, evaluation)
    for target in exports:
        steps += exported_measure_steps(read, target, reference, held_out, evaluation)
    steps += [expect_step(target, targets) for target in targets]
    steps += [archive_step(read, target) for target in exports if handed_over(read, target)]
    steps += [speed_step(read, target, variants[target.profile], evaluation) for target in ggufs]
    steps += [exported_speed_step(target, speed_params(read, evaluation)) for target in exports]
    if made.before_zeros is not None and ggufs:
        steps.append(sparsity_step(read, ggufs[0], variants[ggufs[0].profile], made.before_zeros, evaluation))
    paired = ASKED_PARENT if made.is_cut else ASKED_REFERENCE
    return Plan(tuple(steps), reference, base, targets, evaluation, made, paired)


def _chosen(recipe: Recipe, only: tuple[str, ...] | None) -> tuple[Target, ...]:
    if only is None:
        return recipe.targets
    known = {name for target in recipe.targets for name in (target.profile, target.key)}
    missing = [name for name in only if name not in known]
    if missing:
        raise NotFoundError(
            f"the recipe has no target {', '.join(missing)}",
            hint=f"its targets: {', '.join(t.key for t in recipe.targets)}",
        )
    return tuple(t for t in recipe.targets if t.profile in only or t.key in only)


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

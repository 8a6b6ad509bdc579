"""Running a build: recipe -> plan -> steps -> build directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from slmops.artifact.build_index import (
    Build,
    BuiltBase,
    BuiltFile,
    BuiltVariant,
    EarlyWarning,
    GateFinding,
    StepRecord,
    encode_index,
)
from slmops.artifact.digest import canonical_json, digest_of, sha256_hex
from slmops.artifact.manifest import Measured, RuntimeNeed
from slmops.build.cache import Cache, StepResult
from slmops.build.conversations import Item, read_items
from slmops.build.directory import place
from slmops.build.events import Progress
from slmops.build.first_steps import BASE
from slmops.build.graph import SourceFile, Step
from slmops.build.overlap import Overlap, check_never_seen, frozen_set
from slmops.build.plan import Plan, make_plan
from slmops.build.recipe_files import ReadRecipe, read_recipe, with_speed_table
from slmops.build.runner import run_steps
from slmops.build.shipped import MEASURING, check_shipped
from slmops.build.step_names import (
    ASKED_BASE,
    ASKED_REFERENCE,
    DISTRIBUTIONS,
    GOLDEN_REFERENCE,
    LIKELIHOOD_REFERENCE,
    PACK,
    SPARSITY,
    SPEEDS,
    of_target,
)
from slmops.build.verdicts import flips_estimate, judge, warnings_of
from slmops.core.device.fit import ModelShape, Serving, effective_bandwidth, predict_decode_tps
from slmops.core.evidence.gates import Finding, Verdict, combine
from slmops.protocol.documents.recipe import Evaluation, Target

SCHEMA = 1
UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build did.

    Attributes:
        folder: the build directory; ``build``: its index.
        changed: False when the directory already held exactly this build.
        steps_run: steps that were run; ``steps_cached``: steps whose results were known.
        seconds: wall time.
        verdict: the worst verdict of all gates: pass, fail, inconclusive or error.
    """

    folder: Path
    build: Build
    changed: bool
    steps_run: int
    steps_cached: int
    seconds: float
    verdict: str


def run_build(  # noqa: PLR0913 - each is an option of the command line
    recipe_path: Path,
    out_dir: Path,
    *,
    cache_dir: Path | None = None,
    targets: Sequence[str] | None = None,
    fast: bool = False,
    evaluation: Evaluation | None = None,
    progress: Progress = lambda event: None,
    workers: int = 2,
    speed_table: Path | None = None,
    engine: str = "local",
) -> BuildResult:
    """Build a recipe's variants, measure them, judge them, and write the build directory.

    Failing gates do not fail the build; they are in its evidence, and no release is made of it without a waiver.

    Args:
        recipe_path: YAML file with one ``kind: Recipe`` (and maybe ``kind: DeviceProfile`` documents).
        out_dir: build directory to write; replaced when it holds another build.
        cache_dir: step cache; None takes ``$SLMOPS_CACHE``, else ``.slmops-cache`` in the current folder.
        targets: profiles to build; None for all of the recipe's.
        fast: measure less (:meth:`Evaluation.fast`).
        evaluation: replaces the recipe's.
        progress: called from this thread with every event.
        workers: step processes at once; 0 runs all steps in this process.
        speed_table: how fast each type is on another machine, instead of the recipe's ``search.speed``.
        engine: ``local``, or ``ray``: steps that are neither light nor measure time run on a Ray cluster.

    Raises:
        SlmopsError: see the package's docstring; steps that ended well stay cached.
    """
    began_s = time.monotonic()
    read = read_recipe(recipe_path, cache_dir)
    if speed_table is not None:
        read = with_speed_table(read, speed_table)
    asked = evaluation or read.recipe.evaluation
    allowed = read.recipe.task.allow_overlap
    seen = check_never_seen(read.sources, allowed.reason if allowed else None)
    plan = make_plan(
        read, only=tuple(targets) if targets is not None else None, evaluation=asked.fast() if fast else asked
    )
    cache = Cache(cache_dir)
    finished = run_steps(plan.steps, cache, progress=progress, workers=workers, engine=engine)
    build, fill = _assemble(read, plan, finished.results, cache, seen=seen, fast=fast)
    changed = place(out_dir, fill, encode_index(build))
    findings = [
        Finding(f.gate, Verdict(f.verdict), f.reason, f.needed) for v in build.variants for f in v.findings
    ]
    ran = len(finished.ran)
    return BuildResult(
        out_dir,
        build,
        changed,
        ran,
        len(plan.steps) - ran,
        time.monotonic() - began_s,
        combine(findings).value,
    )


def _assemble(
    read: ReadRecipe,
    plan: Plan,
    results: Mapping[str, StepResult],
    cache: Cache,
    *,
    seen: Sequence[Overlap],
    fast: bool,
) -> tuple[Build, dict[str, Path | bytes]]:
    """The index, and what each file of the directory is filled with."""
    recipe, facts = read.recipe, results[BASE].value
    fill: dict[str, Path | bytes] = {}

    def kept(path: str, step: str, file: str) -> BuiltFile:
        stored = results[step].files[file]
        fill[path] = cache.path(stored.sha256)
        return BuiltFile(path, stored.bytes, stored.sha256)

    def made(path: str, content: bytes) -> BuiltFile:
        fill[path] = content
        return BuiltFile(path, len(content), sha256_hex(content))

    variants = []
    items = {item.id: item for item in read_items(read.sources["eval"].path)}
    for target in plan.targets:
        folder = f"variants/{target.profile}"
        check_shipped(
            results[of_target("quantise", target)].files["model.gguf"].sha256,
            {kind: results[of_target(kind, target)].value for kind in MEASURING},
            target.profile,
        )
        figures = _figures(read, target, results, items)
        answers = results[of_target("answers", target)].value
        findings = judge(recipe.gates, target, figures, answers, results[plan.paired].value, items)
        quantised = results[of_target("quantise", target)].value
        variants.append(
            BuiltVariant(
                profile=target.profile,
                runtime=RuntimeNeed(**results[of_target("speed", target)].value["runtime"]),
                also_for=target.also_for,
                model=kept(f"{folder}/model.gguf", of_target("quantise", target), "model.gguf"),
                chunk_map=kept(f"{folder}/chunk-map.json", of_target("quantise", target), "chunk-map.json"),
                golden_expectations=kept(
                    f"{folder}/golden-expectations.json",
                    of_target("expectations", target),
                    "golden-expectations.json",
                ),
                shape=quantised["shape"],
                serving=results[of_target("choose", target)].value["serving"],
                measured=msgspec.convert(
                    {name: figures.get(name) for name in Measured.__struct_fields__}, Measured
                ),
                quantised=quantised["quantised"],
                predicted_decode_tps=figures["predicted_decode_tps"],
                findings=tuple(GateFinding(f.gate, f.verdict.value, f.reason, f.needed) for f in findings),
                warnings=tuple(
                    EarlyWarning(**warning) for warning in warnings_of(figures, plan.evaluation.warnings)
                ),
            )
        )
    reference_sha256 = results[plan.reference.step].files[plan.reference.file].sha256
    base_sha256 = (
        plan.base.sha256
        if isinstance(plan.base, SourceFile)
        else results[plan.base.step].files[plan.base.file].sha256
    )
    licence = recipe.base.licence or facts["licence"] or UNKNOWN_LICENCE
    scores = {"reference": task_figures(results[ASKED_REFERENCE].value)}
    if plan.paired != ASKED_REFERENCE:
        scores["dense"] = task_figures(results[plan.paired].value)
    if ASKED_BASE in results:
        scores["base"] = task_figures(results[ASKED_BASE].value)
    prompts = {}
    prompt = read.sources.get("system_prompt")
    if prompt is not None:  # no blank at its end: the template sets the prompt apart by itself
        prompts["default"] = made("prompts/default", prompt.path.read_text(encoding="utf-8").strip().encode())
    base = BuiltBase(facts["name"], base_sha256, licence)
    frozen = frozen_set(
        read.sources["eval"].path, plan.evaluation.seed, results[ASKED_REFERENCE].value["free"]["items"]
    )
    evidence = _evidence(read, plan, results, variants, scores, fast=fast)
    evidence["evaluation_set"] = frozen
    evidence["seen_before"] = {
        "reason": recipe.task.allow_overlap.reason if recipe.task.allow_overlap else None,
        "overlaps": [asdict(overlap) for overlap in seen],
    }
    build = Build(
        schema=SCHEMA,
        model=recipe.metadata.name,
        recipe_sha256=read.sha256,
        licence=licence,
        base=base,
        reference_sha256=reference_sha256,
        fast=fast,
        scores=scores,
        variants=tuple(variants),
        golden_pack=kept("golden/golden-pack.json", PACK, "golden-pack.json"),
        evidence=made("evidence.json", canonical_json(evidence)),
        provenance=made(
            "provenance.json", canonical_json(_provenance(read, plan, results, base, reference_sha256))
        ),
        prompts=prompts,
        weight_steps=weight_figures(plan, results),
        steps=tuple(
            StepRecord(step.name, results[step.name].key, results[step.name].seconds) for step in plan.steps
        ),
        evaluation_set={
            "sha256": frozen["sha256"],
            "items_sha256": frozen["items_sha256"],
            "text_sha256": results[DISTRIBUTIONS].value["text_sha256"],
        },
    )
    return build, fill


def weight_figures(plan: Plan, results: Mapping[str, StepResult]) -> dict[str, dict[str, Any]]:
    """What each step that cuts or trains says of itself, what all of them cost together, and what zeros are worth."""
    names = [*plan.weights.steps, *(name for name in (LIKELIHOOD_REFERENCE, SPARSITY) if name in results)]
    return {name: dict(results[name].value) for name in names}


def compared_with(plan: Plan) -> str:
    """In plain words, what divergences are taken from."""
    if not plan.weights.is_cut:
        return "the unquantised model"
    kept = plan.weights.kept_tokens
    return "the model before it was cut" + (
        "" if kept is None else f", over the {kept} tokens that were kept (its probabilities renormalised)"
    )


def task_figures(answers: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of a model's answers: exact and valid, free and held to the schema; None where nothing was asked."""
    free, held = answers["free"], answers["constrained"]
    return {
        "items": len(free["items"]),
        "exact_match_ratio": _rate(free["exact"]),
        "schema_valid_ratio": _rate(free["valid"]),
        "constrained_items": len(held["items"]),
        "exact_match_constrained_ratio": _rate(held["exact"]),
        "schema_valid_constrained_ratio": _rate(held["valid"]),
    }


def _rate(outcomes: Sequence[bool]) -> float | None:
    return sum(outcomes) / len(outcomes) if outcomes else None


def _figures(
    read: ReadRecipe, target: Target, results: Mapping[str, StepResult], items: Mapping[str, Item]
) -> dict[str, Any]:
    """Everything that was measured or predicted of one variant, by name."""
    quantised = results[of_target("quantise", target)].value
    speed = results[of_target("speed", target)].value
    profile = read.profiles[target.profile]
    serving = Serving(**results[of_target("choose", target)].value["serving"])
    predicted = predict_decode_tps(
        ModelShape(**quantised["shape"]), serving, effective_bandwidth(None, profile)
    )
    likelihood = results[of_target("likelihood", target)].value
    answers = results[of_target("answers", target)].value
    flips = flips_estimate(answers, results[ASKED_REFERENCE].value, items)
    estimates = likelihood["estimates"] | ({"flips_ratio": flips.document()} if flips else {})
    return {
        **likelihood,
        "estimates": estimates,
        "flips_ratio": flips.value if flips else None,
        **task_figures(answers),
        **{
            name: speed[name]
            for name in (
                "load_s",
                "prefill_tps",
                "decode_tps",
                "rss_bytes",
                "private_bytes",
                "busy_ratio",
                "predicted_rss_bytes",
            )
        },
        "bits_per_weight": quantised["bits_per_weight"],
        "predicted_decode_tps": round(predicted, 2),
    }


def _evidence(
    read: ReadRecipe,
    plan: Plan,
    results: Mapping[str, StepResult],
    variants: Sequence[BuiltVariant],
    scores: Mapping[str, Any],
    *,
    fast: bool,
) -> dict[str, Any]:
    rows = []
    items = {item.id: item for item in read_items(read.sources["eval"].path)}
    for target, variant in zip(plan.targets, variants, strict=True):
        choice = results[of_target("choose", target)].value
        rows.append(
            {
                "profile": target.profile,
                "sha256": variant.model.sha256,
                "artifact_bytes": variant.model.bytes,
                "budget": {
                    "artifact_bytes": target.budget.artifact_bytes,
                    "allowed_bytes": choice["budget_bytes"],
                    "bound": choice["bound"],
                    "smallest_bytes": choice["smallest_bytes"],
                    "derived": results[budget].value
                    if (budget := of_target("budget", target)) in results
                    else None,
                },
                "figures": _figures(read, target, results, items),
                "expected_kld": choice["expected_kld"],
                "verified": _verified(results, target),
                "speed": choice["speed"],
                "memory": choice["memory"],
                "serving": choice["serving"],
                "kv_cache_kld": choice["kv_cache_kld"],
                "ways": results[of_target("quantise", target)].value["ways"],
                "quantised": variant.quantised,
                "fallbacks": results[of_target("quantise", target)].value["fallbacks"],
                "golden": results[of_target("expectations", target)].value,
                "gates": msgspec.to_builtins(variant.findings),
                "warnings": msgspec.to_builtins(variant.warnings),
                "measured_on": "the build machine, one thread",
                "predicted": ["predicted_decode_tps"],
            }
        )
    return {
        "schema": SCHEMA,
        "model": read.recipe.metadata.name,
        "recipe_sha256": read.sha256,
        "fast": fast,
        "evaluation": plan.evaluation.model_dump(),
        "text": results["render text"].value,
        "split": read.split,
        "chat_template": results[BASE].value["chat_template"],
        "reference": {**scores["reference"], **results[DISTRIBUTIONS].value},
        "compared_with": compared_with(plan),
        "dense": scores.get("dense"),
        "weight_steps": weight_figures(plan, results),
        "base": scores.get("base"),
        "golden": {**results[PACK].value, "reference": results[GOLDEN_REFERENCE].value["scores"]},
        "damage": results[of_target("choose", plan.targets[0])].value["damage"],
        "sensitivity": results[of_target("choose", plan.targets[0])].value["sensitivity"],
        "speed_table": results[SPEEDS].value if SPEEDS in results else None,
        "variants": rows,
    }


def _verified(results: Mapping[str, StepResult], target: Target) -> dict[str, Any] | None:
    """What the best choices really cost, when they were measured before one was taken."""
    step = results.get(of_target("verify", target))
    verified: dict[str, Any] | None = step.value["verified"] if step is not None else None
    return verified


def _provenance(
    read: ReadRecipe, plan: Plan, results: Mapping[str, StepResult], base: BuiltBase, reference_sha256: str
) -> dict[str, Any]:
    """Base -> steps -> files. Deterministic: no times, no paths of this machine; measured figures only by their digest's name."""

    def record(step: Step) -> dict[str, Any]:
        result = results[step.name]
        measured = (step.exclusive and step.name != SPEEDS) or step.name.startswith("expectations")
        outputs = {name: file.sha256 for name, file in sorted(result.files.items())}
        return {
            "name": step.name,
            "run": result.run,
            "params": result.params,
            "inputs": dict(sorted(result.inputs.items())),
            "outputs": outputs,
            "value_sha256": None if measured else digest_of(result.value),
        }

    return {
        "schema": SCHEMA,
        "model": read.recipe.metadata.name,
        "recipe_sha256": read.sha256,
        "base": {**msgspec.to_builtins(base), "source": read.recipe.base.model_dump(exclude_none=True)},
        "sources": {role: source.sha256 for role, source in sorted(read.sources.items())},
        "reference_sha256": reference_sha256,
        "steps": [record(step) for step in plan.steps],
        "tools": results[BASE].tools,
    }

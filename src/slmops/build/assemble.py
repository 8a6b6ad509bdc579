"""From the results of all steps to the build directory: its index, and what each of its files is filled with.

Everything is taken from results by name; nothing is measured here. What the build says of itself is made by
:mod:`slmops.build.evidence`; see :mod:`slmops.build.run` for how results come about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from slmops.artifact.build_index import (
    Build,
    BuiltBase,
    BuiltFile,
    BuiltPart,
    BuiltVariant,
    EarlyWarning,
    GateFinding,
    StepRecord,
)
from slmops.artifact.digest import canonical_json, sha256_hex
from slmops.artifact.manifest import Measured, RuntimeNeed
from slmops.build.cache import Cache, StepResult
from slmops.build.conversations import read_items
from slmops.build.evidence import (
    evidence_document,
    figures_of,
    made_of,
    provenance_document,
    serving_with,
    task_figures,
    weight_figures,
)
from slmops.build.export.exported import LOG, ROLE
from slmops.build.export.formats import format_of
from slmops.build.export_plan import handed_over
from slmops.build.first_steps import BASE
from slmops.build.graph import SourceFile
from slmops.build.overlap import Overlap, frozen_set
from slmops.build.plan import Plan
from slmops.build.recipe_files import ReadRecipe
from slmops.build.shipped import MEASURING, check_shipped
from slmops.build.step_names import (
    ASKED_BASE,
    ASKED_REFERENCE,
    DISTRIBUTIONS,
    PACK,
    of_target,
)
from slmops.build.steps.archive import ARCHIVE
from slmops.build.steps.export import CHUNK_MAP
from slmops.build.verdicts import judge, warnings_of
from slmops.protocol.documents.recipe import Target

SCHEMA = 1
UNKNOWN_LICENCE = "unknown"


def assemble(
    read: ReadRecipe,
    plan: Plan,
    results: Mapping[str, StepResult],
    cache: Cache,
    *,
    seen: Sequence[Overlap],
    fast: bool,
) -> tuple[Build, dict[str, Path | bytes]]:
    """The index, and what each file of the directory is filled with.

    Args:
        read: the recipe.
        plan: its graph.
        results: of every step, by name.
        cache: where the steps' files lie.
        seen: evaluation lines that training or calibration saw, and that the recipe allows.
        fast: the evaluation was cut down.

    Raises:
        DigestError: something was measured of another file than the one that ships.
    """
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
        folder = f"variants/{target.key}"
        made_by = results[made_of(target)].value
        shipped = (
            made_by["sha256"]
            if target.is_export
            else results[of_target("quantise", target)].files["model.gguf"].sha256
        )
        check_shipped(
            shipped, {kind: results[of_target(kind, target)].value for kind in MEASURING}, target.key
        )
        figures = figures_of(read, target, results, items)
        answers = results[of_target("answers", target)].value
        findings = judge(recipe.gates, target, figures, answers, results[plan.paired].value, items)
        files = (
            _exported(target, made_by, folder, kept) if target.is_export else _quantised(target, folder, kept)
        )
        variants.append(
            BuiltVariant(
                profile=target.profile,
                runtime=RuntimeNeed(**results[of_target("speed", target)].value["runtime"]),
                also_for=target.also_for,
                golden_expectations=kept(
                    f"{folder}/golden-expectations.json",
                    of_target("expectations", target),
                    "golden-expectations.json",
                ),
                shape=made_by["shape"],
                serving=serving_with(read, target, results),
                measured=msgspec.convert(
                    {name: figures.get(name) for name in Measured.__struct_fields__}, Measured
                ),
                quantised=made_by.get("quantised", {}),
                predicted_decode_tps=figures["predicted_decode_tps"],
                findings=tuple(GateFinding(f.gate, f.verdict.value, f.reason, f.needed) for f in findings),
                warnings=tuple(
                    EarlyWarning(**warning) for warning in warnings_of(figures, plan.evaluation.warnings)
                ),
                **files,
            )
        )
        if handed_over(read, target):
            kept(f"archives/{target.key}.tar", of_target("archive", target), ARCHIVE)
        if target.is_export:
            for kind in ("export", "parity"):
                name = of_target(kind, target)
                if LOG in results[name].files:
                    fill[f"logs/{target.key}-{kind}.log"] = cache.path(results[name].files[LOG].sha256)
    reference_sha256 = results[plan.reference.step].files[plan.reference.file].sha256
    base_sha256 = (
        plan.base.sha256
        if isinstance(plan.base, SourceFile)
        else results[plan.base.step].files[plan.base.file].sha256
    )
    licence = recipe.base.licence or facts["licence"] or UNKNOWN_LICENCE
    scores = {"reference": task_figures(read, results[ASKED_REFERENCE].value)}
    if plan.paired != ASKED_REFERENCE:
        scores["dense"] = task_figures(read, results[plan.paired].value)
    if ASKED_BASE in results:
        scores["base"] = task_figures(read, results[ASKED_BASE].value)
    prompts = {}
    prompt = read.sources.get("system_prompt")
    if prompt is not None:  # no blank at its end: the template sets the prompt apart by itself
        prompts["default"] = made("prompts/default", prompt.path.read_text(encoding="utf-8").strip().encode())
    base = BuiltBase(facts["name"], base_sha256, licence)
    frozen = frozen_set(
        read.sources["eval"].path, plan.evaluation.seed, results[ASKED_REFERENCE].value["free"]["items"]
    )
    evidence = evidence_document(read, plan, results, variants, scores, fast=fast)
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
            "provenance.json",
            canonical_json(provenance_document(read, plan, results, base, reference_sha256)),
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


def _quantised(target: Target, folder: str, kept: Callable[[str, str, str], BuiltFile]) -> dict[str, Any]:
    """A GGUF's place in the index."""
    step = of_target("quantise", target)
    return {
        "model": kept(f"{folder}/model.gguf", step, "model.gguf"),
        "chunk_map": kept(f"{folder}/chunk-map.json", step, "chunk-map.json"),
    }


def _exported(
    target: Target, made_by: Mapping[str, Any], folder: str, kept: Callable[[str, str, str], BuiltFile]
) -> dict[str, Any]:
    """The place of an export's files in the index: the one that the engine opens, and its parts."""
    step = of_target("export", target)
    opened = format_of(target.runtime, target.precision).model

    def both(name: str) -> tuple[BuiltFile, BuiltFile]:
        return (
            kept(f"{folder}/files/{name}", step, f"{ROLE}{name}"),
            kept(f"{folder}/chunk-maps/{name}.json", step, f"{CHUNK_MAP}{name}.json"),
        )

    model, chunk_map = both(opened)
    parts = tuple(
        BuiltPart(name, file["format"], *both(name))
        for name, file in sorted(made_by["files"].items())
        if name != opened
    )
    return {
        "model": model,
        "chunk_map": chunk_map,
        "format": made_by["files"][opened]["format"],
        "path": opened,
        "parts": parts,
    }

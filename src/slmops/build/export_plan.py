"""The part of the graph that exports: the reference for exporters, each export, its parity gate, and what is measured of it.

    reference ─ export source ─ export T ─ parity T ─┬─ likelihood T
                                                     ├─ answers T
                                                     ├─ golden scores T
                                                     └─ speed T (alone)

Whatever measures an export names the parity step among its inputs, so nothing of a failing one is measured.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from slmops.artifact.digest import digest_of
from slmops.build.export.exported import ROLE
from slmops.build.export.formats import Format, format_of, refuse_options
from slmops.build.export.tool_process import digest_of_tool
from slmops.build.export.toolchain import toolchain
from slmops.build.graph import Output, SourceFile, Step
from slmops.build.recipe_files import ReadRecipe, serving_of
from slmops.build.step_names import DISTRIBUTIONS, EXPORT_SOURCE, PACK, TEXT, of_target
from slmops.core.errors import SlmopsError
from slmops.protocol.documents.recipe import Target
from slmops.protocol.documents.recipe_gates import Evaluation
from slmops.runtimes.registry import BUILT_IN, load

Source = Output | SourceFile
PORT, TOOLCHAIN = "port", "toolchain"
SOURCE_FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_RUN = "slmops.build.steps.measure_exported"


def source_step(reference: Output) -> Step:
    """The reference as a Hugging Face directory."""
    return Step(EXPORT_SOURCE, "slmops.build.steps.export:source", {"model": reference})


def export_steps(read: ReadRecipe, target: Target, reference: Output, held_out: Output) -> list[Step]:
    """An export and its parity gate.

    Raises:
        DocumentError: no such format, or options that are known to give bad files.
    """
    form = format_of(target.runtime, target.precision)
    refuse_options(form.runtime, target.options)
    environment = toolchain(form.toolchain).digest
    inputs: dict[str, Source] = {name: Output(EXPORT_SOURCE, name) for name in SOURCE_FILES}
    inputs["source"] = Output(EXPORT_SOURCE)
    if form.calibrated:
        inputs["calibration"] = Output(TEXT, "calibration.json")
    params = _format_params(form, environment) | {
        "context_tokens": read.recipe.serving.context_tokens,
        "artifact_bytes": target.budget.artifact_bytes,
        "options": dict(target.options),
    }
    gate: dict[str, Source] = {"model": reference, "text": held_out, "eval": read.sources["eval"]}
    return [
        Step(of_target("export", target), "slmops.build.steps.export:export", inputs, params),
        Step(
            of_target("parity", target),
            "slmops.build.steps.parity:gate",
            gate | variant_files(target),
            _format_params(form, environment) | {"thresholds": asdict(form.thresholds)},
        ),
    ]


def exported_measure_steps(
    read: ReadRecipe, target: Target, reference: Output, held_out: Output, evaluation: Evaluation
) -> list[Step]:
    """What an exported variant answers, how far it is from the reference, and its golden scores."""
    base: dict[str, Source] = {
        **variant_files(target),
        "source": reference,
        "parity": Output(of_target("parity", target)),
    }
    params = measured_params(target)
    asked: dict[str, Source] = {**base, "text": Output(TEXT), "eval": read.sources["eval"]}
    if "schema" in read.sources:
        asked["schema"] = read.sources["schema"]
    questions = {
        "task_items": evaluation.task_items,
        "constrained_items": evaluation.constrained_items,
        "seed": evaluation.seed,
    }
    compared: dict[str, Source] = {
        **base,
        "text": held_out,
        "ids": Output(DISTRIBUTIONS, "ids.npy"),
        "logprobs": Output(DISTRIBUTIONS, "logprobs.npy"),
        "mass": Output(DISTRIBUTIONS, "tail-mass.npy"),
    }
    serving = {"serving": serving_of(read.recipe)}
    return [
        Step(of_target("answers", target), f"{_RUN}:answers", asked, params | questions),
        Step(of_target("likelihood", target), f"{_RUN}:likelihood", compared, params),
        Step(
            of_target("golden scores", target),
            f"{_RUN}:golden_scores",
            {**base, "pack": Output(PACK, "golden-pack.json")},
            params | serving,
        ),
    ]


def exported_speed_step(target: Target, speed_params: dict[str, Any]) -> Step:
    """Speed and memory of an exported variant on this machine, alone."""
    inputs: dict[str, Source] = {
        **variant_files(target),
        "export": Output(of_target("export", target)),
        "parity": Output(of_target("parity", target)),
    }
    return Step(
        of_target("speed", target),
        f"{_RUN}:speed",
        inputs,
        measured_params(target) | speed_params,
        exclusive=True,
    )


def archive_step(read: ReadRecipe, target: Target) -> Step:
    """One archive for a profile without an agent."""
    form = format_of(target.runtime, target.precision)
    inputs: dict[str, Source] = {
        **variant_files(target),
        "export": Output(of_target("export", target)),
        "parity": Output(of_target("parity", target)),
        "pack": Output(PACK, "golden-pack.json"),
        "expectations": Output(of_target("expectations", target), "golden-expectations.json"),
    }
    params = {"runtime": form.runtime, "precision": form.precision, **_made_by(form)}
    params |= {"name": read.recipe.metadata.name, "profile": target.profile}
    return Step(of_target("archive", target), "slmops.build.steps.archive:archive", inputs, params)


def handed_over(read: ReadRecipe, target: Target) -> bool:
    """Whether a target is exported for an application and not for an agent."""
    if not target.is_export:
        return False
    return not (read.profiles[target.profile].agent and format_of(target.runtime, target.precision).served)


def variant_files(target: Target) -> dict[str, Source]:
    """The files of an export, under their role; which ones there are is known when it has been made."""
    return {ROLE: Output(of_target("export", target), f"{ROLE}*")}


def measured_params(target: Target) -> dict[str, Any]:
    """What says how an export is opened."""
    form = format_of(target.runtime, target.precision)
    through = PORT if can_serve(target.runtime) else TOOLCHAIN
    return _format_params(form, toolchain(form.toolchain).digest) | {"through": through}


def can_serve(runtime: str) -> bool:
    """Whether this runtime's adapter and binding are installed here."""
    if runtime not in BUILT_IN:
        return False
    try:
        load(runtime)
    except SlmopsError:
        return False
    return True


def _format_params(form: Format, environment: str) -> dict[str, Any]:
    """What a step that runs a toolchain depends on: the environment, the script, and the format but what judges it."""
    return {"runtime": form.runtime, "precision": form.precision, "toolchain": environment} | _made_by(form)


def _made_by(form: Format) -> dict[str, str]:
    said = asdict(form)
    del said["thresholds"]
    return {"tool": digest_of_tool(form.tool), "format": digest_of(said)}

"""The build directory: what a build gives, in files that a release is made of.

    build.json                          the index (:mod:`slmops.artifact.build_index`): names everything else by size and digest
    evidence.json                       what was measured and what the gates said
    provenance.json                     base -> steps -> files: digests, parameters, tool versions
    golden/golden-pack.json             prompts of the golden pack
    prompts/default                     the system prompt, when the recipe has one
    variants/<profile>/model.gguf       the file that ships
    variants/<profile>/chunk-map.json   how it is cut
    variants/<profile>/golden-expectations.json
    variants/<profile>@<runtime>/       an export: files/, chunk-maps/, golden-expectations.json
    archives/<profile>@<runtime>.tar    an export for a profile without an agent, with golden pack and how-to
    logs/                               what exporters and engines wrote

A directory is swapped in whole when it is complete. Model files are second names of cached files: read-only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from slmops.artifact.build_index import INDEX, Build, BuiltVariant, GateFinding, decode_index
from slmops.build.files import link_or_copy, naming_full_disks, sync_folder, write_whole
from slmops.core.errors import BuildError, ConflictError, UsageError


def load_build(folder: Path) -> Build:
    """Read a build directory's index and check that its files are there in their sizes.

    Raises:
        UsageError: no build directory, of another version, or incomplete.
    """
    path = folder / INDEX
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} is no build directory: it has no {INDEX}",
            hint="make one: slmops build run RECIPE --out DIR",
        ) from error
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error}", hint="build again; the steps are cached"
        ) from error
    build = decode_index(content, str(path))
    for file in build.files():
        found = folder / file.path
        if not found.is_file() or found.stat().st_size != file.bytes:
            raise UsageError(
                f"{found} is missing or not {file.bytes} bytes long", hint="build again; the steps are cached"
            )
    return build


def place(folder: Path, fill: Mapping[str, Path | bytes], index: bytes) -> bool:
    """Make a build directory, whole or not at all; False when it already holds exactly this build.

    Args:
        folder: where; a build directory that is there is replaced, anything else is left alone.
        fill: relative path to a cached file or to bytes.
        index: bytes of ``build.json``.

    Raises:
        ConflictError: the folder exists and is no build directory.
        NoSpaceError: the disk is full; the folder is as it was.
    """
    if folder.exists() and not (folder / INDEX).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(
            f"{folder} exists and is no build directory", hint="choose another --out, or remove it"
        )
    if (folder / INDEX).is_file() and (folder / INDEX).read_bytes() == index and _is_whole(folder):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with naming_full_disks(folder):
            for relative, source in sorted(fill.items()):
                target = staging / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(source, bytes):
                    write_whole(target, source)
                else:
                    link_or_copy(source, target)
            write_whole(staging / INDEX, index)
        staging.chmod(0o755)
        _swap(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(UsageError):
        load_build(folder)
        return True
    return False


def _swap(staging: Path, folder: Path) -> None:
    if folder.exists():
        old = staging.with_name(staging.name + ".old")
        os.replace(folder, old)
        try:
            os.replace(staging, folder)
        except OSError as error:
            os.replace(old, folder)
            raise BuildError(
                f"{folder} could not be replaced: {error.strerror}", hint="is something else writing there?"
            ) from error
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(staging, folder)
    sync_folder(folder.parent)


def describe(build: Build) -> dict[str, Any]:
    """A build as plain JSON values, for ``build show``."""
    return {
        "model": build.model,
        "licence": build.licence,
        "base": msgspec.to_builtins(build.base),
        "reference_sha256": build.reference_sha256,
        "fast": build.fast,
        "scores": build.scores,
        "weight_steps": {
            s.name: build.weight_steps[s.name] for s in build.steps if s.name in build.weight_steps
        },
        "variants": [
            {
                "profile": v.profile,
                "also_for": list(v.also_for),
                "runtime": msgspec.to_builtins(v.runtime),
                "artifact_bytes": v.artifact_bytes,
                "sha256": v.model.sha256,
                "measured": {name: getattr(v.measured, name) for name in v.measured.__struct_fields__},
                "quantised": v.quantised,
                "serving": v.serving,
                "predicted_decode_tps": v.predicted_decode_tps,
            }
            for v in build.variants
        ],
        "gates": [
            {"profile": v.profile, "runtime": v.runtime.name, **msgspec.to_builtins(finding)}
            for v in build.variants
            for finding in v.findings
        ],
        "warnings": [
            {"profile": v.profile, "runtime": v.runtime.name, **msgspec.to_builtins(warning)}
            for v in build.variants
            for warning in v.warnings
        ],
        "evaluation_set": build.evaluation_set,
        "golden_prompts": build.golden_pack.sha256,
        "steps": msgspec.to_builtins(build.steps),
    }


def diff(old: Build, new: Build) -> dict[str, Any]:
    """What differs between two builds, as plain JSON values; what is equal is left out.

    Numbers are given as ``{"old", "new", "change"}``; a variant that only one of them has as ``added`` or ``removed``. Figures
    of different evaluation sets are not compared: ``not_comparable`` says why, and scores, likelihoods and gates are left out.
    """
    result: dict[str, Any] = {}
    comparable = old.evaluation_set == new.evaluation_set
    if not comparable:
        differing = sorted(
            name
            for name in {*old.evaluation_set, *new.evaluation_set}
            if old.evaluation_set.get(name) != new.evaluation_set.get(name)
        )
        result["not_comparable"] = (
            f"the builds were measured on different evaluation sets ({', '.join(differing)}): their scores, likelihoods and "
            "gates say nothing about each other; build the old recipe again on the new set"
        )
    for name in ("model", "recipe_sha256", "licence", "reference_sha256", "fast"):
        _note(result, name, getattr(old, name), getattr(new, name))
    _note(result, "base", msgspec.to_builtins(old.base), msgspec.to_builtins(new.base))
    for name in ("golden_pack", "provenance"):
        _note(result, name, getattr(old, name).sha256, getattr(new, name).sha256)
    for group in sorted({*old.scores, *new.scores}) if comparable else ():
        before, after = old.scores.get(group, {}), new.scores.get(group, {})
        for metric in sorted({*before, *after}):
            _note(result, f"scores.{group}.{metric}", before.get(metric), after.get(metric))
    for step in sorted({*old.weight_steps, *new.weight_steps}):
        before, after = old.weight_steps.get(step, {}), new.weight_steps.get(step, {})
        for name in sorted({*before, *after}):
            _note(result, f"weight_steps.{step}.{name}", before.get(name), after.get(name))
    olds, news = {v.profile: v for v in old.variants}, {v.profile: v for v in new.variants}
    variants: dict[str, Any] = {}
    for profile in sorted({*olds, *news}):
        if profile not in olds or profile not in news:
            variants[profile] = "added" if profile in news else "removed"
        elif changed := _variant_diff(olds[profile], news[profile], comparable):
            variants[profile] = changed
    if variants:
        result["variants"] = variants
    return result


#: figures that the evaluation set decides
_OF_THE_SET = (
    "kld_mean",
    "same_top_ratio",
    "perplexity",
    "exact_match_ratio",
    "schema_valid_ratio",
    "schema_valid_constrained_ratio",
)


def _variant_diff(old: BuiltVariant, new: BuiltVariant, comparable: bool) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    _note(changed, "sha256", old.model.sha256, new.model.sha256)
    _note(changed, "artifact_bytes", old.artifact_bytes, new.artifact_bytes)
    for name in old.measured.__struct_fields__:
        if comparable or name not in _OF_THE_SET:
            _note(changed, name, getattr(old.measured, name), getattr(new.measured, name))
    for name in sorted({*old.quantised, *new.quantised}):
        _note(changed, f"tensors in {name}", old.quantised.get(name, 0), new.quantised.get(name, 0))
    verdicts_old, verdicts_new = _verdicts(old.findings), _verdicts(new.findings)
    for gate in sorted({*verdicts_old, *verdicts_new}) if comparable else ():
        _note(changed, f"gate {gate}", verdicts_old.get(gate), verdicts_new.get(gate))
    return changed


def _verdicts(findings: Sequence[GateFinding]) -> dict[str, str]:
    return {finding.gate: finding.verdict for finding in findings}


def _note(into: dict[str, Any], name: str, old: Any, new: Any) -> None:
    if old == new:
        return
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (old, new))
    into[name] = {"old": old, "new": new} | ({"change": round(new - old, 6)} if numbers else {})

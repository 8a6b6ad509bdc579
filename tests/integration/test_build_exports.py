"""Exports through a whole build: with onnxruntime-genai's toolchain where it is made, and with a toolchain that is none, always.

The first needs the real environment (``slmops doctor`` shows whether it is made): it is found in ``SLMOPS_CACHE``, and made
there by ``make test-runtimes``; elsewhere the test is skipped and says so.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_project import make_tiny_project

from slmops.build import load_build, run_build
from slmops.build.cache import FOLDER_VARIABLE
from slmops.build.export.toolchain import ensure, toolchain
from slmops.build.plan import make_plan
from slmops.build.recipe_files import read_recipe
from slmops.core.errors import DocumentError

GENAI = {"profile": "n100-16gb", "runtime": "onnxruntime-genai"}
#: read before a test's clean environment hides them
_REAL = Path(os.environ.get(FOLDER_VARIABLE, ".slmops-cache")).absolute()
_MAKE = bool(os.environ.get("SLMOPS_MAKE_TOOLCHAINS"))
GGUF = {"profile": "pi5-8gb", "budget": {"artifact_bytes": "170kB"}}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of the test's own, with the toolchains of the real one."""
    wanted = toolchain("onnxruntime-genai")
    if not wanted.is_made(_REAL) and not _MAKE:
        pytest.skip(f"toolchain onnxruntime-genai is not made in {_REAL}: make test-runtimes makes it")
    ensure(wanted, _REAL)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "toolchains").symlink_to(_REAL / "toolchains")
    return tmp_path / "cache"


def plan_of(recipe: Path) -> Any:
    read = read_recipe(recipe)
    return make_plan(read, only=None, evaluation=read.recipe.evaluation)


def test_a_plan_puts_the_gate_before_every_measurement(tmp_path: Path) -> None:
    """Whatever measures an export waits for its parity step; a recipe of exports alone searches nothing."""
    recipe = make_tiny_project(tmp_path / "project", targets=[GENAI])
    steps = {step.name: step for step in plan_of(recipe).steps}
    assert "imatrix" not in steps and "errors" not in steps
    for kind in ("answers", "likelihood", "golden scores", "speed"):
        inputs = steps[f"{kind}: n100-16gb@onnxruntime-genai"].inputs.values()
        assert "parity: n100-16gb@onnxruntime-genai" in {getattr(one, "step", "") for one in inputs}


def test_a_profile_without_an_agent_gets_an_archive(tmp_path: Path) -> None:
    recipe = make_tiny_project(
        tmp_path / "project", targets=[GENAI, {"profile": "android-mid", "runtime": "litert-lm"}]
    )
    archives = [step.name for step in plan_of(recipe).steps if step.name.startswith("archive")]
    assert archives == ["archive: android-mid@litert-lm"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({**GENAI, "precision": "fp16"}, "crashes when it generates"),
        ({"profile": "android-mid", "runtime": "pytorch-mobile", "precision": "int8"}, "answers badly"),
        ({**GENAI, "options": {"exclude_embeds": "true"}}, "exclude_embeds"),
        ({**GGUF, "precision": "int4"}, "precision and options are for exports"),
        ({"profile": "n100-16gb", "runtime": "openvino"}, "openvino is not built here"),
    ],
)
def test_what_is_known_to_be_bad_is_refused_before_any_work(
    tmp_path: Path, target: dict[str, Any], message: str
) -> None:
    recipe = make_tiny_project(tmp_path / "project", targets=[target])
    with pytest.raises(DocumentError, match=message):
        plan_of(recipe)


@pytest.mark.slow
def test_an_export_becomes_a_variant_with_its_proof(tmp_path: Path, cache: Path) -> None:
    """Recipe to build directory: files by their own names, parity in the evidence, and a second build changes nothing."""
    recipe = make_tiny_project(
        tmp_path / "project",
        targets=[
            GGUF,
            {**GENAI, "precision": "fp32"},
            {"profile": "android-mid", "runtime": "onnxruntime-genai", "precision": "int8"},
        ],
    )
    result = run_build(recipe, tmp_path / "out", cache_dir=cache, workers=2)
    build = load_build(tmp_path / "out")
    gguf, exported, handed_over = build.variants
    assert gguf.format == "gguf" and gguf.parts == ()
    assert (exported.format, exported.path) == ("json", "genai_config.json")
    assert {
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "slmops-model.json",
        "chat_template.jinja",
    } == {part.path for part in exported.parts} - {"tokenizer_config.json"}
    assert exported.runtime.name == "onnxruntime-genai" and exported.measured.kld_mean < 1e-4
    assert handed_over.measured.kld_mean < 0.05
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_bytes())
    parity = evidence["variants"][1]["parity"]
    checks = {check["name"]: check for check in parity["checks"]}
    assert {"token ids", "chat template", "special tokens", "greedy text", "divergence", "decoding"} <= set(
        checks
    )
    assert checks["token ids"]["compared"] == 1000 and checks["token ids"]["differing"] == 0
    assert (tmp_path / "out" / "logs" / "n100-16gb@onnxruntime-genai-export.log").is_file()
    with tarfile.open(tmp_path / "out" / "archives" / "android-mid@onnxruntime-genai.tar") as archive:
        assert {"HOWTO.md", "golden-pack.json", "golden-expectations.json", "model.onnx"} <= set(
            archive.getnames()
        )
    assert result.changed
    assert not run_build(recipe, tmp_path / "out", cache_dir=cache, workers=2).changed


@pytest.mark.slow
def test_an_export_that_is_another_model_fails_the_build_and_leaves_no_variant(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 held to what only fp32 keeps: the gate names the figure, nothing is written, nothing of the gate is cached."""
    from dataclasses import replace

    from slmops.build.export import formats
    from slmops.core.errors import BuildError

    strict = tuple(
        replace(form, thresholds=formats.Thresholds(1e-12, 1e-12, 1.0, 16))
        if (form.runtime, form.precision) == ("onnxruntime-genai", "int8")
        else form
        for form in formats.FORMATS
    )
    monkeypatch.setattr(formats, "FORMATS", strict)
    recipe = make_tiny_project(tmp_path / "project", targets=[{**GENAI, "precision": "int8"}])
    with pytest.raises(BuildError, match="is not the model it was made from") as raised:
        run_build(recipe, tmp_path / "out", cache_dir=cache, workers=0)
    assert "divergence" in raised.value.message and "kld_mean" in raised.value.message
    assert not (tmp_path / "out").exists()

"""A build whose recipe cuts the model: every later step works with what is left, and says what it compares with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_project import make_tiny_project

from slmops.artifact.gguf_layout import parse_gguf
from slmops.artifact.manifest import GoldenExpectations, decode
from slmops.build import BuildResult, describe, load_build, run_build
from slmops.cli.build.tables import print_weight_steps
from slmops.core.errors import BaseModelError, BuildError, DocumentError, UsageError

SHAPE = {"layers": 3, "ffn": 512}
TARGETS: tuple[dict[str, Any], ...] = ({"profile": "pi5-8gb", "budget": {"artifact_bytes": "140kB"}},)
MERGE = {"merge": {"adapter": "adapter.gguf"}}
ALL = {"prune": {"keep_vocabulary_tokens": 264, "keep_ffn_width": 256, "drop_layers": 1}}


def project(folder: Path, *steps: dict[str, Any], **how: Any) -> Path:
    return make_tiny_project(folder, steps=steps, shape=SHAPE, **{"targets": TARGETS, **how})


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult]:
    """Merged, then cut in all three ways, then sparse."""
    folder = tmp_path_factory.mktemp("pruned")
    recipe = project(folder / "project", MERGE, ALL, {"sparsify": {"pattern": "2:4"}})
    return folder, run_build(recipe, folder / "build", cache_dir=folder / "cache", workers=0)


def evidence_of(folder: Path) -> dict[str, Any]:
    evidence: dict[str, Any] = json.loads((folder / "build" / "evidence.json").read_bytes())
    return evidence


def test_the_variant_is_the_smaller_model(pruned: tuple[Path, BuildResult]) -> None:
    """Two blocks, half as wide, fewer tokens; within its budget; golden pack and expectations are its own."""
    folder, _ = pruned
    build = load_build(folder / "build")
    (variant,) = build.variants
    content = (folder / "build" / variant.model.path).read_bytes()
    layout = parse_gguf(content)
    shape = layout.shape()
    assert (shape.layers, shape.ffn, shape.vocabulary) == (2, 256, 264)
    assert variant.shape["vocabulary"] == 264
    assert len(content) <= 140_000
    expected = decode((folder / "build" / variant.golden_expectations.path).read_bytes(), GoldenExpectations)
    assert expected.reference_sha256 == build.reference_sha256


def test_divergence_is_from_the_model_before_the_cuts(pruned: tuple[Path, BuildResult]) -> None:
    """And says so; the cuts' own share is told apart from the quantisation's; answers are paired with the uncut model."""
    folder, result = pruned
    evidence = evidence_of(folder)
    assert evidence["compared_with"] == (
        "the model before it was cut, over the 264 tokens that were kept (its probabilities renormalised)"
    )
    cuts_alone = evidence["weight_steps"]["likelihood: unquantised"]["kld_mean"]
    assert 0.01 < cuts_alone <= evidence["variants"][0]["figures"]["kld_mean"] + 0.05
    assert evidence["dense"]["items"] == 4
    names = [step.name for step in result.build.steps]
    assert names.index("check cuts") < names.index("prune vocabulary") < names.index("render text")
    assert names.index("render text") < names.index("prune width") < names.index("prune depth")
    provenance = json.loads((folder / "build" / "provenance.json").read_bytes())
    inputs = {step["name"]: step["inputs"] for step in provenance["steps"]}
    outputs = {step["name"]: step["outputs"] for step in provenance["steps"]}
    dense = outputs["prune vocabulary"]["model.gguf"]
    assert inputs["distributions: unquantised"]["model"] == dense
    assert inputs["answers: dense"]["model"] == outputs["merge adapter.gguf"]["model.gguf"]
    assert inputs["errors"]["base"] == outputs["cut base"]["model.gguf"]
    assert inputs["quantise: pi5-8gb"]["model"] == outputs["sparsify"]["model.gguf"]


def test_the_sparsity_report_is_evidence_and_shown(
    pruned: tuple[Path, BuildResult], capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured beside a dense twin of the same size; its verdict is in build show."""
    folder, _ = pruned
    report = evidence_of(folder)["weight_steps"]["sparsity report"]
    assert report["dense"]["bytes"] == report["sparse"]["bytes"]
    assert report["sparse"]["zeros_ratio"] > 0.45 > report["dense"]["zeros_ratio"]
    assert report["ratios"]["compressed_bytes"] < 1
    assert report["sparse"]["decode_tps"] > 0
    assert report["verdict"].endswith(f"Measured on the variant for {report['profile']}")
    print_weight_steps(describe(load_build(folder / "build"))["weight_steps"])
    shown = capsys.readouterr().out
    assert f"sparsity report: {report['verdict']}" in shown
    assert "ffn 256, ffn_before 512" in shown


def test_equal_inputs_give_equal_bytes(pruned: tuple[Path, BuildResult], tmp_path: Path) -> None:
    """Elsewhere, from an empty cache: the same model."""
    recipe = project(tmp_path / "elsewhere", MERGE, ALL, {"sparsify": {"pattern": "2:4"}})
    again = run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "cache", workers=0)
    assert again.build.variants[0].model == pruned[1].build.variants[0].model
    assert again.build.reference_sha256 == pruned[1].build.reference_sha256


#: a build that says which step begins, so that it can be killed there
SCRIPT = """
import sys
from pathlib import Path
from slmops.build import run_build
recipe, out, cache = map(Path, sys.argv[1:])
run_build(recipe, out, cache_dir=cache, workers=1, progress=lambda e: print(e.state, e.step, flush=True))
"""


def test_a_build_killed_in_a_cut_goes_on_to_the_same_bytes(
    pruned: tuple[Path, BuildResult], tmp_path: Path
) -> None:
    """With SIGKILL, while the step runs: nothing half done is taken for done, what was done is not done again."""
    step = "prune depth"
    recipe = project(tmp_path / "p", MERGE, ALL, {"sparsify": {"pattern": "2:4"}})
    command = [sys.executable, "-c", SCRIPT, str(recipe), str(tmp_path / "build"), str(tmp_path / "c")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        done = []
        for line in child.stdout:
            state, _, name = line.strip().partition(" ")
            done += [name] if state == "done" else []
            if (state, name) == ("started", step):
                child.kill()
        assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "build").exists()
    cached: list[str] = []
    result = run_build(
        recipe,
        tmp_path / "build",
        cache_dir=tmp_path / "c",
        workers=0,
        progress=lambda event: cached.append(event.step) if event.state == "cached" else None,
    )
    assert step not in cached
    assert set(done) - set(cached) == set()
    assert result.build.variants[0].model == pruned[1].build.variants[0].model


@pytest.mark.parametrize(
    ("step", "broken"),
    [
        ("prune vocabulary", "slmops.build.steps.prune_vocabulary.cut"),
        ("prune width", "slmops.build.steps.prune_blocks.narrow"),
        ("prune depth", "slmops.build.steps.prune_blocks.check_depth"),
        ("sparsify", "slmops.build.steps.sparsify.keep_mask"),
    ],
)
def test_a_cut_that_failed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, broken: str
) -> None:
    """A second run tries it again, and nothing that went well before it."""
    recipe = project(tmp_path / "p", MERGE, ALL, {"sparsify": {"pattern": "2:4"}})

    def fail(*_: object, **__: object) -> None:
        raise BuildError("the memory went away", hint="run it again")

    monkeypatch.setattr(broken, fail)
    seen: list[list[tuple[str, str]]] = []
    for _ in range(2):
        seen.append([])
        with pytest.raises(BuildError, match="went away"):
            run_build(
                recipe,
                tmp_path / "build",
                cache_dir=tmp_path / "c",
                workers=0,
                progress=lambda event: seen[-1].append((event.state, event.step)),
            )
    assert [name for state, name in seen[0] if state == "failed"] == [step]
    assert [name for state, name in seen[1] if state == "failed"] == [step]
    assert [name for state, name in seen[1] if state == "started"] == [step]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"keep_vocabulary_tokens": 262}, (3, 512, 262)),
        pytest.param({"keep_ffn_width": 256}, (3, 256, 267), marks=pytest.mark.slow),
        pytest.param({"drop_layers": 1}, (2, 512, 267), marks=pytest.mark.slow),
    ],
)
def test_each_cut_alone(tmp_path: Path, cut: dict[str, int], expected: tuple[int, int, int]) -> None:
    """Also without a merge; a trimmed vocabulary alone changes no prediction."""
    recipe = project(
        tmp_path / "p",
        {"prune": cut},
        targets=({"profile": "pi5-8gb", "budget": {"artifact_bytes": "700kB"}},),
    )
    result = run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "c", workers=0)
    (variant,) = result.build.variants
    assert tuple(variant.shape[name] for name in ("layers", "ffn", "vocabulary")) == expected
    alone = evidence_of(tmp_path)["weight_steps"]["likelihood: unquantised"]["kld_mean"]
    assert (alone < 1e-4) == ("keep_vocabulary_tokens" in cut)


@pytest.mark.parametrize(
    ("error", "message", "steps"),
    [
        (UsageError, "multiple of 256", ({"prune": {"keep_ffn_width": 100}},)),
        (UsageError, "an earlier step already left 256", ({"prune": {"keep_ffn_width": 256}},) * 2),
        (UsageError, "all steps together drop 4 of 3", ({"prune": {"drop_layers": 2}},) * 2),
        (DocumentError, "give keep_vocabulary_tokens, keep_ffn_width or drop_layers", ({"prune": {}},)),
        (DocumentError, "must come before every other cut", ({"sparsify": {}}, {"prune": {"keep_vocabulary_tokens": 262}})),
        (DocumentError, "merge must come before prune", ({"prune": {"drop_layers": 1}}, MERGE)),
        (DocumentError, "a prune or sparsify step must come before it", ({"distil": {}},)),
        (DocumentError, "sets nothing to zero", ({"sparsify": {"pattern": "4:4"}},)),
        (DocumentError, "recover has nothing to do", ({"prune": {"keep_vocabulary_tokens": 262, "recover": {}}},)),
        (DocumentError, "fill up the zeros", ({"sparsify": {}}, {"distil": {"method": "lora"}})),
        (DocumentError, r"none\.txt does not exist", ({"prune": {"drop_layers": 1, "general_text": ["none.txt"]}},)),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, error: type[Exception], message: str, steps: tuple[dict[str, Any], ...]
) -> None:
    recipe = project(tmp_path / "p", *steps)
    with pytest.raises(error, match=message):
        run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "c", workers=0)
    done = list((tmp_path / "c" / "steps").iterdir()) if (tmp_path / "c").exists() else []
    assert len(done) <= 1  # looking at the base


def test_a_vocabulary_that_cannot_be_trimmed_is_refused_by_name(tmp_path: Path) -> None:
    """SentencePiece: named, and nothing but looking at the base was done."""
    recipe = project(tmp_path / "p", {"prune": {"keep_vocabulary_tokens": 262}})
    base = tmp_path / "p" / "base.gguf"
    content = base.read_bytes()
    key = b"tokenizer.ggml.model"
    assert content.count(key + b"\x08\0\0\0\x04\0\0\0\0\0\0\0gpt2") == 1
    base.write_bytes(
        content.replace(key + b"\x08\0\0\0\x04\0\0\0\0\0\0\0gpt2", key + b"\x08\0\0\0\x04\0\0\0\0\0\0\0bert")
    )
    with pytest.raises(BaseModelError, match="'bert' \\(WordPiece\\), only byte-level BPE"):
        run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "c", workers=0)
    assert len(list((tmp_path / "c" / "steps").iterdir())) <= 1

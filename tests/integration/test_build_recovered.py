"""Recovery as part of a recipe: trained in the build's own graph, cached, reproducible; by name where torch is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.tiny_project import make_tiny_project

from slmops.build import run_build
from slmops.core.errors import BuildError, LeakageError

HAS_TORCH = importlib.util.find_spec("torch") is not None
RECOVER = {
    "reconstruct_tokens": 512,
    "distil_tokens": 1024,
    "epochs": 4,
    "method": "full",
    "learning_rate": 3e-5,
}
PRUNE = {"keep_vocabulary_tokens": 264, "keep_ffn_width": 256, "drop_layers": 1, "recover": RECOVER}


def project(folder: Path, *steps: dict[str, Any]) -> Path:
    """With a training set and general text, so that there is something to learn from."""
    targets = ({"profile": "pi5-8gb", "budget": {"artifact_bytes": "400kB"}},)
    recipe = make_tiny_project(folder, steps=steps, shape={"layers": 3, "ffn": 512}, targets=targets)
    items = [
        {
            "messages": [{"role": "user", "content": f"dim lamp {i} to {i % 7}0"}],
            "answer": json.dumps({"dim": i}),
        }
        for i in range(60)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "general.txt").write_text("The lamp stands on the table near the window. " * 30)
    document = yaml.safe_load(recipe.read_text())
    document["task"]["train"] = "train.jsonl"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    return recipe


@pytest.mark.skipif(HAS_TORCH, reason="torch is installed here")
@pytest.mark.parametrize(
    "steps", [({"prune": PRUNE},), ({"prune": {"drop_layers": 1}}, {"distil": {"tokens": 512}})]
)
def test_without_torch_the_build_says_so_before_any_work(
    tmp_path: Path, steps: tuple[dict[str, Any], ...]
) -> None:
    """By name and with the way out; nothing but looking at the base was done."""
    recipe = project(tmp_path / "p", *steps)
    with pytest.raises(BuildError, match="torch is not installed here") as caught:
        run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "c", workers=0)
    assert "slmops[train]" in caught.value.hint
    assert len(list((tmp_path / "c" / "steps").iterdir())) <= 1


def test_the_evaluation_set_is_never_learned_from(tmp_path: Path) -> None:
    """A general text that quotes an evaluation prompt is refused, with the item, before any work."""
    recipe = project(tmp_path / "p", {"prune": {"drop_layers": 1, "general_text": ["general.txt"]}})
    text = tmp_path / "p" / "general.txt"
    text.write_text(text.read_text() + " Then he said: Turn on - light 7! And so it was.")
    with pytest.raises(LeakageError, match=r"item-7 is general\.txt of general-0-0 \(prompt\)"):
        run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "c", workers=0)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCH, reason="needs torch (slmops[train])")
def test_a_pruned_model_is_recovered(tmp_path: Path) -> None:
    """Closer to the model before the cuts than without recovery; twice the same bytes; nothing is trained again."""
    steps = ({"prune": {**PRUNE, "general_text": ["general.txt"]}},)
    recipe = project(tmp_path / "p", *steps)
    result = run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "c", workers=1)
    told = result.build.weight_steps
    assert told["reconstruct"]["error_after"] < told["reconstruct"]["error_before"]
    assert told["distil"]["divergence_after"] < told["distil"]["divergence_before"]
    assert 0.5 < told["teacher"]["kept_mass"] <= 1
    assert not any((tmp_path / "c" / "checkpoints").glob("*"))
    again = run_build(recipe, tmp_path / "again", cache_dir=tmp_path / "c2", workers=0)
    assert again.build.variants[0].model == result.build.variants[0].model
    cached = run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "c", workers=1)
    assert (cached.changed, cached.steps_run) == (False, 0)
    bare = project(tmp_path / "bare", {"prune": {k: v for k, v in PRUNE.items() if k != "recover"}})
    without = run_build(bare, tmp_path / "without", cache_dir=tmp_path / "c", workers=1)
    figures = [
        build.weight_steps["likelihood: unquantised"]["kld_mean"] for build in (result.build, without.build)
    ]
    assert figures[0] < figures[1]


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch (slmops[train])")
@pytest.mark.parametrize("teacher", ["parent", "base"])
def test_distilling_is_a_step_of_its_own(tmp_path: Path, teacher: str) -> None:
    """After sparsify zeros stay; the untouched base can be the teacher, with the student's vocabulary."""
    steps = (
        {"merge": {"adapter": "adapter.gguf"}},
        {"prune": {"keep_vocabulary_tokens": 264}},
        {"sparsify": {"pattern": "unstructured", "ratio": 0.4}},
        {"distil": {"teacher": teacher, "tokens": 512, "epochs": 2, "learning_rate": 3e-4}},
    )
    recipe = project(tmp_path / "p", *steps)
    result = run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "c", workers=0)
    told = result.build.weight_steps
    assert told["distil"]["divergence_after"] < told["distil"]["divergence_before"]
    assert told["sparsity report"]["sparse"]["zeros_ratio"] > 0.35

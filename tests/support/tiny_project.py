"""A complete, tiny project: base model, adapter, data and recipe. A whole build of it takes a few seconds.

recipe = make_tiny_project(tmp_path / "project")
run_build(recipe, tmp_path / "build", cache_dir=tmp_path / "cache", workers=0)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny_model import make_tiny_adapter, make_tiny_gguf

#: two profiles with unlike budgets; F16 of the tiny model has some 270 kB
TARGETS: tuple[dict[str, Any], ...] = (
    {"profile": "pi-zero2-512mb", "budget": {"artifact_bytes": "120kB"}},
    {"profile": "pi5-8gb", "budget": {"artifact_bytes": "170kB", "decode_tps": 10}},
)
SMALL_EVALUATION = {
    "text_tokens": 64,
    "task_items": 4,
    "constrained_items": 1,
    "base_items": 1,
    "golden_prompts": 2,
    "bench_repeats": 1,
}
SMALL_SEARCH = {
    "types": ["Q4_0", "Q5_0", "Q8_0", "Q6_K"],
    "calibration_tokens": 256,
    "probe_tokens": 16,
    "sample_rows": 4,
}
LOOSE_GATES: tuple[dict[str, Any], ...] = ({"metric": "kld.mean", "max": 5.0},)


def make_tiny_project(
    folder: Path,
    *,
    seed: int = 0,
    name: str = "tiny",
    steps: Sequence[Mapping[str, Any]] = ({"merge": {"adapter": "adapter.gguf"}},),
    targets: Sequence[Mapping[str, Any]] = TARGETS,
    gates: Sequence[Mapping[str, Any]] = LOOSE_GATES,
    evaluation: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    shape: Mapping[str, int] | None = None,
) -> Path:
    """Write the project and give the recipe's path back.

    Args:
        folder: new folder.
        seed: of the model; the data are always the same.
        name: of the model.
        steps: of the recipe.
        targets: of the recipe.
        gates: of the recipe.
        evaluation: of the recipe; None for very little.
        base: of the recipe; None for the tiny model's file.
        shape: of the tiny model, see ``make_tiny_gguf``; ``layers`` is also the adapter's.
    """
    folder.mkdir(parents=True)
    make_tiny_gguf(folder / "base.gguf", seed=seed, **(shape or {}))
    make_tiny_adapter(folder / "adapter.gguf", seed=seed, layers=(shape or {}).get("layers", 2))
    items = [
        {
            "id": f"item-{i}",
            "messages": [{"role": "user", "content": f"turn on light {i}"}],
            "answer": json.dumps({"on": i}),
        }
        for i in range(12)
    ]
    (folder / "eval.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "calibration.txt").write_text(
        "".join(f'switch off lamp {i} {{"off":{i}}}\n' for i in range(12))
    )
    schema = {
        "type": "object",
        "properties": {"on": {"type": "integer"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    (folder / "schema.json").write_text(json.dumps(schema))
    (folder / "system.txt").write_text("Answer in JSON.\n")
    recipe = {
        "apiVersion": "slmops/v1",
        "kind": "Recipe",
        "metadata": {"name": name},
        "base": dict(base or {"gguf": "base.gguf"}),
        "task": {
            "kind": "extraction",
            "eval": "eval.jsonl",
            "calibration": "calibration.txt",
            "answer_schema": "schema.json",
            "system_prompt": "system.txt",
        },
        "steps": [dict(step) for step in steps],
        "targets": [dict(target) for target in targets],
        "gates": [dict(gate) for gate in gates],
        "search": SMALL_SEARCH,
        "serving": {"context_tokens": 512, "kv_cache": "q8_0", "parallel": 1, "micro_batch_tokens": 64},
        "evaluation": dict(evaluation or SMALL_EVALUATION),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path

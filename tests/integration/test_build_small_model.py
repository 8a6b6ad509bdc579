"""A build of the real small model: budgets are kept, the file is close to the reference, the second run does nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tests.support.tiny_project import make_tiny_project

from slmops.build import load_build, run_build
from slmops.core.errors import BudgetError

pytestmark = [pytest.mark.model, pytest.mark.slow]


def test_a_variant_of_the_real_model(small_model: Path, tmp_path: Path) -> None:
    """Fetched GGUF to measured variant, and a budget that nothing can meet."""
    evaluation = {
        "text_tokens": 64,
        "task_items": 1,
        "constrained_items": 1,
        "base_items": 0,
        "golden_prompts": 1,
        "bench_repeats": 1,
    }
    recipe = make_tiny_project(
        tmp_path / "p",
        base={"gguf": str(small_model)},
        steps=(),
        targets=({"profile": "pi5-8gb", "budget": {"artifact_bytes": "104MB", "ram_bytes": "300MB"}},),
        gates=({"metric": "kld.mean", "max": 0.2},),
        evaluation=evaluation,
    )
    document = yaml.safe_load(recipe.read_text())
    document["search"] = {
        "types": ["Q4_0", "Q5_0", "Q8_0"],
        "calibration_tokens": 256,
        "probe_tokens": 0,
        "sample_rows": 4,
    }
    recipe.write_text(yaml.safe_dump(document))

    result = run_build(recipe, tmp_path / "out", cache_dir=tmp_path / "c", workers=2)
    (variant,) = load_build(tmp_path / "out").variants
    assert 103_000_000 < variant.model.bytes <= 104_000_000
    assert variant.measured.kld_mean < 0.2
    assert variant.measured.same_top_ratio > 0.5
    assert 5.5 < variant.measured.bits_per_weight < 6.2
    assert result.verdict == "pass"
    assert result.build.licence == "apache-2.0"
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_bytes())
    assert any(
        "576 are no multiple of 256" in note["reason"] for note in evidence["variants"][0]["fallbacks"]
    )
    assert evidence["reference"]["kept_mass"] > 0.9

    again = run_build(recipe, tmp_path / "out", cache_dir=tmp_path / "c", workers=2)
    assert (again.changed, again.steps_run) == (False, 0)

    recipe.write_text(recipe.read_text().replace("104MB", "60MB"))
    with pytest.raises(BudgetError, match=r"token_embd\.weight 15\.93 MB") as caught:
        run_build(recipe, tmp_path / "out", cache_dir=tmp_path / "c", workers=2)
    assert re.search(r"smallest possible file has 7\d{7} bytes", caught.value.message)
    assert (
        load_build(tmp_path / "out").variants[0].model.bytes == variant.model.bytes
    )  # the old build is as it was

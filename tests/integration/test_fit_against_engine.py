"""The fit's arithmetic against a real engine: what admission predicts is what the engine takes."""

from __future__ import annotations

import asyncio
import mmap
from pathlib import Path

import pytest

from slmops.artifact.gguf_layout import parse_gguf
from slmops.core.device.fit import Serving, memory_needed
from slmops.runtimes import EngineSpec, open_engine
from slmops.runtimes.bench import bench_engine

pytestmark = [pytest.mark.model, pytest.mark.e2e]


@pytest.mark.parametrize(
    "serving", [Serving(512, "q8_0", 1, 64), Serving(2048, "f16", 2, 64)], ids=["small", "large"]
)
def test_predicted_memory_is_what_the_engine_takes(small_model: Path, serving: Serving) -> None:
    """Private memory plus the model's pages once (its resident size counts pages that are mapped twice, twice)."""
    with small_model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        shape = parse_gguf(content).shape()

    async def measure() -> int:
        spec = EngineSpec(
            runtime="llama.cpp",
            model_path=small_model,
            context_tokens=serving.context_tokens,
            slots=serving.parallel,
            kv_cache=serving.kv_cache,
            batch_tokens=64,
            ubatch_tokens=serving.micro_batch_tokens,
            embeddings=True,
            repack=False,
        )
        async with open_engine(spec) as engine:
            await bench_engine(engine, prompt_tokens=200, decode_tokens=8, repeats=1)
            return engine.private_bytes() + shape.weights_bytes

    measured = asyncio.run(measure())
    predicted = memory_needed(shape, serving).total_bytes
    assert 0.75 < predicted / measured < 1.5

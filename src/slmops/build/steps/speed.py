"""Speed and memory of a shipped file on this machine, through the engine child with the settings that devices serve with."""

from __future__ import annotations

import asyncio
from typing import Any

from slmops.build.files import sha256_of_file
from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.memory import serving_of_step
from slmops.core.device.fit import memory_needed
from slmops.runtimes import EngineSpec, load
from slmops.runtimes.bench import BenchResult, bench_model

USES = ("slmops.build.steps.memory", "slmops.core.device.fit", "slmops.runtimes.bench")


def measure(context: StepContext) -> dict[str, Any]:
    """Measure load time, prefill, decode and memory. Files in: ``model``. Values in: maybe ``choice`` (how it is served).

    Params: ``serving``, ``prompt_tokens``, ``decode_tokens``, ``repeats``.

    Value: medians over the repeats, and beside them every repeat's decode speed and ``busy_ratio`` (well below 1: others held
    the core, do not believe the figures). ``predicted_rss_bytes`` is what the fit predicts for the same settings.
    """
    params = context.params
    serving = serving_of_step(context)
    spec = EngineSpec(
        runtime="llama.cpp",
        model_path=context.files["model"],
        context_tokens=serving.context_tokens,
        slots=serving.parallel,
        kv_cache=serving.kv_cache,
        batch_tokens=max(serving.micro_batch_tokens, 64),
        ubatch_tokens=serving.micro_batch_tokens,
    )
    context.progress(None, "measuring speed, alone on this machine")
    result = asyncio.run(
        bench_model(
            spec,
            prompt_tokens=params["prompt_tokens"],
            decode_tokens=params["decode_tokens"],
            repeats=params["repeats"],
        )
    )
    with open_gguf(context.files["model"]) as model:
        predicted = memory_needed(model.layout.shape(), serving)
    return {
        "runtime": {"name": "llama.cpp", "version": load("llama.cpp").version()},
        **figures_of(result),
        "predicted_rss_bytes": predicted.total_bytes,
        "model_sha256": sha256_of_file(context.files["model"]),
    }


def figures_of(result: BenchResult) -> dict[str, Any]:
    """What a bench says, as evidence holds it."""
    return {
        "load_s": result.load_s,
        "prefill_tps": result.prefill_tps,
        "decode_tps": result.decode_tps,
        "ttft_s": result.ttft_s,
        "rss_bytes": result.peak_rss_bytes,
        "private_bytes": result.private_bytes,
        "busy_ratio": result.busy_ratio,
        "decode_tps_repeats": [round(repeat.decode_tps, 2) for repeat in result.repeats],
        "threads": result.threads,
        "prompt_tokens": result.prompt_tokens,
        "decode_tokens": result.decode_tokens,
    }

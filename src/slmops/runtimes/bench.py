"""Speed and memory of a model, measured through the engine child that ships. Standard library and httpx only.

Used by build's evaluation and by `slmops agent bench`. Each repeat uses a prompt of its own, so that no
repeat meets the engine's prompt cache. Medians are reported with every repeat beside them: on shared cores
the spread says whether to believe them, and CPU seconds per token say what the work cost whoever else was
running.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from slmops.core.errors import HealthCheckError, UsageError
from slmops.runtimes.connect import engine_client
from slmops.runtimes.ports import Engine, EngineLimits, EngineSpec
from slmops.runtimes.registry import open_engine


@dataclass(frozen=True)
class BenchRepeat:
    """One prompt and one answer.

    Attributes:
        ttft_s: from sending the request to the first streamed token, over the socket.
        prefill_tps: prompt tokens per second, as the engine timed them.
        decode_tps: answer tokens per second after the first, by the wall clock here.
        engine_decode_tps: the same as the engine timed it.
        cpu_s: CPU time of the engine for the whole request.
        wall_s: wall time of the whole request.
    """

    ttft_s: float
    prefill_tps: float
    decode_tps: float
    engine_decode_tps: float
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class BenchResult:
    """What a model costs on this machine; speeds are medians over the repeats.

    Attributes:
        prompt_tokens, decode_tokens: size of each repeat.
        threads, slots, context_tokens: from the spec.
        prefill_tps, decode_tps: tokens per second.
        ttft_s: time to first token.
        load_s: spawn to ready; None when the engine was running already.
        peak_rss_bytes: highest resident memory, mapped model pages included.
        private_bytes: anonymous memory at the end: KV cache, buffers, repacked weights.
        busy_ratio: CPU seconds per wall second per thread; well below 1 means that others held the cores.
        repeats: every measurement.
    """

    prompt_tokens: int
    decode_tokens: int
    threads: int
    slots: int
    context_tokens: int
    prefill_tps: float
    decode_tps: float
    ttft_s: float
    load_s: float | None
    peak_rss_bytes: int
    private_bytes: int
    busy_ratio: float
    repeats: tuple[BenchRepeat, ...]


async def bench_model(
    spec: EngineSpec,
    *,
    prompt_tokens: int = 256,
    decode_tokens: int = 64,
    repeats: int = 3,
    workdir: Path | None = None,
    limits: EngineLimits | None = None,
) -> BenchResult:
    """Load a model, measure it, stop it.

    Raises:
        RuntimeLoadError: the engine refused the model.
        UsageError: prompt and answer do not fit in `spec.context_tokens`.
    """
    began_s = time.perf_counter()
    async with open_engine(spec, workdir=workdir, limits=limits) as engine:
        load_s = time.perf_counter() - began_s
        result = await bench_engine(
            engine, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, repeats=repeats
        )
        return replace(result, load_s=load_s)


async def bench_engine(
    engine: Engine, *, prompt_tokens: int = 256, decode_tokens: int = 64, repeats: int = 3
) -> BenchResult:
    """Measure a running engine that nobody else is using.

    Raises:
        UsageError: prompt and answer do not fit in the context, or a number is too small.
        HealthCheckError: the engine did not stream what was asked.
    """
    spec = engine.spec
    if min(prompt_tokens, repeats) < 1 or decode_tokens < 2:
        raise UsageError(
            "bench: expected prompt_tokens and repeats >= 1, decode_tokens >= 2", hint="raise them"
        )
    if prompt_tokens + decode_tokens > spec.context_tokens:
        raise UsageError(
            f"bench: expected at most {spec.context_tokens} tokens, got {prompt_tokens} + {decode_tokens}",
            hint="lower them or raise context_tokens",
        )
    vocabulary = (await engine.properties()).vocab_tokens
    runs = []
    async with engine_client(engine.socket_path) as client:
        for index in range(repeats):
            prompt = _prompt(index, prompt_tokens, vocabulary)
            runs.append(await _repeat(engine, client, prompt, decode_tokens))
    return BenchResult(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        threads=spec.threads,
        slots=spec.slots,
        context_tokens=spec.context_tokens,
        prefill_tps=statistics.median(run.prefill_tps for run in runs),
        decode_tps=statistics.median(run.decode_tps for run in runs),
        ttft_s=statistics.median(run.ttft_s for run in runs),
        load_s=None,
        peak_rss_bytes=engine.peak_rss_bytes(),
        private_bytes=engine.private_bytes(),
        busy_ratio=sum(run.cpu_s for run in runs) / sum(run.wall_s for run in runs) / spec.threads,
        repeats=tuple(runs),
    )


def _prompt(index: int, count: int, vocabulary: int) -> list[int]:
    """Token ids that differ between repeats from the first on; spread over the middle of the vocabulary."""
    low, span = vocabulary // 8, max(vocabulary // 2, 1)
    return [low + (7919 * (index + 1) + 104_729 * position) % span for position in range(count)]


async def _repeat(
    engine: Engine, client: httpx.AsyncClient, prompt: list[int], decode_tokens: int
) -> BenchRepeat:
    body = {
        "prompt": prompt,
        "max_tokens": decode_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
    }
    cpu_s, began_s = engine.cpu_s(), time.perf_counter()
    stamps: list[float] = []
    timings: dict[str, Any] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            timings = event.get("timings") or timings
            if event.get("choices") and not event["choices"][0].get("finish_reason"):
                stamps.append(time.perf_counter())
    wall_s = time.perf_counter() - began_s
    if len(stamps) < 2:
        raise HealthCheckError(
            f"bench: expected a stream of {decode_tokens} tokens, got {len(stamps)} events",
            hint="see the engine's log",
        )
    decode_s = stamps[-1] - stamps[0]
    return BenchRepeat(
        ttft_s=stamps[0] - began_s,
        prefill_tps=float(timings.get("prompt_per_second") or len(prompt) / (stamps[0] - began_s)),
        decode_tps=(decode_tokens - 1) / decode_s if decode_s > 0 else 0.0,
        engine_decode_tps=float(timings.get("predicted_per_second") or 0.0),
        cpu_s=engine.cpu_s() - cpu_s,
        wall_s=wall_s,
    )

"""What a model costs at several depths of a conversation, cold and warm: one form for every runtime.

Owns: ``slmops agent bench --depths`` and its JSON. Speeds come from the engine's own ``timings`` where it gives them,
else from the wall clock here. A depth is reached by a prompt that the engine keeps in its KV cache; how many tokens it
really took from there is reported, because some engines keep whole pieces only. Standard library and httpx.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from slmops.core.errors import HealthCheckError, UsageError
from slmops.runtimes.connect import engine_client
from slmops.runtimes.energy import joules_between, read_energy
from slmops.runtimes.ports import Engine, EngineLimits, EngineSpec
from slmops.runtimes.registry import load, open_engine

SCHEMA = 1
DEPTHS_TOKENS = (0, 512, 2048)


@dataclass(frozen=True)
class DepthRepeat:
    """One prompt and answer at one depth; times in seconds, speeds in tokens per second."""

    evaluated_tokens: int
    cached_tokens: int
    ttft_s: float
    prefill_tps: float
    decode_tps: float
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class DepthResult:
    """Medians at one depth.

    Attributes:
        depth_tokens: tokens before the measured prompt.
        reason: why nothing was measured; empty when it was.
        prefill_tps, decode_tps, ttft_s: medians over the repeats.
        spread_ratio: (slowest - fastest) / median of the decode speed.
        busy_ratio: CPU seconds per wall second and thread: well below 1, others held the cores.
        repeats: every measurement.
    """

    depth_tokens: int
    reason: str = ""
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    ttft_s: float = 0.0
    spread_ratio: float = 0.0
    busy_ratio: float = 0.0
    repeats: tuple[DepthRepeat, ...] = ()


@dataclass(frozen=True)
class DepthBench:
    """The whole measurement.

    Attributes:
        runtime, runtime_version, model: what was measured; `model_bytes` as the engine says.
        threads, context_tokens, prompt_tokens, decode_tokens: how.
        load_s: spawn to ready.
        ttft_cold_s: first request of the fresh engine; `ttft_warm_s`: the same request again, its prompt cached.
        depths: one result each.
        peak_rss_bytes: highest resident memory; at the end `anonymous_bytes` of it are the engine's alone and
            `file_backed_bytes` are pages of files that the kernel may drop.
        energy_j, tokens_measured: of the whole measurement; `energy` says "measured" or why not.
        load_before, load_after: the machine's load average over a minute.
    """

    runtime: str
    runtime_version: str
    model: str
    model_bytes: int
    threads: int
    context_tokens: int
    prompt_tokens: int
    decode_tokens: int
    load_s: float
    ttft_cold_s: float
    ttft_warm_s: float
    depths: tuple[DepthResult, ...]
    peak_rss_bytes: int
    anonymous_bytes: int
    file_backed_bytes: int
    energy_j: float | None
    energy: str
    tokens_measured: int
    load_before: float
    load_after: float
    schema: int = SCHEMA

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


async def bench_depths(
    spec: EngineSpec,
    *,
    depths_tokens: Sequence[int] = DEPTHS_TOKENS,
    prompt_tokens: int = 128,
    decode_tokens: int = 32,
    repeats: int = 3,
    limits: EngineLimits | None = None,
) -> DepthBench:
    """Load a model, measure it, stop it. Nobody else may use the machine meanwhile, or `busy_ratio` will say so.

    Raises:
        RuntimeLoadError: the engine refused the model.
        UsageError: numbers that are too small.
        HealthCheckError: the engine did not stream what was asked.
    """
    if min(prompt_tokens, repeats) < 1 or decode_tokens < 2 or min(depths_tokens, default=0) < 0:
        raise UsageError(
            "bench: expected prompt_tokens and repeats >= 1, decode_tokens >= 2", hint="raise them"
        )
    load_before = os.getloadavg()[0]
    energy_before = read_energy()
    began_s = time.perf_counter()
    async with open_engine(spec, limits=limits) as engine:
        load_s = time.perf_counter() - began_s
        facts = await engine.properties()
        bench = _Bench(engine, facts.vocab_tokens, decode_tokens)
        async with engine_client(engine.socket_path) as client:
            bench.client = client
            first = bench.tokens(0, prompt_tokens)
            cold, warm = await bench.ask(first, cached=False), await bench.ask(first, cached=True)
            results = []
            for depth in depths_tokens:
                results.append(await bench.at(depth, prompt_tokens, repeats, facts.context_tokens))
        energy_after = read_energy()
        rss, anonymous = engine.rss_bytes(), engine.private_bytes()
        joules = joules_between(energy_before, energy_after)
        return DepthBench(
            runtime=spec.runtime,
            runtime_version=load(spec.runtime).version(),
            model=spec.model_alias or spec.model_path.name,
            model_bytes=facts.model_bytes,
            threads=spec.threads,
            context_tokens=facts.context_tokens,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            load_s=load_s,
            ttft_cold_s=cold.ttft_s,
            ttft_warm_s=warm.ttft_s,
            depths=tuple(results),
            peak_rss_bytes=engine.peak_rss_bytes(),
            anonymous_bytes=anonymous,
            file_backed_bytes=max(rss - anonymous, 0),
            energy_j=joules,
            energy="measured" if joules is not None else energy_after.reason or "not measured",
            tokens_measured=bench.tokens_measured,
            load_before=load_before,
            load_after=os.getloadavg()[0],
        )


class _Bench:
    """Requests to one engine, each with tokens of its own."""

    client: httpx.AsyncClient

    def __init__(self, engine: Engine, vocabulary: int, decode_tokens: int) -> None:
        self.engine = engine
        self.decode_tokens = decode_tokens
        self.tokens_measured = 0
        self._vocabulary = vocabulary
        self._asked = 0

    def tokens(self, salt: int, count: int) -> list[int]:
        """Ids spread over the middle of the vocabulary, another row for each salt."""
        low, span = self._vocabulary // 8, max(self._vocabulary // 2, 1)
        return [low + (7919 * (salt + 1) + 104_729 * position) % span for position in range(count)]

    async def at(self, depth: int, prompt_tokens: int, repeats: int, context_tokens: int) -> DepthResult:
        """Measure at one depth, or say why not."""
        needed = depth + prompt_tokens + self.decode_tokens
        if needed > context_tokens:
            return DepthResult(
                depth, f"not measured: needs {needed} tokens of context, this has {context_tokens}"
            )
        base = self.tokens(1000 + depth, depth)
        if depth:
            await self.ask(base, cached=True, decode_tokens=2)
        runs = []
        for _ in range(repeats):
            self._asked += 1
            runs.append(await self.ask(base + self.tokens(self._asked, prompt_tokens), cached=depth > 0))
        decode = [run.decode_tps for run in runs]
        middle = statistics.median(decode)
        cpu_s, wall_s = sum(run.cpu_s for run in runs), sum(run.wall_s for run in runs)
        return DepthResult(
            depth_tokens=depth,
            prefill_tps=statistics.median(run.prefill_tps for run in runs),
            decode_tps=middle,
            ttft_s=statistics.median(run.ttft_s for run in runs),
            spread_ratio=(max(decode) - min(decode)) / middle if middle else 0.0,
            busy_ratio=cpu_s / wall_s / self.engine.spec.threads,
            repeats=tuple(runs),
        )

    async def ask(self, prompt: list[int], *, cached: bool, decode_tokens: int = 0) -> DepthRepeat:
        """One streamed answer; `cached` lets the engine continue what it has."""
        body = {
            "prompt": prompt,
            "max_tokens": decode_tokens or self.decode_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "cache_prompt": cached,
        }
        cpu_s, began_s = self.engine.cpu_s(), time.perf_counter()
        stamps: list[float] = []
        timings: dict[str, Any] = {}
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                timings = event.get("timings") or timings
                if event.get("choices") and not event["choices"][0].get("finish_reason"):
                    stamps.append(time.perf_counter())
        wall_s = time.perf_counter() - began_s
        if not stamps:
            raise HealthCheckError("bench: the engine streamed nothing", hint="see the engine's log")
        answered = int(timings.get("predicted_n") or decode_tokens or self.decode_tokens)
        evaluated = int(timings.get("prompt_n") or len(prompt))
        self.tokens_measured += evaluated + answered
        ttft_s, decode_s = stamps[0] - began_s, stamps[-1] - stamps[0]
        # without timings: between the first event and the last lie all tokens but the first
        by_wall = (answered - 1) / decode_s if decode_s > 0 else 0.0
        return DepthRepeat(
            evaluated_tokens=evaluated,
            cached_tokens=len(prompt) - evaluated,
            ttft_s=ttft_s,
            prefill_tps=float(timings.get("prompt_per_second") or evaluated / ttft_s),
            decode_tps=float(timings.get("predicted_per_second") or by_wall),
            cpu_s=self.engine.cpu_s() - cpu_s,
            wall_s=wall_s,
        )

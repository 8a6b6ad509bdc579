"""``agent bench``: what the committed model costs on this device, measured with an engine of its own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

import msgspec

from slmops.agent.identity import DeviceConfig
from slmops.agent.store.artifacts import ArtifactStore
from slmops.agent.store.files import write_atomic
from slmops.agent.store.journal import read_journal
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import Slot, read_slot
from slmops.agent.store.views import make_view, remove_view
from slmops.artifact.manifest import Variant, decode
from slmops.core.errors import NotFoundError
from slmops.protocol.messages import Bench
from slmops.runtimes import EngineLimits, EngineSpec, load
from slmops.runtimes.bench import bench_model
from slmops.runtimes.depth_bench import DepthBench, bench_depths

_VIEW = "bench"


async def run_bench(
    layout: Layout, config: DeviceConfig, prompt_tokens: int, decode_tokens: int, repeats: int
) -> Bench:
    """Measure the committed release and keep the result for the next check-in.

    Raises:
        NotFoundError: the device has proved no release yet.
    """
    slot, spec = _committed(layout, config, prompt_tokens + decode_tokens)
    shape = decode(ArtifactStore(layout).read_blob(slot.digest_of("variant")), Variant).model_shape()
    try:
        result = await bench_model(
            spec,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            repeats=repeats,
            limits=_limits(config),
        )
    finally:
        remove_view(layout, _VIEW)
    bench = Bench(
        artifact_sha256=slot.digest_of("model"),
        weights_bytes=shape.weights_bytes,
        parameters=shape.parameters,
        prefill_tps=result.prefill_tps,
        decode_tps=result.decode_tps,
        ttft_s=result.ttft_s,
        load_s=result.load_s or 0.0,
        rss_bytes=result.peak_rss_bytes,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        runtime=slot.runtime,
    )
    write_atomic(layout.bench, msgspec.json.encode(bench))
    return bench


async def run_depth_bench(
    layout: Layout,
    config: DeviceConfig,
    depths_tokens: Sequence[int],
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
) -> DepthBench:
    """Measure the committed release at several depths, with the context that it is served with.

    Raises:
        NotFoundError: the device has proved no release yet.
    """
    _, spec = _committed(layout, config, 0)
    try:
        return await bench_depths(
            spec,
            depths_tokens=depths_tokens,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            repeats=repeats,
            limits=_limits(config),
        )
    finally:
        remove_view(layout, _VIEW)


def _committed(layout: Layout, config: DeviceConfig, least_context_tokens: int) -> tuple[Slot, EngineSpec]:
    """The slot that was proved, and an engine of its own for it. The view that it makes is the caller's to remove."""
    name = read_journal(layout.journal).state.committed_slot
    slot = read_slot(layout, name) if name is not None else None
    if slot is None or slot.assignment.serving is None:
        raise NotFoundError(
            "this device has proved no release yet", hint="run the agent and roll a release out to it first"
        )
    runtime, serving = load(slot.runtime), slot.assignment.serving
    spec = EngineSpec(
        runtime=runtime.name,
        model_path=make_view(layout, _VIEW, slot),
        context_tokens=max(serving.context_tokens, least_context_tokens),
        slots=1,
        kv_cache=runtime.capabilities.kv_cache_for(serving.kv_cache),
        threads=config.threads,
        ubatch_tokens=serving.micro_batch_tokens,
        model_alias=slot.model_name,
    )
    return slot, spec


def _limits(config: DeviceConfig) -> EngineLimits:
    return EngineLimits(memory_bytes=config.ram_limit_bytes, cpu_cores=config.cpu_cores)

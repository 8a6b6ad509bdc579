"""``agent bench``: what the committed model costs on this device, measured with an engine of its own."""

from __future__ import annotations

from datetime import datetime, timezone

import msgspec

from slmops.agent.identity import DeviceConfig
from slmops.agent.store.artifacts import ArtifactStore
from slmops.agent.store.files import write_atomic
from slmops.agent.store.journal import read_journal
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import read_slot
from slmops.agent.store.views import make_view, remove_view
from slmops.artifact.manifest import Variant, decode
from slmops.core.errors import NotFoundError
from slmops.protocol.messages import Bench
from slmops.runtimes import EngineLimits, EngineSpec, load
from slmops.runtimes.bench import bench_model

_VIEW = "bench"


async def run_bench(
    layout: Layout, config: DeviceConfig, prompt_tokens: int, decode_tokens: int, repeats: int
) -> Bench:
    """Measure the committed release and keep the result for the next check-in.

    Raises:
        NotFoundError: the device has proved no release yet.
    """
    name = read_journal(layout.journal).state.committed_slot
    slot = read_slot(layout, name) if name is not None else None
    if slot is None or slot.assignment.serving is None:
        raise NotFoundError(
            "this device has proved no release yet", hint="run the agent and roll a release out to it first"
        )
    store = ArtifactStore(layout)
    variant = decode(store.read_blob(slot.digest_of("variant")), Variant)
    shape = variant.model_shape()
    runtime = load(slot.runtime)
    spec = EngineSpec(
        runtime=runtime.name,
        model_path=make_view(layout, _VIEW, slot),
        context_tokens=max(slot.assignment.serving.context_tokens, prompt_tokens + decode_tokens),
        slots=1,
        kv_cache=runtime.capabilities.kv_cache_for(slot.assignment.serving.kv_cache),
        threads=config.threads,
        ubatch_tokens=slot.assignment.serving.micro_batch_tokens,
    )
    limits = EngineLimits(memory_bytes=config.ram_limit_bytes, cpu_cores=config.cpu_cores)
    try:
        result = await bench_model(
            spec, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, repeats=repeats, limits=limits
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

"""Will this variant run on this device? Memory, disk and speed, before the first byte is moved.

The server uses the same function to choose a variant that the device uses to refuse one, so the two can only
differ where their facts differ. Memory follows llama.cpp's own allocation, with numbers of its own for each runtime
(:data:`RUNTIME_MEMORY`, fitted by ``bench/memory.py``):

    weights + KV cache + compute buffers + what the runtime needs before it has a model

* KV cache: ``conversations x context x layers x (k_width + v_width) x bytes per element`` of the cache type
  (quantised types carry their block scale: q8_0 is 34 bytes for 32 elements).
* compute buffers: the logits of one micro-batch plus the widest activations of one micro-batch.
* decode speed: every token reads all weights once and the KV cache filled so far, so bandwidth bounds it
  (Pope et al. 2022, arXiv:2211.05102, section 2). With a bench from the device the bandwidth is the measured
  one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from slmops.core.device.profile import DeviceFacts, DeviceProfile, MeasuredSpeed
from slmops.core.errors import UsageError

#: bytes per block and elements per block of each KV-cache type
KV_TYPES: dict[str, tuple[int, int]] = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_1": (24, 32),
    "q5_0": (22, 32),
    "q4_1": (20, 32),
    "q4_0": (18, 32),
    "iq4_nl": (18, 32),
}

#: Types worth trying where memory is short, best first: others lie between them.
KV_CHOICES = ("f16", "q8_0", "q4_0")

#: The engine child with its binding loaded and no model: measured (bench/agent.py prints it), rounded up.
RUNTIME_BASE_BYTES = 80 * (1 << 20)


@dataclass(frozen=True, slots=True)
class RuntimeMemory:
    """What a runtime makes of the same model; fitted on the highest resident memory of its engine child.

    Attributes:
        base_bytes: the child with its binding loaded and no model.
        weights_ratio: resident bytes for a byte of weights: 1 where the file is mapped, more where it is packed anew.
        kv_type: element type of its KV cache; None where the serving settings choose.
        kv_padding_tokens: a context is padded to a multiple.
        logits_buffers: copies of a micro-batch's logits that are alive together.
        max_parallel: conversations at once at most; None for as many as asked.
    """

    base_bytes: int
    weights_ratio: float = 1.0
    kv_type: str | None = None
    kv_padding_tokens: int = 1
    logits_buffers: int = 2
    max_parallel: int | None = None


_LLAMA_CPP = RuntimeMemory(RUNTIME_BASE_BYTES, kv_padding_tokens=256, logits_buffers=1)
#: By runtime; a name that is not here is a server on llama.cpp's engine and takes its numbers. Measured on SmolLM2-135M with
#: onnxruntime-genai 0.18.0 (fp32, int8, int4), ai-edge-litert 2.3.0 (int8) and ExecuTorch 1.5.1 (fp32, XNNPACK), x86-64;
#: ExecuTorch's base is mostly torch.
RUNTIME_MEMORY: dict[str, RuntimeMemory] = {
    "llama.cpp": _LLAMA_CPP,
    "onnxruntime-genai": RuntimeMemory(140 * (1 << 20), 1.22, "f32"),
    # XNNPACK keeps the file, packed copies of its weights and float32 embeddings; the cache is as long as the export made it
    "litert": RuntimeMemory(150 * (1 << 20), 3.2, "f32"),
    "litert-lm": RuntimeMemory(150 * (1 << 20), 3.2, "f32"),
    "executorch": RuntimeMemory(225 * (1 << 20), 1.27, "f32", max_parallel=1),
}

#: The runtime of the owner's own server.
EXTERNAL = "external"
#: Share of a profile's memory bandwidth that decode reaches in practice on CPUs; a bench replaces it.
BANDWIDTH_EFFICIENCY = 0.6
#: Activation tensors of one layer that are alive together, in units of the wider of hidden and FFN width.
LIVE_ACTIVATIONS = 12

SwapMode = Literal["blue_green", "cold"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model's shape decides memory and speed.

    Attributes:
        weights_bytes: bytes of tensors in the file.
        parameters: number of parameters.
        layers: transformer blocks.
        k_width: elements of one token's keys in one layer (KV heads x head size); ``v_width`` likewise.
        hidden: embedding width; ``ffn``: feed-forward width; ``vocabulary``: tokens.
        context_max_tokens: longest context that the model was trained for.
    """

    weights_bytes: int
    parameters: int
    layers: int
    k_width: int
    v_width: int
    hidden: int
    ffn: int
    vocabulary: int
    context_max_tokens: int


@dataclass(frozen=True, slots=True)
class Serving:
    """Serving settings that cost memory.

    Attributes:
        context_tokens: context of one conversation.
        kv_cache: element type of the KV cache, a key of :data:`KV_TYPES`.
        parallel: conversations at once; each has a context of its own, so the cache is this many times
            larger.
        micro_batch_tokens: prompt tokens computed at once.
    """

    context_tokens: int = 2048
    kv_cache: str = "q8_0"
    parallel: int = 2
    micro_batch_tokens: int = 64

    def __post_init__(self) -> None:
        """Refuse unknown cache types and empty contexts."""
        if self.kv_cache not in KV_TYPES:
            raise UsageError(f"kv_cache {self.kv_cache!r} is not known", hint=f"one of {', '.join(KV_TYPES)}")
        if self.context_tokens < 64:
            raise UsageError(
                f"context_tokens must be at least 64, got {self.context_tokens}", hint="2048 is a good start"
            )


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the memory goes, in bytes."""

    weights_bytes: int
    kv_cache_bytes: int
    buffers_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the four parts."""
        return self.weights_bytes + self.kv_cache_bytes + self.buffers_bytes + self.runtime_bytes


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer, with the numbers it rests on.

    Attributes:
        reasons: why it does not fit, in words with both numbers; empty when it fits.
        swap: ``blue_green`` when the device holds old and new engine at once, else ``cold``.
        predicted_decode_tps: tokens per second at half the context.
        speed_is_measured: whether the prediction rests on the device's own bench.
    """

    reasons: tuple[str, ...]
    memory: Memory
    disk_needed_bytes: int
    predicted_decode_tps: float
    speed_is_measured: bool
    swap: SwapMode

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


def engine_for(runtime: str, available: Collection[str]) -> str | None:
    """The engine that serves a variant here, or None.

    A server of the owner's own opens the same GGUF files as llama.cpp, and comes first where there is one: somebody set it
    up for this very device.

    Args:
        runtime: that the variant was built for.
        available: engines of the device, by name.
    """
    wanted = (EXTERNAL, runtime) if runtime == "llama.cpp" else (runtime,)
    return next((name for name in wanted if name in available), None)


def kv_cache_bytes(shape: ModelShape, serving: Serving, runtime: str = "llama.cpp") -> int:
    """Bytes of the KV cache of all conversations."""
    how = RUNTIME_MEMORY.get(runtime, _LLAMA_CPP)
    block_bytes, block_elements = KV_TYPES[how.kv_type or serving.kv_cache]
    parallel = min(serving.parallel, how.max_parallel or serving.parallel)
    tokens = -(-serving.context_tokens // how.kv_padding_tokens) * how.kv_padding_tokens * parallel
    elements = tokens * shape.layers * (shape.k_width + shape.v_width)
    return elements * block_bytes // block_elements


def memory_needed(shape: ModelShape, serving: Serving, runtime: str = "llama.cpp") -> Memory:
    """Memory of one engine that serves this model, in bytes."""
    how = RUNTIME_MEMORY.get(runtime, _LLAMA_CPP)
    micro_batch = min(serving.micro_batch_tokens, serving.context_tokens)
    widest = max(shape.hidden, shape.ffn)
    buffers = (
        4 * micro_batch * (how.logits_buffers * shape.vocabulary + LIVE_ACTIVATIONS * widest)
        + 4 * shape.vocabulary * serving.parallel
    )
    weights_bytes = round(shape.weights_bytes * how.weights_ratio)
    return Memory(weights_bytes, kv_cache_bytes(shape, serving, runtime), buffers, how.base_bytes)


def predict_decode_tps(
    shape: ModelShape, serving: Serving, bandwidth_bytes_s: float, runtime: str = "llama.cpp"
) -> float:
    """Decode tokens per second of one conversation at half its context.

    Args:
        shape: the model.
        serving: its context and cache type.
        bandwidth_bytes_s: effective read rate, bytes per second.
        runtime: engine that it is served with.
    """
    how = RUNTIME_MEMORY.get(runtime, _LLAMA_CPP)
    parallel = min(serving.parallel, how.max_parallel or serving.parallel)
    read_bytes = shape.weights_bytes + kv_cache_bytes(shape, serving, runtime) / parallel / 2
    return bandwidth_bytes_s / read_bytes


def effective_bandwidth(speed: MeasuredSpeed | None, profile: DeviceProfile) -> float:
    """Bytes per second that decode reads here: measured, or a share of the profile's without a bench."""
    if speed is not None:
        return speed.decode_tps * speed.weights_bytes
    return profile.memory_bandwidth_bytes_s * BANDWIDTH_EFFICIENCY


def fit(  # noqa: PLR0913 - each argument is one independent fact of the question
    shape: ModelShape,
    serving: Serving,
    profile: DeviceProfile,
    facts: DeviceFacts,
    *,
    runtime: str,
    missing_bytes: int,
    running_bytes: int = 0,
    min_decode_tps: float | None = None,
) -> Fit:
    """Decide whether a device can take a variant.

    Args:
        shape: the variant's shape.
        serving: settings it would be served with.
        profile: the device's profile.
        facts: what the device reports now.
        runtime: engine that the variant was built for; see :func:`engine_for`.
        missing_bytes: bytes that are not on the device's disk yet.
        running_bytes: memory of the engine that serves now; with room for both the swap is blue/green.
        min_decode_tps: slowest acceptable decode, tokens per second.
    """
    engine = engine_for(runtime, facts.runtimes) or runtime
    memory = memory_needed(shape, serving, engine)
    bandwidth = effective_bandwidth(facts.speed, profile)
    tps = predict_decode_tps(shape, serving, bandwidth, engine)
    reasons: list[str] = []
    if engine not in facts.runtimes:
        reasons.append(
            f"runtime: needs {runtime}, the device has {', '.join(sorted(facts.runtimes)) or 'none'}"
        )
    if memory.total_bytes > facts.ram_limit_bytes:
        reasons.append(f"memory: needs {memory.total_bytes} bytes, the device allows {facts.ram_limit_bytes}")
    if missing_bytes > facts.disk_free_bytes:
        reasons.append(f"disk: needs {missing_bytes} bytes more, the device has {facts.disk_free_bytes} free")
    if serving.context_tokens > shape.context_max_tokens:
        reasons.append(
            f"context: {serving.context_tokens} tokens asked, "
            f"the model was made for {shape.context_max_tokens}"
        )
    if min_decode_tps is not None and tps < min_decode_tps:
        source = "from its own bench" if facts.speed else "predicted from its profile"
        reasons.append(f"speed: {tps:.1f} tokens/s {source}, {min_decode_tps:g} asked")
    both = memory.total_bytes + running_bytes <= facts.ram_limit_bytes
    return Fit(
        tuple(reasons), memory, missing_bytes, tps, facts.speed is not None, "blue_green" if both else "cold"
    )

"""The llama.cpp runtime: one child process (`engine.py`) per loaded model.

Imports neither xllamacpp nor numpy.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.core.errors import UsageError
from slmops.runtimes import limits as engine_limits
from slmops.runtimes.llama_cpp.capi import DISTRIBUTION, KV_CACHE_TYPES
from slmops.runtimes.llama_cpp.native import check_gguf
from slmops.runtimes.ports import Capabilities, EngineLimits, EngineSpec
from slmops.runtimes.process import EngineProcess

if TYPE_CHECKING:
    from slmops.runtimes.logit_source import LogitSource

CHILD_MODULE = "slmops.runtimes.llama_cpp.engine"

_SAMPLING = {
    "frequency_penalty", "grammar", "ignore_eos", "json_schema", "logit_bias", "lora", "max_tokens", "min_p",
    "model", "n", "presence_penalty", "repeat_penalty", "seed", "stop", "stream", "stream_options",
    "temperature", "top_k", "top_p",
}  # fmt: skip
_CHAT = {
    "chat_template_kwargs", "logprobs", "max_completion_tokens", "messages", "parallel_tool_calls",
    "response_format", "tool_choice", "tools", "top_logprobs", "user",
}  # fmt: skip

CAPABILITIES = Capabilities(
    chat_fields=frozenset(_SAMPLING | _CHAT),
    completion_fields=frozenset(_SAMPLING | {"logprobs", "prompt", "user"}),
    kv_cache_types=frozenset(KV_CACHE_TYPES),
    adapters=True,
    adapter_scale_per_request=True,
    score=True,
    embeddings=True,
    embeddings_with_chat=True,
)

#: Threads that wait must sleep, not spin: on shared cores spinning has cost a factor of 80 in decode speed.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "MALLOC_ARENA_MAX": "2",  # many HTTP threads, few of which allocate at once
    "PYTHONUNBUFFERED": "1",
}


class LlamaCppRuntime:
    """GGUF models by xllamacpp; see `slmops.runtimes.ports.Runtime`."""

    name = "llama.cpp"
    formats = frozenset({"gguf"})
    capabilities = CAPABILITIES

    def version(self) -> str:
        """Version of xllamacpp."""
        return metadata.version(DISTRIBUTION)

    async def start(
        self, spec: EngineSpec, workdir: Path, limits: EngineLimits | None = None
    ) -> EngineProcess:
        """Spawn the child; see `Runtime.start`."""
        _check(spec)
        check_gguf(spec.model_path)
        for adapter in spec.adapters:
            check_gguf(adapter.path)
        applied = engine_limits.prepare(limits)
        environment = _ENVIRONMENT | {"OMP_NUM_THREADS": str(spec.threads)}
        extra = {"runtime_version": self.version()}
        return EngineProcess.spawn(CHILD_MODULE, spec, workdir, applied, environment=environment, extra=extra)

    def open_logits(
        self, path: Path, *, context_tokens: int, threads: int = 1, kv_cache: str = "f16"
    ) -> LogitSource:
        """Full logits in this process, for builds; see `slmops.runtimes.logit_source`. Needs numpy."""
        from slmops.runtimes.llama_cpp.logits import LogitModel  # noqa: PLC0415 - a device has no numpy

        return LogitModel(path, context_tokens=context_tokens, threads=threads, kv_cache=kv_cache)


def _check(spec: EngineSpec) -> None:
    if spec.kv_cache not in KV_CACHE_TYPES:
        raise UsageError(
            f"kv_cache: expected one of {', '.join(sorted(KV_CACHE_TYPES))}, got {spec.kv_cache!r}",
            hint="q8_0 halves the memory of f16",
        )
    for name in ("context_tokens", "slots", "threads", "batch_tokens", "ubatch_tokens"):
        if (value := getattr(spec, name)) < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}", hint=f"set {name} to 1 or more")

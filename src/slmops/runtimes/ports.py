"""The port between slmops and inference engines: what an engine is asked for and what it answers.

Owns the words `Runtime` (a kind of engine, such as llama.cpp), `Engine` (one loaded model in one child
process) and their arguments. Imports the standard library only, because the agent process imports it on the
smallest device.

Rules every adapter keeps (pinned by `tests/contract/test_engine_contract.py`):

- One child process per engine. It listens on Unix sockets in `workdir` only, never on a TCP port.
- The OpenAI surface is on `Engine.socket_path`: `GET /health` (503 while loading, 200 when ready, also in the
  middle of a long prefill), `GET /v1/models`, `POST /v1/chat/completions`, `POST /v1/completions`, `POST
  /v1/embeddings` when the spec asks for embeddings. Streams are server-sent events that end with `data:
  [DONE]`.
- A prompt longer than the context is a 400 with `error.type == "exceed_context_size_error"`, never a
  truncation.
- Connections are not reused: engines close them after a stream without a word (`connect.engine_client`).
- When the parent dies, for whatever reason, the child dies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

#: Message of a chat, in OpenAI's shape.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA file on top of the base model; scale 0.0 loads it without applying it."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class EngineSpec:
    """What to load and how. All of it may change an answer or its cost, so all of it is assigned.

    Attributes:
        runtime: name for `slmops.runtimes.load`.
        model_path: the model file. It is memory-mapped: it must never be overwritten in place while an engine
            lives.
        adapters: LoRA files, in order.
        context_tokens: tokens that one request may use, prompt and answer together, whatever `slots` is.
        slots: requests served at the same time; further requests wait in the engine's queue.
        kv_cache: element type of the KV cache ("f16", "q8_0", "q4_0", ...: `Capabilities.kv_cache_types`).
        threads: compute threads. 1 unless the engine has the machine to itself (spinning threads collapse
            speed).
        batch_tokens: logical prefill batch. Small values let short requests in between a long prefill's
            parts.
        ubatch_tokens: physical prefill batch; sets the size of the compute buffer.
        embeddings: load for `/v1/embeddings` (see `Capabilities.embeddings_with_chat`).
        repack: let the runtime rearrange weights for this CPU. Faster, but costs private memory of the file's
            size.
        chat_template: a template to use in place of the model's own, or None.
        model_alias: the name that its answers carry; empty for the file's name without its ending.
    """

    runtime: str
    model_path: Path
    adapters: tuple[AdapterSpec, ...] = ()
    context_tokens: int = 2048
    slots: int = 2
    kv_cache: str = "f16"
    threads: int = 1
    batch_tokens: int = 512
    ubatch_tokens: int = 512
    embeddings: bool = False
    repack: bool = True
    chat_template: str | None = None
    model_alias: str = ""

    @property
    def max_requests(self) -> int:
        """Requests in flight, waiting ones included, up to which `/health` is sure to answer.

        Each holds a connection thread of the engine.
        """
        return 4 * self.slots + 4


@dataclass(frozen=True)
class EngineLimits:
    """What the engine's process may use of the machine; None means no limit.

    Attributes:
        memory_bytes: resident memory, model pages included where cgroups work.
        cpu_cores: share of CPU time, such as 0.5 or 2.0. Only cgroups can enforce it.
        nice: added niceness, 0..19.
    """

    memory_bytes: int | None = None
    cpu_cores: float | None = None
    nice: int | None = None


@dataclass(frozen=True)
class AppliedLimit:
    """How one limit of `EngineLimits` is really enforced.

    Attributes:
        limit: field name in `EngineLimits`.
        mechanism: "cgroup2", "cgroup1", "rlimit", "nice" or "none".
        note: what this mechanism does and does not cover, for a human.
    """

    limit: str
    mechanism: str
    note: str


@dataclass(frozen=True)
class Capabilities:
    """What a runtime can honour, as closed sets; the gateway refuses or flags everything else.

    Attributes:
        chat_fields: request fields of `/v1/chat/completions` that have their OpenAI meaning.
        completion_fields: the same for `/v1/completions`.
        kv_cache_types: values of `EngineSpec.kv_cache`.
        adapters: LoRA files can be loaded.
        adapter_scale_per_request: the request field `lora` changes their scales.
        score: `Engine.score` works.
        embeddings: `EngineSpec.embeddings` works.
        embeddings_with_chat: an engine with embeddings also answers chat.
        forces_tool_choice: a ``tool_choice`` of "required", or of one function, always gives a tool call.
        max_slots: requests served at the same time at most, whatever the spec asks; the others wait. None: no
            limit of its own.
    """

    chat_fields: frozenset[str]
    completion_fields: frozenset[str]
    kv_cache_types: frozenset[str]
    adapters: bool
    adapter_scale_per_request: bool
    score: bool
    embeddings: bool
    embeddings_with_chat: bool
    forces_tool_choice: bool = False
    max_slots: int | None = None

    def kv_cache_for(self, asked: str) -> str:
        """The element type of the KV cache for an asked one: where a runtime has only one, that one.

        The blueprint's choice is for runtimes that have a choice; ``/v1/models/{id}`` tells what is in force.
        """
        return next(iter(self.kv_cache_types)) if len(self.kv_cache_types) == 1 else asked


@dataclass(frozen=True)
class EngineProperties:
    """Facts read back from the loaded engine, not from the spec.

    Attributes:
        context_tokens: effective context of one slot.
        train_context_tokens: context the model was trained for.
        slots: requests served at the same time.
        n_layers, n_heads, n_kv_heads, n_embd, head_dim: the shape that sizes the KV cache.
        vocab_tokens: vocabulary size.
        parameters: number of weights.
        model_bytes: size of the tensors.
        description: the runtime's own words, such as "llama 135M Q4_1".
        runtime_version: version of the runtime binding.
        bos_token, eos_token: ids, -1 when the model has none.
        chat_template: the template in force, None when the model has none.
    """

    context_tokens: int
    train_context_tokens: int
    slots: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_embd: int
    head_dim: int
    vocab_tokens: int
    parameters: int
    model_bytes: int
    description: str
    runtime_version: str
    bos_token: int
    eos_token: int
    chat_template: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Score:
    """Teacher-forced log-probabilities of one token sequence.

    Position i of each tuple speaks about `token_ids[start + i]` given everything before it.

    Attributes:
        start: index of the first scored token, at least 1.
        logprobs: natural-log probability of the token that is really there.
        greedy_ids: the token the model would have chosen there (argmax).
        greedy_logprobs: its log-probability.
        top: per position, the (token id, log-probability) pairs asked for by `top_k`, best first; empty
            without.
    """

    start: int
    logprobs: tuple[float, ...]
    greedy_ids: tuple[int, ...]
    greedy_logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood in nats per token; 0.0 for an empty score."""
        return -sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0


@runtime_checkable
class Engine(Protocol):
    """One loaded model in one child process. Not safe to share between event loops."""

    @property
    def spec(self) -> EngineSpec:
        """The spec that the engine was started with."""
        ...

    @property
    def socket_path(self) -> Path:
        """Unix socket of the OpenAI surface; talk to it by `slmops.runtimes.connect.engine_client`."""
        ...

    @property
    def pid(self) -> int:
        """Process id of the child."""
        ...

    @property
    def limits_applied(self) -> tuple[AppliedLimit, ...]:
        """How each limit that was asked for is really enforced."""
        ...

    def alive(self) -> bool:
        """Tell whether the child still runs; False at once after it died or was stopped."""
        ...

    def exit_code(self) -> int | None:
        """Exit status of the child (negative: signal number), None while it runs."""
        ...

    def log_tail(self) -> str:
        """Last lines that the child wrote; never holds prompts or answers."""
        ...

    def rss_bytes(self) -> int:
        """Resident memory of the child, mapped model pages included; 0 when it is gone."""
        ...

    def peak_rss_bytes(self) -> int:
        """Highest `rss_bytes` so far; the last known value when the child is gone."""
        ...

    def private_bytes(self) -> int:
        """Resident memory that is the child's alone: what another engine on the same file would add."""
        ...

    def cpu_s(self) -> float:
        """CPU time used by the child so far, user and system."""
        ...

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until `/health` answers 200.

        Raises:
            RuntimeLoadError: the child died or refused the model; carries the log tail.
            HealthCheckError: not ready within `timeout_s`.
        """
        ...

    async def healthy(self, timeout_s: float) -> bool:
        """Ask `/health` once; False when it does not answer 200 in time: the engine is dead, or it hangs."""
        ...

    async def properties(self) -> EngineProperties:
        """Read back what was really loaded."""
        ...

    async def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`; `add_special` adds BOS when the model wants one."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens shown."""
        ...

    async def apply_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a chat as the engine would prompt it, generation prompt included."""
        ...

    async def score(self, token_ids: Sequence[int], *, start: int = 1, top_k: int = 0) -> Score:
        """Teacher-forced log-probabilities of `token_ids[start:]`.

        Args:
            token_ids: at least two, at most `context_tokens`.
            start: first token to score, at least 1.
            top_k: alternatives per position, 0..100.

        Raises:
            UsageError: too long for the context, an id outside the vocabulary, or `start` out of range.
            RuntimeLoadError: the engine has died.
        """
        ...

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Unit-length sentence embeddings, one per text.

        Raises:
            UsageError: the engine was not started with `embeddings=True`.
        """
        ...

    async def stop(self, grace_s: float = 5.0) -> None:
        """Terminate the child (kill it after `grace_s`), remove its sockets and limits. Safe to repeat."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """A kind of engine."""

    @property
    def name(self) -> str:
        """Name as in `EngineSpec.runtime`."""
        ...

    @property
    def formats(self) -> frozenset[str]:
        """Model file formats that it loads, such as {"gguf"}."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What its engines honour."""
        ...

    def version(self) -> str:
        """Version of the binding, read without importing it.

        Raises:
            RuntimeLoadError: the binding is not installed; the hint names the extra.
        """
        ...

    async def start(self, spec: EngineSpec, workdir: Path, limits: EngineLimits | None = None) -> Engine:
        """Spawn the child and return at once; then `await engine.wait_ready(...)`.

        Args:
            spec: what to load.
            workdir: existing folder for sockets and log, one per engine. Its path may be long: sockets go
                elsewhere when it would not fit in 107 bytes.
            limits: what the child may use.

        Raises:
            UsageError: the spec asks for what the runtime cannot honour.
            RuntimeLoadError: the binding is missing or the file does not exist.
        """
        ...

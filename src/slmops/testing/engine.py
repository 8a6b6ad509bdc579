"""A scripted runtime for tests: a real child process on real Unix sockets, whose model is a small JSON file.

Runtime name: ``slmops.testing.engine:FakeRuntime``. It keeps the port `slmops.runtimes.ports.Runtime` and
passes the same contract suite as llama.cpp, so what works against it works against an engine, but for the
weights. Standard library only (the parent side uses httpx, as every engine does).

The model file::

    {"slmops_fake": 1,
     "answers": {"hello": "Hi there."},    # last user message that contains the key -> answer; longest key
     wins "default_answer": "I do not know.",
     "confidence": 0.9,                    # probability of the greedy token in scores: lower it for a worse
     variant "load_s": 0.0, "prefill_s": 0.0, "token_s": 0.0,      # how slow it is
     "faults": {"load": "refuse" | "crash" | "hang",       # or absent
                "crash_on_request": 3, "hang_on_request": 3, "garbage_from_request": 3}}   # counted from 1

Requests are chats, completions, embeddings and scores. An adapter is a JSON file ``{"slmops_fake": 1,
"answers": {...}}`` that goes before the model's answers unless its scale is 0. Tokens are UTF-8 bytes, plus
`<|im_start|>` and `<|im_end|>`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.core.errors import RuntimeLoadError
from slmops.runtimes import limits as engine_limits
from slmops.runtimes.ports import Capabilities, EngineLimits, EngineSpec
from slmops.runtimes.process import EngineProcess

if TYPE_CHECKING:
    from slmops.runtimes.logit_source import LogitSource

FAKE_RUNTIME = "slmops.testing.engine:FakeRuntime"
CHILD_MODULE = "slmops.testing.engine_child"
VERSION = "1"

_COMMON = {
    "ignore_eos",
    "max_tokens",
    "model",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
}

CAPABILITIES = Capabilities(
    chat_fields=frozenset(_COMMON | {"max_completion_tokens", "messages", "response_format", "user"}),
    completion_fields=frozenset(_COMMON | {"prompt", "user"}),
    kv_cache_types=frozenset({"f16", "q8_0"}),
    adapters=True,
    adapter_scale_per_request=False,
    score=True,
    embeddings=True,
    embeddings_with_chat=True,
)


class FakeRuntime:
    """See the module."""

    name = FAKE_RUNTIME
    formats = frozenset({"slmops-fake"})
    capabilities = CAPABILITIES

    def version(self) -> str:
        """Version of the fake's behaviour."""
        return VERSION

    async def start(
        self, spec: EngineSpec, workdir: Path, limits: EngineLimits | None = None
    ) -> EngineProcess:
        """Spawn the child; see `Runtime.start`."""
        if not spec.model_path.is_file():
            raise RuntimeLoadError(f"{str(spec.model_path)!r} does not exist", hint="check the path")
        applied = engine_limits.prepare(limits)
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        return EngineProcess.spawn(
            CHILD_MODULE, spec, workdir, applied, environment=environment, extra={"runtime_version": VERSION}
        )

    def open_logits(
        self, path: Path, *, context_tokens: int, threads: int = 1, kv_cache: str = "f16"
    ) -> LogitSource:
        """Full logits of a scripted model; threads and KV cache change nothing."""
        from slmops.testing.logits import FakeLogits  # noqa: PLC0415 - needs numpy

        return FakeLogits(path, context_tokens=context_tokens)


def write_fake_model(  # noqa: PLR0913 - a script is a list of settings
    path: Path,
    answers: Mapping[str, str] | None = None,
    *,
    default_answer: str = "I do not know.",
    confidence: float = 0.9,
    load_s: float = 0.0,
    prefill_s: float = 0.0,
    token_s: float = 0.0,
    faults: Mapping[str, str | int] | None = None,
    padding_bytes: int = 0,
    needs: Sequence[str] = (),
) -> Path:
    """Write a model file for `FakeRuntime` and give its path; `padding_bytes` makes it larger."""
    model = {
        "slmops_fake": 1,
        "answers": dict(answers or {}),
        "default_answer": default_answer,
        "confidence": confidence,
        "load_s": load_s,
        "prefill_s": prefill_s,
        "token_s": token_s,
        "faults": dict(faults or {}),
        "needs": list(needs),
        "padding": "x" * padding_bytes,
    }
    path.write_text(json.dumps(model), encoding="utf-8")
    return path

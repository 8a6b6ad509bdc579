"""What every runtime of the common child honours. Imports the standard library only: the agent reads it."""

from __future__ import annotations

from collections.abc import Set

from slmops.runtimes.ports import Capabilities

_SAMPLING = frozenset(
    {
        "frequency_penalty", "grammar", "ignore_eos", "json_schema", "logit_bias", "logprobs", "max_tokens", "min_p", "model",
        "presence_penalty", "repeat_penalty", "response_format", "seed", "stop", "stream", "stream_options", "temperature",
        "top_k", "top_p", "user",
    }
)  # fmt: skip

CHAT_FIELDS = _SAMPLING | {"chat_template_kwargs", "max_completion_tokens", "messages", "top_logprobs"}
COMPLETION_FIELDS = _SAMPLING | {"prompt"}
#: fields of ours that no client of the gateway can send; `n` may only be 1
OWN_FIELDS = frozenset({"cache_prompt", "n"})


def token_loop_capabilities(*, kv_cache_types: Set[str], max_slots: int | None = None) -> Capabilities:
    """Capabilities of a runtime of the common child.

    Args:
        kv_cache_types: element types of its KV cache; one where the exported file decides.
        max_slots: requests that it can serve at the same time at most; None for as many as the spec asks.
    """
    return Capabilities(
        chat_fields=CHAT_FIELDS,
        completion_fields=COMPLETION_FIELDS,
        kv_cache_types=frozenset(kv_cache_types),
        adapters=False,
        adapter_scale_per_request=False,
        score=True,
        embeddings=False,
        embeddings_with_chat=False,
        max_slots=max_slots,
    )

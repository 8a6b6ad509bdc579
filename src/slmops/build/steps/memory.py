"""What memory leaves for weights, by how the model is served: KV-cache type and context are chosen together with tensor types.

Where memory is the bound, a smaller cache buys larger weights. Each way to serve has a price in nats a token: what the cache
type itself costs, measured on the unquantised model, and what the weights cost that then fit. Independent damages add up, so
the least sum wins. A shorter context has no such price, it is something that users lose; so it is tried only when the recipe
says how short it may be, and then half the context must at least halve the divergence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.divergence import KeptText, log_softmax
from slmops.core.device.fit import ModelShape, Serving, memory_needed
from slmops.core.errors import BuildError
from slmops.runtimes.llama_cpp.logits import LogitModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

USES = (
    "slmops.build.gguf_file",
    "slmops.build.steps.divergence",
    "slmops.core.device.fit",
    "slmops.runtimes.llama_cpp.logits",
)
EXACT = "f16"
#: text on which a cache type's price is measured: long windows, because errors of the cache gather over the context
PRICE_TOKENS, WINDOW_TOKENS = 768, 384
BATCH_TOKENS = 64


@dataclass(frozen=True)
class Way:
    """One way to serve within the budgets.

    Attributes:
        serving: its settings, as JSON.
        allowed: the largest file by each bound, bytes.
        price: measured divergence of its cache type, nats a token.
        patience: what the divergence is multiplied by, because the context is shorter than asked for.
    """

    serving: dict[str, Any]
    allowed: dict[str, int]
    price: float
    patience: float

    @property
    def budget_bytes(self) -> int:
        """The largest file."""
        return min(self.allowed.values())

    def worth(self, expected_kld: float) -> float:
        """What is compared between ways; less is better."""
        return (expected_kld + self.price) * self.patience


def prices(context: StepContext) -> dict[str, Any]:
    """Measure what each cache type costs, if memory is the bound of any target.

    Files in: ``model`` (F16), ``text``. Values in: ``budget-PROFILE`` where the recipe gives a target no budget. Params:
    ``serving``, ``kv_caches``, ``targets`` (profile to ``artifact_bytes`` and ``ram_bytes``). Value: ``bound`` (profiles),
    ``kld`` (cache type to nats a token, against f16; empty when nothing was measured) and ``tokens``.

    Raises:
        BuildError: the calibration text is too short for one window.
    """
    with open_gguf(context.files["model"]) as model:
        shape, header_bytes = model.layout.shape(), model.layout.tensors_start
    bound = []
    for profile, target in context.params["targets"].items():
        params = budget_of(
            {**target, "serving": context.params["serving"]}, context.values.get(f"budget-{profile}")
        )
        if binds(allowed_bytes(params, shape, header_bytes)):
            bound.append(profile)
    if not bound:
        return {"bound": [], "kld": {}, "tokens": 0}
    windows = _windows(context.files["text"])
    exact = KeptText(_logprobs(context.files["model"], windows, EXACT))
    found = {}
    for kind in context.params["kv_caches"]:
        if kind == EXACT:
            found[kind] = 0.0
            continue
        found[kind] = exact.mean_divergence(_logprobs(context.files["model"], windows, kind))
        context.progress(None, f"KV cache in {kind}: KL divergence {found[kind]:.4f}")
    return {"bound": bound, "kld": found, "tokens": sum(map(len, windows))}


def ways(
    params: Mapping[str, Any], shape: ModelShape, header_bytes: int, measured: Mapping[str, Any] | None
) -> list[Way]:
    """Ways to serve, the one that was asked for first; others only where memory is the bound.

    Args:
        params: ``serving``, ``artifact_bytes``, ``ram_bytes``; ``kv_caches`` and ``least_context_tokens`` where the search
            is free to choose.
        shape: of the model.
        header_bytes: of its file.
        measured: value of :func:`prices`; None before it is known: every type then counts as exact.
    """
    asked = params["serving"]
    known = measured["kld"] if measured is not None else {}
    found = []
    for serving in _servings(params):
        allowed = allowed_bytes({**params, "serving": serving}, shape, header_bytes)
        shorter = asked["context_tokens"] / serving["context_tokens"]
        found.append(Way(serving, allowed, known.get(serving["kv_cache"], 0.0), shorter))
        if not binds(found[0].allowed):
            break
    return found


def _servings(params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    asked = params["serving"]
    yield dict(asked)
    tokens = asked["context_tokens"]
    least = params.get("least_context_tokens") or tokens
    while tokens >= least:
        for kind in params.get("kv_caches") or (asked["kv_cache"],):
            if (kind, tokens) != (asked["kv_cache"], asked["context_tokens"]):
                yield {**asked, "kv_cache": kind, "context_tokens": tokens}
        tokens //= 2


def allowed_bytes(params: Mapping[str, Any], shape: ModelShape, header_bytes: int) -> dict[str, int]:
    """The largest file by each bound. What the engine maps is the tensors, so memory allows the header on top."""
    without_weights = memory_needed(replace(shape, weights_bytes=0), Serving(**params["serving"])).total_bytes
    return {
        "artifact_bytes": int(params["artifact_bytes"]),
        "ram_bytes": int(params["ram_bytes"]) - without_weights + header_bytes,
    }


def binds(allowed: Mapping[str, int]) -> bool:
    """Whether memory is the bound."""
    return allowed["ram_bytes"] < allowed["artifact_bytes"]


def budget_of(params: Mapping[str, Any], derived: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters with the bytes that follow from the profile, where the recipe gives none.

    Where those follow from memory, and another way to serve may leave more, the bounds beside memory are taken.
    """
    if derived is None:
        return dict(params)
    key = "without_memory" if derived["because"] == "memory" else "artifact_bytes"
    return {**params, "artifact_bytes": derived[key], "because": derived["because"]}


def serving_of_step(context: StepContext) -> Serving:
    """How a variant is served: as it was chosen for it (value ``choice``), else as the recipe says (param ``serving``)."""
    chosen = context.values.get("choice", {}).get("serving")
    return Serving(**(chosen or context.params["serving"]))


def _windows(path: Path) -> list[list[int]]:
    token_ids = [token for sequence in json.loads(path.read_text(encoding="utf-8")) for token in sequence]
    length = min(WINDOW_TOKENS, len(token_ids))
    if length < 2:
        raise BuildError(
            "the calibration text has no tokens", hint="give some 100 sentences in task.calibration"
        )
    most = min(PRICE_TOKENS, len(token_ids)) // length
    return [token_ids[index * length : (index + 1) * length] for index in range(most)]


def _logprobs(path: Path, windows: Sequence[Sequence[int]], kv_cache: str) -> Iterator[NDArray[np.float32]]:
    context = -(-max(map(len, windows)) // 256) * 256
    with LogitModel(
        path, context_tokens=context, threads=1, batch_tokens=BATCH_TOKENS, kv_cache=kv_cache
    ) as model:
        for token_ids in windows:
            yield log_softmax(model.logits(token_ids)[:-1])

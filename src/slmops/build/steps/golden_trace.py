"""The golden pack's long text: how much of it a model is asked, and how far a good file may be from what it said at the build.

A **trace** is what a variant's file said at every token of the text (:mod:`slmops.core.evidence.golden` judges it). A device runs
the same file with other kernels and maybe another KV-cache type; both move single tokens, some by a nat. How much that is depends
on the model and its tensor types, so it is measured for each file, by scoring the text under another KV-cache type that is as
good (``f16``, or ``q8_0`` where that is served) and under the coarsest that still is (``q5_1``). Seen on SmolLM2 with the
example's task at 90 MB, mean absolute difference over 305 tokens from q8_0, nats a token:

    other kernels (repacked weights)  0.10      f16, bf16   0.10-0.11      q5_1   0.23
    rope base half  0.31    ten times  0.73     rope order of one block  0.56    one value head lost  0.14 to 0.51

So ``1.75 x`` the first is tolerated under a KV-cache type that is as good, and ``1.25 x`` the second under any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.artifact.manifest import GoldenMessage, GoldenPrompt, GoldenTrace, encode_trace
from slmops.build.golden_text import QUESTION, TEXT
from slmops.build.graph import StepContext
from slmops.core.device.fit import Serving
from slmops.core.evidence.golden import TRACE_LEAST, Trace
from slmops.runtimes import Engine, EngineSpec, open_engine
from slmops.runtimes.llama_cpp.scorer import Scorer

USES = ("slmops.build.golden_text",)
#: the text's id in a pack
TEXT_ID = "slmops-text"
FINE_FACTOR, COARSE_FACTOR = 1.75, 1.25
#: nats a token; a trace is kept to a sixteenth of a nat
LEAST_TOLERANCE = 0.05
_COARSE_KV = "q5_1"
_MOST_CHARACTERS = len(TEXT)


def cut(context: StepContext) -> dict[str, Any]:
    """How much of the text fits. Files in: ``model``. Params: ``text_tokens`` (of the text alone), ``context_tokens``.

    Value: ``text``, empty when nothing fits beside the question; ``tokens``: of question and text together.
    """
    spec = EngineSpec(
        runtime="llama.cpp",
        model_path=context.files["model"],
        context_tokens=int(context.params["context_tokens"]),
        slots=1,
        repack=False,
    )
    return asyncio.run(_cut(spec, int(context.params["text_tokens"])))


async def _cut(spec: EngineSpec, most_tokens: int) -> dict[str, Any]:
    async with open_engine(spec) as engine:
        asked = len(await engine.apply_template([{"role": "user", "content": QUESTION}]))
        room = min(most_tokens, spec.context_tokens - asked)
        low, high = 0, _MOST_CHARACTERS  # the longest beginning that fits is in between
        while low < high:
            middle = (low + high + 1) // 2
            if await _length(engine, TEXT[:middle]) <= room:
                low = middle
            else:
                high = middle - 1
        tokens = await _length(engine, TEXT[:low])
    return {"text": TEXT[:low] if tokens > 0 else "", "tokens": asked + tokens if tokens > 0 else 0}


async def _length(engine: Engine, text: str) -> int:
    return len(await engine.tokenize(text, add_special=False, parse_special=False)) if text else 0


def text_prompt(text: str) -> GoldenPrompt:
    """The text as a prompt of a pack."""
    return GoldenPrompt(TEXT_ID, (GoldenMessage("user", QUESTION),), text)


def moved(
    path: Path, tokens: Sequence[int], start: int, said: Sequence[float], serving: Serving
) -> dict[str, float]:
    """How far a good file is from itself: ``fine`` and ``coarse``, mean absolute difference in nats a token.

    Args:
        path: the variant's file.
        tokens: question and text; ``start``: where the text begins.
        start: see above.
        said: what the file said of the text's tokens under ``serving``.
        serving: see above.
    """
    own = Trace(serving.kv_cache, tuple(max(value, TRACE_LEAST) for value in said), 0.0, 0.0)
    found = {}
    for name, kv_cache in (
        ("fine", "q8_0" if serving.kv_cache == "f16" else "f16"),
        ("coarse", _COARSE_KV),
    ):
        scorer = Scorer(path, context_tokens=serving.context_tokens, kv_cache=kv_cache)
        try:
            found[name] = own.distance(scorer.score(tokens, start=start).logprobs)
        finally:
            scorer.close()
    return found


def trace_of(scored: Mapping[str, Any]) -> GoldenTrace | None:
    """The trace of a text's score; None of a prompt without one.

    Args:
        scored: of one prompt: maybe ``logprobs``, ``kv_cache`` and ``moved``.
    """
    if "moved" not in scored:
        return None
    fine = max(FINE_FACTOR * scored["moved"]["fine"], LEAST_TOLERANCE)
    coarse = max(COARSE_FACTOR * scored["moved"]["coarse"], fine)
    return GoldenTrace(scored["kv_cache"], encode_trace(scored["logprobs"]), round(fine, 6), round(coarse, 6))

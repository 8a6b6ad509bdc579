"""The golden pack's long text: what fits of it, and what a device may find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.artifact.manifest import decode_trace, encode_trace
from slmops.build.golden_text import TEXT
from slmops.build.graph import StepContext
from slmops.build.steps.golden_trace import (
    COARSE_FACTOR,
    FINE_FACTOR,
    LEAST_TOLERANCE,
    cut,
    moved,
    trace_of,
)
from slmops.core.device.fit import Serving
from slmops.core.errors import TrustError
from slmops.runtimes.llama_cpp.scorer import Scorer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    make_tiny_gguf(path)
    return path


def cut_to(model: Path, text_tokens: int, context_tokens: int) -> dict[str, Any]:
    params = {"text_tokens": text_tokens, "context_tokens": context_tokens}
    return cut(StepContext({"model": model}, {}, params, model.parent, lambda ratio, note: None))


def test_as_much_of_the_text_as_is_asked_for(model: Path) -> None:
    """The longest beginning: one character more is a token more."""
    found = cut_to(model, 100, 512)
    assert TEXT.startswith(found["text"])
    more = cut_to(model, 101, 512)
    assert len(more["text"]) > len(found["text"])
    assert more["tokens"] == found["tokens"] + 1
    assert cut_to(model, 4096, 4096)["text"] == TEXT


def test_never_more_than_the_context_holds(model: Path) -> None:
    assert 64 < cut_to(model, 384, 128)["tokens"] <= 128
    assert cut_to(model, 384, 16) == {"text": "", "tokens": 0}


def test_what_other_arithmetic_moves_is_measured(model: Path) -> None:
    """A coarser KV cache moves more than a fine one; the file itself, nothing."""
    tokens = list(range(20, 120))
    serving = Serving(context_tokens=512, kv_cache="q8_0", parallel=1)
    scorer = Scorer(model, context_tokens=512, kv_cache="q8_0")
    said = scorer.score(tokens, start=10).logprobs
    scorer.close()
    found = moved(model, tokens, 10, said, serving)
    assert 0 < found["fine"] < found["coarse"] < 1
    as_served = moved(model, tokens, 10, said, Serving(context_tokens=512, kv_cache="q5_1", parallel=1))
    assert as_served["coarse"] == pytest.approx(found["coarse"])


def test_tolerances_follow_from_what_was_measured() -> None:
    scored = {"kv_cache": "q8_0", "logprobs": [-1.0, -20.0, -0.03]}
    trace = trace_of(scored | {"moved": {"fine": 0.1, "coarse": 0.3}})
    assert trace is not None
    assert (trace.tolerance, trace.tolerance_other_kv) == pytest.approx(
        (FINE_FACTOR * 0.1, COARSE_FACTOR * 0.3)
    )
    assert decode_trace(trace.logprobs) == (-1.0, -15.9375, 0.0)
    exact = trace_of(scored | {"moved": {"fine": 0.0, "coarse": 0.0}})
    assert exact is not None
    assert exact.tolerance == exact.tolerance_other_kv == LEAST_TOLERANCE
    assert trace_of({"mean_logprob": -1.0}) is None


def test_a_trace_is_a_byte_a_token_and_no_other_text() -> None:
    assert len(encode_trace([-0.1] * 300)) == 400
    with pytest.raises(TrustError, match="malformed"):
        decode_trace("not base64!")

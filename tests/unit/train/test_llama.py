"""The forward pass in torch and the engine's agree, with and without an adapter."""

# ruff: noqa: E402 - what needs torch is imported after the question whether it is there
from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.support.tiny_model import make_tiny_gguf

from slmops.core.errors import BaseModelError
from slmops.train.adapter import read_adapter, write_adapter
from slmops.train.llama import Llama, causal_mask, load_llama
from slmops.train.lora import LoraWeights
from slmops.train.tokenizer import ChatTokenizer

PROMPT = list(b"open the blinds in 27 rooms")


def next_logprobs(llama: Llama, tokens: list[int], lora: LoraWeights | None = None) -> torch.Tensor:
    """Log-probabilities of the token after ``tokens``, (vocabulary,)."""
    with torch.no_grad():
        row = torch.tensor(tokens)
        hidden = llama.hidden(row, torch.arange(len(tokens)), causal_mask(len(tokens)), lora)
        return llama.logits(hidden[-1:])[0].log_softmax(-1)


def test_logits_equal_the_engine_s_on_a_tiny_model(tmp_path: Path, start_engine) -> None:  # type: ignore[no-untyped-def]
    """On float16 weights the ten likeliest tokens and their log-probabilities agree to 0.01."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf", seed=3)
    ours = next_logprobs(load_llama(path), PROMPT)
    theirs = start_engine(path).top_logprobs(PROMPT, 10)
    assert len(theirs) == 10
    for token, logprob in theirs.items():
        assert ours[token].item() == pytest.approx(logprob, abs=0.01)
    assert set(ours.topk(5).indices.tolist()) <= set(theirs)


def test_adapter_acts_in_the_engine_as_in_training(tmp_path: Path, start_engine) -> None:  # type: ignore[no-untyped-def]
    """The written adapter, loaded by the engine, moves the logits as ``LoraWeights`` does."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf", seed=3)
    llama = load_llama(path)
    lora = LoraWeights(llama.shape, 4, 8.0, seed=1)
    chance = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for leaf in lora.b.values():
            leaf.copy_(0.3 * torch.randn(leaf.shape, generator=chance))
    write_adapter(tmp_path / "a.gguf", lora, "llama", {})
    read_adapter(tmp_path / "a.gguf", lora)
    ours = next_logprobs(llama, PROMPT, lora)
    theirs = start_engine(path, tmp_path / "a.gguf").top_logprobs(PROMPT, 10)
    for token, logprob in theirs.items():
        assert ours[token].item() == pytest.approx(logprob, abs=0.02)
    plain = next_logprobs(llama, PROMPT)
    assert max(abs(plain[token].item() - logprob) for token, logprob in theirs.items()) > 0.2


@pytest.mark.model
def test_logits_agree_on_the_real_model(small_model: Path, start_engine) -> None:  # type: ignore[no-untyped-def]
    """Same likeliest token; others within what the engine's 8-bit activations cost on Q4_1 weights."""
    tokens = ChatTokenizer(small_model).encode("The capital of France is Paris, and the capital of Italy is")
    ours = next_logprobs(load_llama(small_model), tokens)
    theirs = start_engine(small_model).top_logprobs(tokens, 5)
    assert ours.argmax().item() == max(theirs, key=theirs.__getitem__)
    for token, logprob in theirs.items():
        assert ours[token].item() == pytest.approx(logprob, abs=0.4)


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    """Neither text nor half a file is taken for a model."""
    (tmp_path / "text.gguf").write_text("this is not a model, but it is long enough to have a header")
    with pytest.raises(BaseModelError, match="not a readable GGUF"):
        load_llama(tmp_path / "text.gguf")
    whole = make_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BaseModelError):
        load_llama(tmp_path / "half.gguf")

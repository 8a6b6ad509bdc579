"""One suite for every source of logits: what a build's likelihoods rest on, on llama.cpp and on the shipped fake alike."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.core.errors import NotFoundError, RuntimeLoadError, UsageError
from slmops.runtimes import EngineSpec, open_engine
from slmops.runtimes.logit_source import LogitRuntime, LogitSource, open_logits
from slmops.runtimes.registry import load
from slmops.testing.engine import FAKE_RUNTIME, write_fake_model

IDS = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100] * 5


@dataclass(frozen=True)
class Source:
    runtime: str
    path: Path

    def open(self, context_tokens: int = 128) -> LogitSource:
        return open_logits(self.runtime, self.path, context_tokens=context_tokens)


@pytest.fixture(params=["fake", "tiny", pytest.param("small", marks=pytest.mark.model)])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    if request.param == "fake":
        return Source(FAKE_RUNTIME, write_fake_model(tmp_path / "m.json", {"Hello": "Hi."}, confidence=0.7))
    if request.param == "tiny":
        return Source("llama.cpp", make_tiny_gguf(tmp_path / "tiny.gguf", seed=4))
    return Source("llama.cpp", request.getfixturevalue("small_model"))


def log_softmax(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def test_every_position_has_its_row(source: Source) -> None:
    with source.open() as model:
        assert isinstance(model, LogitSource)
        rows = model.logits(IDS)
        assert rows.shape == (len(IDS), model.vocab_tokens)
        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()
        assert model.context_tokens == 128


def test_a_row_depends_on_what_is_before_it_only(source: Source) -> None:
    with source.open() as model:
        whole, part = model.logits(IDS), model.logits(IDS[:20])
    np.testing.assert_allclose(log_softmax(whole[:20]), log_softmax(part), atol=1e-3)


def test_the_same_call_gives_the_same_bits(source: Source) -> None:
    """Within one source, after other sequences, and from a source opened anew; what was given is the caller's own."""
    with source.open() as model:
        first = model.logits(IDS)
        kept = first.copy()
        model.logits(list(reversed(IDS)))
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_array_equal(model.logits(IDS), kept)
    with source.open() as again:
        np.testing.assert_array_equal(again.logits(IDS), kept)


def test_it_is_what_the_runtime_serves(source: Source) -> None:
    """The engine of the same runtime scores the same tokens with the same probabilities and the same favourites."""

    async def served() -> tuple[list[float], list[int]]:
        spec = EngineSpec(source.runtime, source.path, context_tokens=256, slots=1)
        async with open_engine(spec) as engine:
            score = await engine.score(IDS)
            return list(score.logprobs), list(score.greedy_ids)

    logprobs, greedy = asyncio.run(served())
    with source.open(256) as model:
        rows = log_softmax(model.logits(IDS))
    np.testing.assert_allclose(rows[np.arange(len(IDS) - 1), IDS[1:]], logprobs, atol=1e-4)
    assert rows[:-1].argmax(axis=1).tolist() == greedy


@pytest.mark.parametrize(
    "ids", [[], [1] * 129, [10_000_000], [-1, 3]], ids=["none", "too long", "outside", "negative"]
)
def test_what_cannot_be_asked_is_refused(source: Source, ids: list[int]) -> None:
    with source.open() as model:
        with pytest.raises(UsageError):
            model.logits(ids)
        assert model.logits(IDS[:1]).shape == (1, model.vocab_tokens)


def test_closing_twice_is_fine(source: Source) -> None:
    model = source.open()
    model.close()
    model.close()


def test_a_broken_file_is_a_load_error(source: Source, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"not a model at all")
    for path in (broken, tmp_path / "missing"):
        with pytest.raises(RuntimeLoadError):
            open_logits(source.runtime, path, context_tokens=64)


def test_runtimes_are_found_by_name() -> None:
    assert isinstance(load("llama.cpp"), LogitRuntime)
    with pytest.raises(NotFoundError):
        open_logits("nothing", Path("x"), context_tokens=64)

"""Logits, scores and importance of a model, against each other and against arithmetic on the file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.tiny_gemma import make_tiny_gemma
from tests.support.tiny_model import make_tiny_adapter, make_tiny_gguf

from slmops.core.errors import BuildError, RuntimeLoadError, UsageError
from slmops.runtimes import AdapterSpec
from slmops.runtimes.llama_cpp.capi import Tensor
from slmops.runtimes.llama_cpp.imatrix import Collector, collect_hessians, collect_imatrix
from slmops.runtimes.llama_cpp.logits import LogitModel, iter_logits
from slmops.runtimes.llama_cpp.scorer import Scorer

TEXT = "The lamp in the kitchen is on, and the one in the hall is off. " * 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", seed=3)


@pytest.fixture(params=["tiny", pytest.param("small", marks=pytest.mark.model)])
def model_path(request: pytest.FixtureRequest, tiny: Path) -> Path:
    path: Path = tiny if request.param == "tiny" else request.getfixturevalue("small_model")
    return path


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result


def test_the_scorer_without_numpy_agrees_with_numpy(model_path: Path) -> None:
    """Log-probabilities, argmax and the top five equal a float64 log-softmax over full logits."""
    with LogitModel(model_path, context_tokens=256) as model:
        ids = model.tokenize(TEXT)[:90]
        expected = log_softmax(model.logits(ids))
    scorer = Scorer(model_path, context_tokens=256)
    try:
        score = scorer.score(ids, start=7, top_k=5)
    finally:
        scorer.close()
    rows = expected[6:-1]
    np.testing.assert_allclose(score.logprobs, rows[np.arange(len(rows)), ids[7:]], atol=1e-5)
    assert list(score.greedy_ids) == rows.argmax(axis=1).tolist()
    np.testing.assert_allclose(score.greedy_logprobs, rows.max(axis=1), atol=1e-5)
    best = np.sort(rows, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose([[value for _, value in row] for row in score.top], best, atol=1e-5)


def test_a_vocabulary_of_a_quarter_million(tmp_path: Path) -> None:
    """As many tokens as Gemma 3 has: a row of work no longer fits beside the graph (this once died with signal 11)."""
    path = make_tiny_gemma(tmp_path / "large.gguf", layers=1, more_tokens=262_144)
    with LogitModel(path, context_tokens=64) as model:
        logits = model.logits([2, 100, 200])[:-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    expected -= logits.max(axis=1, keepdims=True)
    scorer = Scorer(path, context_tokens=64)
    score = scorer.score([2, 100, 200], start=1, top_k=2)
    scorer.close()
    np.testing.assert_allclose(score.logprobs, [expected[0, 100], expected[1, 200]], atol=1e-3)
    assert score.greedy_ids == tuple(int(i) for i in logits.argmax(axis=1))


def test_scores_do_not_depend_on_where_they_start(model_path: Path) -> None:
    """Scoring the end of a sequence gives the same bits as scoring all of it."""
    scorer = Scorer(model_path, context_tokens=256)
    try:
        ids = [(7 * at) % 200 + 20 for at in range(100)]
        whole = scorer.score(ids)
        for start in (2, 33, 50, 99):
            assert scorer.score(ids, start=start).logprobs == whole.logprobs[start - 1 :]
    finally:
        scorer.close()


def test_scores_do_not_depend_on_what_came_before(tiny: Path) -> None:
    """The same sequence scores the same bits after the instance grew and after it was freed."""
    scorer = Scorer(tiny, context_tokens=2048)
    try:
        ids = list(range(40, 100))
        first = scorer.score(ids)
        scorer.score([token % 200 for token in range(1200)])
        assert scorer.score(ids) == first
        assert scorer.release_if_idle(0.0)
        assert not scorer.release_if_idle(0.0)
        assert scorer.score(ids) == first
    finally:
        scorer.close()


def test_an_adapter_changes_scores_by_its_scale(tiny: Path, tmp_path: Path) -> None:
    """A LoRA file changes a score by its scale; at scale zero the score is the base's, bit for bit."""
    adapter = make_tiny_adapter(tmp_path / "a.gguf", seed=2, size=0.5)
    ids = list(range(40, 80))
    scores = []
    for adapters in (
        (),
        (AdapterSpec(adapter, 0.0),),
        (AdapterSpec(adapter, 0.1),),
        (AdapterSpec(adapter, 1.0),),
    ):
        scorer = Scorer(tiny, context_tokens=256, adapters=adapters)
        try:
            scores.append(scorer.score(ids).logprobs)
        finally:
            scorer.close()
    base, zero, little, whole = scores
    assert zero == base
    assert 0 < np.abs(np.subtract(little, base)).mean() < np.abs(np.subtract(whole, base)).mean()


def test_windows_tile_the_text(tiny: Path) -> None:
    """Windows cover the text once, each as if it stood alone; a last lone token is left out."""
    with LogitModel(tiny, context_tokens=64) as model:
        ids = model.tokenize(TEXT)[:129]
        windows = list(iter_logits(model, ids, 64))
        assert [window.start for window in windows] == [0, 64]
        assert [token for window in windows for token in window.token_ids] == ids[:128]
        alone = model.logits(ids[64:128])
    np.testing.assert_array_equal(windows[1].logits, alone)
    assert windows[0].logits.shape == (64, model.vocab_tokens)
    opened = list(iter_logits(tiny, ids, 64))
    np.testing.assert_array_equal(opened[0].logits, windows[0].logits)


def test_greedy_follows_the_argmax(model_path: Path) -> None:
    """Each token that greedy chose is the argmax of the logits before it, and a stop token ends it."""
    with LogitModel(model_path, context_tokens=128) as model:
        prompt = model.tokenize("The capital of France is")
        answer = model.greedy(prompt, max_tokens=8)
        logits = model.logits([*prompt, *answer])
        chosen = logits[len(prompt) - 1 : len(prompt) - 1 + len(answer)].argmax(axis=1).tolist()
        assert chosen == answer
        assert model.greedy(prompt, max_tokens=8, stop_ids=answer[2:3]) == answer[: answer.index(answer[2])]
        assert model.detokenize(prompt) == "The capital of France is"


@pytest.mark.model
def test_perplexity_of_plain_english_is_small(small_model: Path) -> None:
    """A real model finds real English likely; a broken layout would be orders of magnitude off."""
    text = "Water boils at one hundred degrees. The sun rises in the east and sets in the west. " * 2
    with LogitModel(small_model, context_tokens=128) as model:
        ids = model.tokenize(text)
        values = log_softmax(model.logits(ids))
    perplexity = float(np.exp(-values[np.arange(len(ids) - 1), ids[1:]].mean()))
    assert 1 < perplexity < 30


def test_wrong_input_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Empty, too long, out of vocabulary; a file that is no model."""
    with LogitModel(tiny, context_tokens=256) as model:
        for ids in ([], [1] * 257, [10_000], [-1, 2]):
            with pytest.raises(UsageError):
                model.logits(ids)
        assert model.logits([5]).shape == (1, model.vocab_tokens)
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(tiny.read_bytes()[:-1000])
    with pytest.raises(RuntimeLoadError, match=r"torn\.gguf.*within"):
        LogitModel(torn)


def test_importance_of_the_first_layer_is_what_arithmetic_says(tiny: Path) -> None:
    """The first attention's input is the normed embedding: its mean square is computed here from the file."""
    reader = gguf.GGUFReader(tiny)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def values(name: str) -> NDArray[np.float32]:
        tensor = tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    with LogitModel(tiny, context_tokens=32) as model:
        ids = model.tokenize(TEXT)[:96]
    embedded = values("token_embd.weight")[ids]
    epsilon = float(reader.fields["llama.attention.layer_norm_rms_epsilon"].contents())
    normed = embedded / np.sqrt(np.square(embedded).mean(axis=1, keepdims=True) + epsilon)
    normed = normed * values("blk.0.attn_norm.weight").reshape(-1)
    importance = collect_imatrix(tiny, ids, window_tokens=32)
    assert importance.tokens == 96
    np.testing.assert_allclose(
        importance.sums["blk.0.attn_q.weight"], np.square(normed).mean(axis=0), rtol=1e-3
    )
    products = {
        name for name in tensors if "norm" not in name and name not in ("token_embd.weight", "output.weight")
    }
    assert products <= set(importance.sums)
    for name in products:
        assert importance.sums[name].shape == (int(tensors[name].shape[0]),)
    with pytest.raises(BuildError, match="at least 256"):
        collect_imatrix(tiny, ids, window_tokens=256)


@pytest.mark.parametrize("wanted", [None, {"blk.0.ffn_down.weight"}, {"blk.0.attn_q.weight"}])
def test_inputs_are_the_same_when_the_engine_stops_after_the_last(
    tiny: Path, wanted: set[str] | None
) -> None:
    """Every window but the first ends where nothing more is wanted; one window alone is always computed whole."""
    with LogitModel(tiny, context_tokens=32) as model:
        ids = model.tokenize(TEXT)[:96]
    together = {h.tensors: h.matrix for h in collect_hessians(tiny, ids, window_tokens=32, only=wanted)}
    apart = [
        {
            h.tensors: h.matrix
            for h in collect_hessians(tiny, ids[at : at + 32], window_tokens=32, only=wanted)
        }
        for at in (0, 32, 64)
    ]
    assert together.keys() == apart[0].keys()
    assert wanted is None or {name for names in together for name in names} == wanted
    for names, matrix in together.items():
        np.testing.assert_allclose(matrix, sum(one[names] for one in apart) / 3, rtol=1e-5, atol=1e-6)


def test_the_engine_stops_after_the_last_wanted_input(tiny: Path) -> None:
    """Nodes after it are not even asked for."""
    asked: list[bytes] = []

    class Watched(Collector):
        def __call__(self, tensor: Tensor, ask: bool) -> bool:
            if ask:
                asked.append(tensor.name)
            return super().__call__(tensor, ask)

    collector = Watched()
    with LogitModel(tiny, context_tokens=32, on_node=collector) as model:
        ids = model.tokenize(TEXT)[:32]
        model.evaluate(ids, every_position=True)
        whole = list(asked)
        assert b"result_output" in whole
        collector.stop_early()
        asked.clear()
        model.evaluate(ids, every_position=True)
    assert 0 < len(asked) < len(whole)
    assert asked[-1] == b"result_norm"
    assert set(collector.rows.values()) == {64}

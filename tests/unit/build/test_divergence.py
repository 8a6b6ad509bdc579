"""The compact reference: the divergence over it is right, never negative, and never above the exact one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from slmops.artifact.gguf_layout import Tensor
from slmops.build.steps import divergence as subject


def logits(seed: int, rows: int, width: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * scale).astype(np.float32)


def exact(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (np.exp(p.astype(np.float64)) * (p.astype(np.float64) - q.astype(np.float64))).sum(axis=1)


def test_log_softmax_sums_to_one() -> None:
    """Also for logits of any size."""
    rows = subject.log_softmax(logits(0, 5, 200, scale=300.0))
    assert np.exp(rows.astype(np.float64)).sum(axis=1) == pytest.approx(1.0, abs=1e-4)


def test_a_small_vocabulary_is_exact() -> None:
    """All tokens are kept: what remains is the rounding to float16."""
    p, q = (
        subject.log_softmax(logits(1, 40, 300)),
        subject.log_softmax(logits(1, 40, 300) + logits(2, 40, 300, 0.3)),
    )
    ids, kept = subject.compact(p)
    assert ids.shape == (40, 300)
    assert (ids[:, 0] == p.argmax(axis=1)).all()
    assert subject.divergence(ids, kept, q).mean() == pytest.approx(exact(p, q).mean(), rel=0.02)


def test_a_sampled_tail_has_no_bias() -> None:
    """Most of the mass in the tail: the mean is right up to sampling noise, where one bucket for the rest is far too low."""
    p, q = (
        subject.log_softmax(logits(3, 80, 20_000, 1.5)),
        subject.log_softmax(logits(3, 80, 20_000, 1.5) + logits(4, 80, 20_000, 0.3)),
    )
    ids, kept = subject.compact(p, subject.TOP)
    assert ids.shape == (80, subject.TOP)
    tail = subject.sample_tail(p, ids, first_row=0)
    assert tail.ids.shape == (80, subject.SAMPLED)
    assert 0.2 < tail.mass.mean() < 0.9
    real = exact(p, q).mean()
    assert subject.divergence(ids, kept, q, tail).mean() == pytest.approx(real, rel=0.08)
    assert subject.divergence(ids, kept, q).mean() < 0.8 * real


def test_what_is_sampled_does_not_depend_on_how_the_text_is_cut() -> None:
    """Rows are seeded one by one; only tokens beyond the likeliest are drawn."""
    p = subject.log_softmax(logits(6, 12, 3000))
    ids, _ = subject.compact(p, subject.TOP)
    whole = subject.sample_tail(p, ids, first_row=5)
    part = subject.sample_tail(p[4:], ids[4:], first_row=9)
    np.testing.assert_array_equal(whole.ids[4:], part.ids)
    assert all(not set(tail) & set(top) for tail, top in zip(whole.ids.tolist(), ids.tolist(), strict=True))


def test_every_figure_has_its_interval() -> None:
    """By units: the same tokens in fewer, larger units bound less; the same call gives the same numbers."""
    rng = np.random.default_rng(7)
    level = np.repeat(rng.exponential(0.05, 40), 25)
    values, same = level * rng.uniform(0.5, 1.5, 1000), rng.random(1000) < 0.9
    targets = -np.repeat(rng.exponential(1.0, 40), 25)
    by_text = subject.figures(values, same, targets, [str(n // 25) for n in range(1000)])
    by_token = subject.figures(values, same, targets, [str(n) for n in range(1000)])
    assert by_text == subject.figures(values, same, targets, [str(n // 25) for n in range(1000)])
    for name in ("kld_mean", "kld_p99", "same_top_ratio", "top_flips_ratio", "perplexity"):
        found = by_text["estimates"][name]
        assert found["low"] < found["value"] == by_text[name] < found["high"]
        assert found["clusters"] == 40
    for name in ("kld_mean", "kld_p99", "perplexity"):
        assert by_text["estimates"][name]["error"] > 1.5 * by_token["estimates"][name]["error"]
    assert by_text["same_top_ratio"] + by_text["top_flips_ratio"] == pytest.approx(1.0)


@pytest.mark.model
def test_the_compact_reference_agrees_with_float32(small_model: Path, tmp_path: Path) -> None:
    """On real distributions, a real model against its Q4_0: mean and 99 % KL within 1.5 % of the whole vocabulary's."""
    from slmops.build.gguf_file import NewTensor, open_gguf, write_gguf
    from slmops.runtimes.llama_cpp.logits import LogitModel
    from slmops.runtimes.llama_cpp.quantise import quantise_rows

    worse = tmp_path / "worse.gguf"
    with open_gguf(small_model) as source:

        def make(tensor: Tensor, type_name: str) -> bytes:
            if type_name == tensor.type_name:
                return bytes(source.blob(tensor))
            return quantise_rows(type_name, source.rows(tensor))

        tensors = []
        for tensor in source.layout.tensors:
            name = "Q4_0" if tensor.type_name == "Q4_1" else tensor.type_name
            tensors.append(NewTensor(tensor.name, name, tensor.shape, partial(make, tensor, name)))
        write_gguf(worse, source, tensors, replace={})
    text = (
        "Water boils at one hundred degrees. Set the lamp in the kitchen to blue, and play some quiet music. "
        * 12
    )
    with LogitModel(small_model, context_tokens=256) as model:
        ids = model.tokenize(text)[:250]
        p = subject.log_softmax(model.logits(ids))
    with LogitModel(worse, context_tokens=256) as model:
        q = subject.log_softmax(model.logits(ids))
    top, kept = subject.compact(p, subject.TOP)
    found = subject.divergence(top, kept, q, subject.sample_tail(p, top, first_row=0))
    real = exact(p, q)
    assert found.mean() == pytest.approx(real.mean(), rel=0.015)
    assert np.quantile(found, 0.99) == pytest.approx(np.quantile(real, 0.99), rel=0.015)


def test_a_model_does_not_diverge_from_itself() -> None:
    """Up to the rounding of what is kept."""
    p = subject.log_softmax(logits(5, 50, 3000))
    ids, kept = subject.compact(p)
    assert subject.divergence(ids, kept, p).max() < 1e-3


def test_perplexity_stays_finite() -> None:
    """A model that finds the text impossible still has a number that JSON can carry."""
    assert subject.perplexity(np.full(3, -1e6)) < float("inf")
    assert subject.perplexity(np.log(np.full(4, 0.25))) == pytest.approx(4.0)


def test_a_kept_text_measures_what_the_whole_vocabulary_does() -> None:
    """Sequence by sequence, kept in memory, the tail sampled: the mean is the exact one; on a first part of the text, too."""
    rng = np.random.default_rng(5)
    before = [subject.log_softmax(rng.normal(0, 2, (30, 2000)).astype(np.float32)) for _ in range(3)]
    after = [subject.log_softmax(rows + rng.normal(0, 0.2, rows.shape).astype(np.float32)) for rows in before]
    exact = [(np.exp(p) * (p - q)).sum(axis=1) for p, q in zip(before, after, strict=True)]
    kept = subject.KeptText(iter(before))
    assert kept.mean_divergence(iter(after)) == pytest.approx(np.concatenate(exact).mean(), rel=0.015)
    assert kept.mean_divergence(after[:1]) == pytest.approx(exact[0].mean(), rel=0.06)
    assert kept.mean_divergence(before) == pytest.approx(0.0, abs=1e-3)

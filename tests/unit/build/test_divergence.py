"""The compact reference: the divergence over it is right, never negative, and never above the exact one."""

from __future__ import annotations

import numpy as np
import pytest

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


def test_a_large_vocabulary_gives_a_close_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tail of a few per cent the bound lacks little, and lacks it on the safe side to know."""
    monkeypatch.setattr(subject, "KEPT", 256)
    p, q = (
        subject.log_softmax(logits(3, 60, 4000)),
        subject.log_softmax(logits(3, 60, 4000) + logits(4, 60, 4000, 0.3)),
    )
    ids, kept = subject.compact(p)
    assert ids.shape == (60, 256)
    found, real = subject.divergence(ids, kept, q).mean(), exact(p, q).mean()
    assert 0.7 * real < found <= real * 1.02


def test_a_model_does_not_diverge_from_itself() -> None:
    """Up to the rounding of what is kept."""
    p = subject.log_softmax(logits(5, 50, 3000))
    ids, kept = subject.compact(p)
    assert subject.divergence(ids, kept, p).max() < 1e-3


def test_perplexity_stays_finite() -> None:
    """A model that finds the text impossible still has a number that JSON can carry."""
    assert subject.perplexity(np.full(3, -1e6)) < float("inf")
    assert subject.perplexity(np.log(np.full(4, 0.25))) == pytest.approx(4.0)

"""Likelihoods: how far a variant's next-token distributions lie from the unquantised reference's, on held-out text.

The reference's distributions are computed once and kept compactly: for each scored position the ``KEPT`` likeliest
tokens with their log-probabilities (float16), and the rest as one bucket. The divergence over these buckets is a lower
bound of the one over the whole vocabulary (data-processing inequality); ``kept_mass`` says how much probability is in
the kept tokens, so how little the bound can lack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.build.graph import StepContext
from slmops.runtimes.llama_cpp.logits import LogitModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

USES = ("slmops.runtimes.llama_cpp.logits",)
KEPT = 1024
_TINY = 1e-12


def reference(context: StepContext) -> dict[str, Any]:
    """Keep the reference's distributions. Files in: ``model``, ``text``; out: ``ids.npy``, ``logprobs.npy``, ``targets.npy``."""
    ids, logprobs, targets, kept = [], [], [], []
    for ratio, next_ids, rows in _scored(context):
        row_ids, row_logprobs = compact(rows)
        ids.append(row_ids)
        logprobs.append(row_logprobs)
        targets.append(rows[np.arange(len(rows)), next_ids])
        kept.append(np.exp(row_logprobs.astype(np.float64)).sum(axis=1))
        context.progress(ratio, "reference")
    np.save(context.out / "ids.npy", np.concatenate(ids))
    np.save(context.out / "logprobs.npy", np.concatenate(logprobs))
    np.save(context.out / "targets.npy", np.concatenate(targets))
    target = np.concatenate(targets).astype(np.float64)
    return {
        "perplexity": perplexity(target),
        "scored_tokens": len(target),
        "kept_mass": float(np.concatenate(kept).clip(max=1.0).mean()),
    }


def compare(context: StepContext) -> dict[str, Any]:
    """Compare a shipped file with the reference. Files in: ``model``, ``text``, ``ids``, ``logprobs``.

    Value: ``kld_mean``, ``kld_p99``, ``kld_max`` (nats a token), ``same_top_ratio``, ``perplexity``, ``scored_tokens``.
    """
    ids, logprobs = np.load(context.files["ids"]), np.load(context.files["logprobs"])
    at, divergences, same, targets = 0, [], 0, []
    for ratio, next_ids, rows in _scored(context):
        here = slice(at, at + len(rows))
        at += len(rows)
        divergences.append(divergence(ids[here], logprobs[here], rows))
        same += int((rows.argmax(axis=1) == ids[here, 0]).sum())
        targets.append(rows[np.arange(len(rows)), next_ids])
        context.progress(ratio, f"KL divergence so far {float(np.concatenate(divergences).mean()):.4f}")
    values, target = np.concatenate(divergences), np.concatenate(targets).astype(np.float64)
    return {
        "kld_mean": float(values.mean()),
        "kld_p99": float(np.quantile(values, 0.99)),
        "kld_max": float(values.max()),
        "same_top_ratio": same / len(values),
        "perplexity": perplexity(target),
        "scored_tokens": len(values),
    }


def compact(logprobs: NDArray[np.float32]) -> tuple[NDArray[np.uint32], NDArray[np.float16]]:
    """The likeliest tokens of each row, best first.

    Args:
        logprobs: shape (n, vocabulary).

    Returns: ids (n, k) and log-probabilities (n, k) with k = min(KEPT, vocabulary).
    """
    count = min(KEPT, logprobs.shape[1])
    if count < logprobs.shape[1]:
        chosen = np.argpartition(logprobs, -count, axis=1)[:, -count:]
    else:
        chosen = np.broadcast_to(np.arange(count), logprobs.shape)
    values = np.take_along_axis(logprobs, chosen, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    ids = np.take_along_axis(chosen, order, axis=1)
    return ids.astype(np.uint32), np.take_along_axis(values, order, axis=1).astype(np.float16)


def divergence(
    ids: NDArray[np.uint32], reference: NDArray[np.float16], logprobs: NDArray[np.float32]
) -> NDArray[np.float64]:
    """KL divergence of each row from the compact reference, nats.

    Args:
        ids: shape (n, k); ``reference``: log-probabilities of these tokens under the reference, shape (n, k).
        reference: see above.
        logprobs: of the compared model, shape (n, vocabulary).
    """
    ours = np.take_along_axis(logprobs, ids.astype(np.int64), axis=1).astype(np.float64)
    theirs = reference.astype(np.float64)
    p, q = np.exp(theirs), np.exp(ours)
    p_rest, q_rest = np.clip(1 - p.sum(axis=1), _TINY, 1.0), np.clip(1 - q.sum(axis=1), _TINY, 1.0)
    if ids.shape[1] == logprobs.shape[1]:  # nothing is outside: what is left over is float16 rounding
        p_rest = q_rest = np.full(len(p), _TINY)
    total: NDArray[np.float64] = (p * (theirs - ours)).sum(axis=1) + p_rest * np.log(p_rest / q_rest)
    return np.maximum(total, 0.0)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities of rows of logits."""
    shifted: NDArray[np.float32] = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def perplexity(logprobs: NDArray[np.float64]) -> float:
    """Exponential of the mean negative log-probability; finite even for a model that knows nothing."""
    return math.exp(min(-float(logprobs.mean()), 700.0))


def _scored(context: StepContext) -> Iterator[tuple[float, NDArray[np.int64], NDArray[np.float32]]]:
    """For each held-out conversation: share done, the tokens that come, and the log-probabilities before them."""
    sequences = json.loads(context.files["text"].read_text(encoding="utf-8"))
    longest = max(len(sequence["token_ids"]) for sequence in sequences)
    with LogitModel(
        Path(context.files["model"]), context_tokens=math.ceil(longest / 64) * 64, threads=1
    ) as model:
        for index, sequence in enumerate(sequences):
            token_ids, start = sequence["token_ids"], sequence["start"]
            logits = model.logits(token_ids)[start - 1 : -1]
            yield (
                (index + 1) / len(sequences),
                np.array(token_ids[start:], dtype=np.int64),
                log_softmax(logits),
            )
